#!/usr/bin/env bash
# learning.sh: trains the runs of dev/results/learning.md, which compare how well the attention modes and number formats
# learn. A run writes log/learning/NAME/log.jsonl. Started again, the script skips the runs that are complete and resumes
# the others. It makes the corpus in data/linux if there is none: the C sources of Linux (Debian's and Ubuntu's package
# linux-source) as 16,384 BPE tokens. That needs Python with requirements.txt.
#   make && scripts/learning.sh                               # all runs, one after another
#   RUNS="nsa-1 full-1" scripts/learning.sh                   # these runs, in the order of the table below
#   CUDA_VISIBLE_DEVICES=1 RUNS=nsa-2 scripts/learning.sh     # on the second GPU
# Every step has 131,072 tokens, whatever GPUS is. The learning rate rises in the first tenth of the steps and then falls
# to a tenth by a cosine. The whole validation set is measured every 50 steps. Only a run that another one continues keeps
# its checkpoint.
# Environment: RUNS (all), GPUS (1), TRAINER (./train_gpt_nsa).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
export GPUS=${GPUS:-1} TRAINER=${TRAINER:-./train_gpt_nsa}

# Each model, or "64k" for a run that continues another one: context and flags.
declare -A MODELS=(
    [97m]="16384 -e gpt-124m -theta 1e6 -l 6e-4"
    [350m]="16384 -e gpt-124m -theta 1e6 -l 3e-4 -layers 24 -channels 1024 -hidden 3328 -heads 16 -kv-heads 4"
    [64k]="65536 -l 1e-4"
)

# name               model        tokens   flags
mapfile -t TABLE <<'END'
nsa-1                97m            200M   -attn nsa -seed 1
full-1               97m            200M   -attn full -seed 1
window-1             97m            200M   -attn window -seed 1
nsa-2                97m            200M   -attn nsa -seed 2
window-2             97m            200M   -attn window -seed 2
nsa-fp8-1            97m            200M   -attn nsa -seed 1 -matmul fp8
nsa-64k              nsa-1           20M   -attn nsa -seed 1
full-64k             full-1          20M   -attn full -seed 1
window-64k           window-1        20M   -attn window -seed 1
50m-nsa-1            97m             50M   -attn nsa -seed 1
50m-nsa-fp8-1        97m             50M   -attn nsa -seed 1 -matmul fp8
50m-nsa-2            97m             50M   -attn nsa -seed 2
50m-nsa-fp8-2        97m             50M   -attn nsa -seed 2 -matmul fp8
50m-full-1           97m             50M   -attn full -seed 1
50m-full-fp8-1       97m             50M   -attn full -seed 1 -matmul fp8
50m-rate-1           97m             50M   -attn nsa -seed 1 -l 1.8e-3
50m-rate-fp8-1       97m             50M   -attn nsa -seed 1 -l 1.8e-3 -matmul fp8
50m-gate-sliding-1   97m             50M   -attn nsa -seed 1 -gate-bias -2,-2,2
50m-gate-sliding-2   97m             50M   -attn nsa -seed 2 -gate-bias -2,-2,2
50m-gate-graded-1    97m             50M   -attn nsa -seed 1 -gate-bias -2,0,2
50m-gate-graded-2    97m             50M   -attn nsa -seed 2 -gate-bias -2,0,2
350m-nsa-30m         350m            30M   -attn nsa -seed 1
350m-nsa-30m-fp8     350m            30M   -attn nsa -seed 1 -matmul fp8
350m-nsa             350m           100M   -attn nsa -seed 1
350m-full            350m           100M   -attn full -seed 1
350m-window          350m           100M   -attn window -seed 1
END

die() { echo "error: $*" >&2; exit 1; }

# Makes the corpus: documents of 400 KB and more, so that most samples of 64K tokens lie in one document. Eight whole
# documents are held out. All training tokens are in one shard, because the trainer mixes the samples of a shard alone.
make_corpus() {
    local shards=(data/linux/linux_train_*.bin data/linux/linux_val_*.bin) documents=data/corpora/linux_c
    [ -f "${shards[0]}" ] && [ -f "${shards[-1]}" ] && return
    [ -d $documents ] || data/corpus -o $documents --suffix .c --min-bytes 400000
    [ -f data/linux_bpe/tokenizer.json ] ||
        data/bpe -o data/linux_bpe --name linux --train-vocab 16384 $documents/*/{fs,kernel,mm,net}
    data/bpe -o data/linux --name linux --tokenizer data/linux_bpe/tokenizer.json --val-documents 8 --min-tokens 131072 \
        --shard 2000000000 $documents
}

# steps MILLIONS: the steps of so many tokens
steps() { echo $((($1 * 1000000 + 65536) / 131072)); }

# is_continued NAME: whether another run starts from it
is_continued() { printf '%s\n' "${TABLE[@]}" | awk -v name="$1" '$2 == name { found = 1 } END { exit !found }'; }

# is_complete NAME STEPS: whether its last validation is logged, and its checkpoint exists if a run continues from it
is_complete() {
    grep -qs "^{\"step\":$2,.*\"val_loss\":" "log/learning/$1/log.jsonl" || return 1
    ! is_continued "$1" || [ -f "$(checkpoint "$1" "$2")" ]
}

# checkpoint NAME STEPS: the file
checkpoint() { printf 'log/learning/%s/ckpt_%08d.bin' "$1" "$2"; }

# train NAME MODEL TOKENS FLAGS: trains a run
train() {
    local name=$1 model=$2 steps start="" settings share=() cp out=log/learning/$1
    steps=$(steps "${3%M}")
    if is_complete "$name" "$steps"; then
        echo "== $name: complete"
        return
    fi
    if [ -z "${MODELS[$model]:-}" ]; then
        start=$(printf '%s\n' "${TABLE[@]}" | awk -v name="$model" '$1 == name { print $3 }')
        start=$(checkpoint "$model" "$(steps "${start%M}")")
        if [ ! -f "$start" ]; then
            echo "error: $name continues $model, which has no $start; run RUNS=$model scripts/learning.sh" >&2
            return 1
        fi
        model=64k
    fi
    read -ra settings <<<"${MODELS[$model]}"
    cp=$((GPUS * settings[0] / 131072)) # GPUs that share a sequence, where there are more GPUs than sequences in a step
    [ $cp -le 1 ] || share=(-cp "$cp")
    echo "== $name"
    scripts/gpus_host.sh ${start:+-e "$start"} -t "${settings[@]}" -b 1 -d 131072 "${share[@]}" -x "$steps" \
        -u $((steps / 10)) -k cosine -q 0.1 -v 50 -m 0 -n 0 -nk 1 -o "$out" -y 1 \
        -i 'data/linux/linux_train_*.bin' -j 'data/linux/linux_val_*.bin' "${@:4}" || return
    is_continued "$name" || rm -f "$out"/ckpt_*.bin
}

[ -x "$TRAINER" ] || die "$TRAINER: no such program; build it with make"
names=$(printf '%s\n' "${TABLE[@]}" | awk '{ print $1 }')
RUNS=${RUNS:-$names}
for name in $RUNS; do
    grep -qxF -e "$name" <<<"$names" || die "RUNS: $name: no such run; there are" $names
done
make_corpus
signal="" failed=""
for s in HUP INT TERM USR1 USR2; do trap 'signal=1' $s; done # the trainer gets the signal too, and writes a checkpoint
for line in "${TABLE[@]}"; do
    read -ra run <<<"$line"
    grep -qxF -e "${run[0]}" <<<"$(printf '%s\n' $RUNS)" || continue
    train "${run[@]}" || failed="$failed ${run[0]}"
    [ -z "$signal" ] || exit 1
done
[ -z "$failed" ] || die "these runs failed:$failed; see the messages above"
