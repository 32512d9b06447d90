#!/usr/bin/env bash
# Measures what the README says of quality: results/*/results.jsonl and figures.
#
#   scripts/reproduce.sh MOBY_DICK.txt PERSUASION.txt QASPER [OUT]
#
# Both novels as plain text in UTF-8; any long texts will do. QASPER as L-Eval packs it: a
# file or a hub id. OUT: where the results go, `results` by default. Rows that are there
# are not measured again: name another OUT to repeat all. Hours on two cores; a stopped run
# goes on where it was.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi
moby_dick=$(realpath "$1")
persuasion=$(realpath "$2")
qasper=$3
if [ -f "$qasper" ]; then qasper=$(realpath "$qasper"); fi
out=${4:-results}
. "$(dirname "$0")/setup.sh" demo,eval
.venv/bin/python scripts/prepare_demo_model.py >/dev/null
tova=.venv/bin/tova-mlx
$tova eval kept "$persuasion" --tokens 2048 --max-kv-size 128 --max-kv-size 512 \
    --out "$out/kept"
$tova eval needle --text "$persuasion" --max-kv-size 256 --length 1024 \
    --depth 0.25 --depth 0.5 --depth 0.75 --cases 5 --out "$out/needle"
$tova eval longrange --qasper "$qasper" --documents 6 --examples 99 \
    --max-kv-size 512 --out "$out/longrange"
# An eighth of the context first.
$tova eval perplexity "$moby_dick" --max-kv-size 256 --max-kv-size 64 \
    --max-kv-size 1024 --max-kv-size 512 --max-kv-size 128 --out "$out/perplexity"
qwen=$(.venv/bin/python scripts/prepare_demo_model.py --model qwen2.5-0.5b | tail -n 1)
# What was evicted comes back.
for model in demo "$qwen"; do
    recall="$out/recall"
    [ "$model" = demo ] || recall="$recall/$(basename "$qwen")"
    for text in "$persuasion" "$moby_dick"; do
        $tova eval perplexity "$text" --model "$model" --tokens 4096 --context 4096 \
            --policy fade --policy tova --max-kv-size 256 --recall 64 \
            --out "$recall/perplexity"
    done
    $tova eval needle --text "$persuasion" --model "$model" --max-kv-size 256 \
        --recall 64 --policy fade --policy tova --length 1024 --depth 0.25 \
        --depth 0.5 --depth 0.75 --cases 10 --out "$recall/needle"
done
$tova eval longrange --qasper "$qasper" --documents 6 --examples 30 --policy fade \
    --policy tova --max-kv-size 512 --recall 128 --out "$out/recall/longrange"
.venv/bin/python scripts/recall_limits.py "$moby_dick" --model "$qwen" --tokens 2048 \
    --out "$out/recall/limits.json"
# Fewer bits, and what they are worth at equal bytes, on two models.
for model in demo "$qwen"; do
    name=SmolLM2-135M-Instruct
    [ "$model" = demo ] || name=$(basename "$qwen")
    for text in "$persuasion" "$moby_dick"; do
        $tova eval perplexity "$text" --model "$model" --tokens 4096 --context 4096 \
            --policy fade --policy tova --max-kv-size 512 \
            --kv-bits 4 --kv-bits 8 --kv-bits 4,4 --out "$out/bits/$name"
    done
    $tova eval perplexity "$persuasion" --model "$model" --tokens 2048 \
        --policy fade --max-kv-size 1/4 --max-kv-size 1/8 --max-kv-size 1/16 \
        --max-kv-size 1/32 --kv-bits 4 --kv-bits 8 --out "$out/bytes/$name"
done
