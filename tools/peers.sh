#!/usr/bin/env bash
# The packages that strokenet is compared with; usage() says what the two forms do.
set -euo pipefail
cd "$(dirname "$0")/.."

limit=$((49 * 1024 * 1024)) # bytes of a parcel: under 50 MiB, with room for names

usage() {
    cat <<'END'
tools/peers.sh                  makes .venv-peers: nnU-Net 2.8.1, nnU-Net 1.7.1 and MONAI on a CPU build of torch, with
                                strokenet beside them, for tests/peers, tools/compare_nnunet.py and python -m bench
tools/peers.sh --wheels FOLDER  packs for a GPU machine without a network (Linux x86_64, Python 3.12; torch, triton, CuPy,
                                numpy and scipy are there) strokenet and what tools/wheels.txt lists, in parcels
                                FOLDER/1, FOLDER/2 ... each under 50 MiB, and prints what installs from them. A larger
                                wheel (SimpleITK's) is cut into parcels of its own, the last ones, and joined there
END
}

make_peers() {
    . tools/venv.sh
    make_venv .venv-peers
    local pip=(.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt)
    "${pip[@]}" torch
    # What would pull torchvision and CUDA comes without its dependencies.
    "${pip[@]}" --no-deps nnunetv2==2.8.1 nnunet==1.7.1 medpy acvl_utils==0.2.6 dynamic_network_architectures==0.4.4 \
        batchgeneratorsv2==0.3.6 monai==1.6.1 fft-conv-pytorch==1.2.0
    "${pip[@]}" batchgenerators numpy scipy nibabel connected-components-3d SimpleITK tqdm graphviz tifffile requests \
        seaborn imagecodecs yacs einops blosc2 matplotlib
    "${pip[@]}" --editable ".[test]"
}

fetch() { # one requirement, folder: its wheel for the other machine; one that has none is built, if it is pure Python
    local pip=(.venv/bin/python -m pip) platform=(--python-version 3.12 --implementation cp) glibc
    for glibc in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010; do
        platform+=(--platform "${glibc}_x86_64")
    done
    "${pip[@]}" download -qqq --no-deps --only-binary=:all: "${platform[@]}" --dest "$2" "$1" && return
    echo "$1: no wheel, built here" >&2
    "${pip[@]}" wheel -qq --no-deps --wheel-dir "$2/built" "$1"
    mv "$2"/built/*-none-any.whl "$2" # fails where it is not for every machine
    rmdir "$2/built"
}

into_parcels() { # folder of wheels, folder of parcels: the largest first, each into the first parcel with room
    local size wheel n filled=()
    while read -r size wheel; do
        n=1
        while ((${filled[n]:-0} + size > limit)); do n=$((n + 1)); done
        mkdir -p "$2/$n"
        mv "$wheel" "$2/$n/"
        filled[n]=$((${filled[n]:-0} + size))
    done < <(find "$1" -type f -size -$((limit + 1))c -printf '%s %p\n' | sort -rn)
}

cut_into_parcels() { # folder of wheels that fit no parcel, folder of parcels
    local wheel piece parcel
    while read -r wheel; do
        split --bytes=$limit --numeric-suffixes --suffix-length=1 "$wheel" "$wheel.part-"
        rm "$wheel"
        for piece in "$wheel".part-*; do
            parcel=$2/$(($(find "$2" -mindepth 1 -maxdepth 1 -name '[0-9]*' | wc -l) + 1))
            mkdir "$parcel"
            mv "$piece" "$parcel/"
        done
    done < <(find "$1" -type f)
}

say_how() { # folder of parcels
    local parcel first name
    for parcel in "$1"/*/; do
        awk -v parcel="${parcel%/}" '{ bytes += $1 } END { printf "%s  %.1f MiB, %d files\n", parcel, bytes / 1048576, NR }' \
            < <(find "$parcel" -type f -printf '%s\n')
    done
    echo "there:"
    for first in "$1"/*/*.part-0; do
        [ -e "$first" ] || continue
        name=$(basename "${first%.part-0}")
        echo "  cat $(printf "$1/*/$name.part-%s " $(seq 0 $(($(find "$1" -name "$name.part-*" | wc -l) - 1))))> $1/1/$name"
    done
    echo "  pip install --no-index --no-deps $1/*/*.whl"
}

pack() { # folder
    if [ -n "$(ls -A "$1" 2>/dev/null)" ]; then
        echo "error: $1 is not empty; give another folder" >&2
        exit 2
    fi
    . tools/venv.sh
    local requirement work
    work=$(mktemp -d)
    trap "rm -rf '$work'" EXIT
    mkdir -p "$1" "$work/source" "$work/wheels"
    while read -r requirement; do
        fetch "$requirement" "$work/wheels"
    done < <(grep -v '^#' tools/wheels.txt)
    # From a copy: a build beside the sources would be there at the next one, and what was removed since in its wheel.
    cp -r pyproject.toml setup.cfg README.md LICENSE planner kernels strokenet "$work/source"
    .venv/bin/python -m pip wheel -qq --no-deps --wheel-dir "$work/wheels" "$work/source"
    into_parcels "$work/wheels" "$1"
    cut_into_parcels "$work/wheels" "$1"
    say_how "$1"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced by its test
case "${1-} $#" in
" 0") make_peers ;;
"--wheels 2") pack "$2" ;;
"--help 1" | "-h 1") usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
