#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh" demo,dev,eval
.venv/bin/python scripts/prepare_demo_model.py >/dev/null
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
