#!/usr/bin/env bash
# Measures what the README says of quality: results/*/results.jsonl and figures.
#
#   scripts/reproduce.sh MOBY_DICK.txt PERSUASION.txt [OUT]
#
# Both novels as plain text in UTF-8; any long texts will do. OUT: where the results go,
# `results` by default. Rows that are there are not measured again: name another OUT to
# repeat all. Hours on two cores; a stopped run goes on where it was.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
moby_dick=$(realpath "$1")
persuasion=$(realpath "$2")
out=${3:-results}
. "$(dirname "$0")/setup.sh" demo,eval
.venv/bin/python scripts/prepare_demo_model.py >/dev/null
tova=.venv/bin/tova-mlx
$tova eval kept "$persuasion" --tokens 2048 --max-kv-size 128 --max-kv-size 512 \
    --out "$out/kept"
$tova eval needle --text "$persuasion" --max-kv-size 256 --length 1024 --kind digits \
    --depth 0.25 --depth 0.5 --depth 0.75 --cases 5 --out "$out/needle"
# The sizes in the order of interest: an eighth of the context first.
for size in 256 64 1024 512 128; do
    $tova eval perplexity "$moby_dick" --max-kv-size $size --out "$out/perplexity"
done
