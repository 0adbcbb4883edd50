#!/usr/bin/env bash
# books_124m.sh: trains a 124M-parameter model on eight novels for 200 steps with each of the three attention
# modes. Context 16,384; 131,072 tokens per step. log/books_124m_MODE/stdout.txt has losses, tokens/s and MFU.
#   data/get && make && scripts/books_124m.sh
# Run again, the script resumes where it stopped; to start anew, remove or rename these folders.
# Uses the BPE shards of data/books_bpe if they exist (data/README.md, data/bpe), else byte shards.
# Environment: TRAINER (./train_gpt_nsa), STEPS (200), TOKENS of a step (131072), CONTEXT (16384).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} STEPS=${STEPS:-200} TOKENS=${TOKENS:-131072} CONTEXT=${CONTEXT:-16384}
[ -x "$TRAINER" ] || { echo "error: $TRAINER: no such program; build it with make" >&2; exit 1; }
if ls data/books_bpe/books_train_*.bin >/dev/null 2>&1; then
    data=data/books_bpe
else
    [ -d data/corpora/books ] || { echo "error: no data/corpora/books; run data/get" >&2; exit 1; }
    [ -x build/text ] || { echo "error: build/text: no such program; build it with make" >&2; exit 1; }
    build/text -o data/books -name books data/corpora/books
    data=data/books
fi
for attn in nsa full window; do
    out=log/books_124m_$attn
    mkdir -p "$out"
    "$TRAINER" -e gpt-124m -attn "$attn" -t "$CONTEXT" -b 1 -d "$TOKENS" -x "$STEPS" -l 6e-4 \
        -u $((STEPS / 10)) -q 0.1 -v $(((STEPS + 3) / 4)) -m 8 -n 0 -s 0 \
        -i "$data/books_train_*.bin" -j "$data/books_val_*.bin" -o "$out" -y 1 |
        tee -a "$out/stdout.txt"
done
