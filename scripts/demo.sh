#!/usr/bin/env bash
# Sets everything up, then lets a small model read a chapter of Moby Dick with the full
# cache, with 256 tokens per layer, and with 256 and an archive of what they evict.
#
#   scripts/demo.sh [POLICY]
set -euo pipefail
. "$(dirname "$0")/setup.sh" demo
.venv/bin/python scripts/prepare_demo_model.py >/dev/null
.venv/bin/python scripts/demo.py --policy "${1:-fade}"
