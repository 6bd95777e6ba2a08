# Sourced by the scripts beside it, from the project's root: makes .venv and installs into it.
# torch comes first and pinned, so that no other package chooses its build for us.

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: python3.11 or newer with its venv module is needed, found: ${python:-none}; install it or set PYTHON" >&2
    exit 2
fi
make_venv() { # folder
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
}

make_venv .venv

install_strokenet() { # what to install: "." or ".[test]"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt --editable "$1"
}
