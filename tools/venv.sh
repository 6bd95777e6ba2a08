# Sourced by the scripts beside it, from the project's root: makes .venv and installs into it.
# torch comes first and pinned: what pip would choose on its own may bring gigabytes of CUDA.

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
[ -x .venv/bin/python ] || "$python" -m venv .venv

install_strokenet() { # what to install: "." or ".[test]"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt --editable "$1"
}
