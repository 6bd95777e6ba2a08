#!/usr/bin/env bash
# Makes .venv, installs the test tools, then ruff, mypy and pytest, a worker a core. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# Two rules of OpenMP, for machines that others use, too: a worker has one core, and a thread that waits sleeps. By
# default it spins, and beside two busy processes a test that takes 6 s took 3 minutes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
. tools/venv.sh
install_strokenet ".[mri,test]"
# Triton's interpreter runs kernels on any CPU; a CPU build of torch does not bring it, and only Linux has wheels of it.
if [ "$(uname -s)" = Linux ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
else
    echo "triton: no wheels for $(uname -s), its tests will be skipped" >&2
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
