#!/usr/bin/env bash
# books_124m.sh: trains a 124M-parameter model on eight novels for 200 steps with each of the three attention
# modes. Context 16,384; 131,072 tokens per step. log/books_124m_MODE/log.jsonl has losses, tokens/s and MFU.
#   data/get && make && scripts/books_124m.sh
# Run again, the script resumes where it stopped; to start anew, remove or rename these folders.
# Uses the BPE shards of data/books_bpe if they exist (data/README.md, data/bpe), else byte shards.
# Environment: TRAINER (./train_gpt_nsa), STEPS (200), TOKENS of a step (131072), CONTEXT (16384).
set -euo pipefail
. "$(dirname "$0")/common.sh"
usage "$@"
no_arguments "$@"
cd "$(dirname "$0")/.."
TRAINER=${TRAINER:-./train_gpt_nsa} STEPS=${STEPS:-200} TOKENS=${TOKENS:-131072} CONTEXT=${CONTEXT:-16384}
whole_numbers STEPS TOKENS CONTEXT
need_trainer
if ls data/books_bpe/books_train_*.bin >/dev/null 2>&1; then
    data=data/books_bpe
else
    [ -d data/corpora/books ] || die "no data/corpora/books; run data/get"
    need_maker build/text
    run build/text -o data/books -name books data/corpora/books
    data=data/books
fi
for attn in nsa full window; do
    run "$TRAINER" -e gpt-124m -attn "$attn" -t "$CONTEXT" -b 1 -d "$TOKENS" -x "$STEPS" -l 6e-4 \
        -u $((STEPS / 10)) -q 0.1 -v $(((STEPS + 3) / 4)) -m 8 -n 50 -nk 1 -s 0 \
        -i "$data/books_train_*.bin" -j "$data/books_val_*.bin" -o "log/books_124m_$attn" -y 1
done
