#!/usr/bin/env bash
# Makes .venv-peers: nnU-Net 2.8.1, nnU-Net 1.7.1 and MONAI on a CPU build of torch, with strokenet beside them, for
# tests/peers and tools/compare_nnunet.py. The packages that would pull torchvision and CUDA come without dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
make_venv .venv-peers
pip=(.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt)
"${pip[@]}" torch
"${pip[@]}" --no-deps nnunetv2==2.8.1 nnunet==1.7.1 medpy acvl_utils==0.2.6 dynamic_network_architectures==0.4.4 \
    batchgeneratorsv2==0.3.6 monai==1.6.1 fft-conv-pytorch==1.2.0
"${pip[@]}" batchgenerators numpy scipy nibabel connected-components-3d SimpleITK tqdm graphviz tifffile requests \
    seaborn imagecodecs yacs einops blosc2 matplotlib
"${pip[@]}" --editable ".[test]"
