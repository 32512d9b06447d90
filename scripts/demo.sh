#!/usr/bin/env bash
# Sets everything up, then lets a small model continue a chapter of Moby Dick while
# each layer keeps only 256 of its tokens.
set -euo pipefail
. "$(dirname "$0")/setup.sh" demo
.venv/bin/python scripts/prepare_demo_model.py >/dev/null
.venv/bin/tova-mlx generate --model demo --prompt-file scripts/moby_dick_excerpt.txt \
    --no-chat-template --max-kv-size 256 --policy "${1:-fade}" --max-tokens 100 \
    --temp 0.7 --top-p 0.95
