#!/usr/bin/env bash
# Makes .venv, installs strokenet and runs `strokenet demo`: needs python3.11 (or newer) with venv, and nothing else.
# Arguments go to the demo, e.g. tools/demo.sh -o /tmp/demo --minutes 1.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
install_strokenet .
exec .venv/bin/strokenet demo "$@"
