#!/usr/bin/env bash
# Makes .venv, installs the test tools, then ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
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
.venv/bin/pytest "$@"
