#!/usr/bin/env bash
# Makes .venv, installs the test tools, then ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_strokenet ".[test]"
# torch's CPU build comes without triton; its interpreter runs the kernels' tests on any machine.
.venv/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/pytest "$@"
