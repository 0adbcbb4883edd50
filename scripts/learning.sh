#!/usr/bin/env bash
# learning.sh: trains the runs of dev/results/learning.md, which compare how well the attention modes and number formats
# learn. A run writes log/learning/NAME/log.jsonl. Started again, the script skips the runs that are complete and
# resumes the others. A run writes a checkpoint every 100 steps, or every -n where a line of the table has one, so a
# crash loses at most these. The script makes the shards of a text in the table below if there are none, from the C
# sources of Linux (Debian's and Ubuntu's package linux-source). Making them needs Python with requirements.txt.
#   make && scripts/learning.sh                               # all runs, as many at a time as there are GPUs
#   scripts/learning.sh nsa-1 full-1                          # these runs, in the order of the table below
#   CUDA_VISIBLE_DEVICES=1 scripts/learning.sh nsa-2          # on the second GPU
#   SMOLLM2=FILE scripts/learning.sh                          # also those of SmolLM2-135M-Instruct: its GGUF file, or folder
# Several runs at a time write what they print to log/learning/NAME/output.txt.
# Every step has 131,072 tokens, whatever GPUS is. The learning rate rises in the first 100 steps (in fewer where a run
# continues a model) and then falls to a tenth by a cosine. The whole validation set is measured every 50 steps, from
# 100M tokens on every 100, where a line of the table has no -v. Only a run that another one continues keeps its
# checkpoint when it is complete. After Ctrl-C or SIGTERM each run finishes its step and writes a checkpoint, and the
# script ends.
# Environment: GPUS (1: GPUs of each run), TRAINER (./train_gpt_nsa), MICRO_TOKENS (65536: tokens of a micro-batch on a
# GPU; 16384 takes less memory and more time), SMOLLM2 (none; read once, to make data/smollm2 and data/linux_smollm2).
set -euo pipefail
. "$(dirname "$0")/common.sh"
usage "$@"
if [ -n "${SMOLLM2:-}" ]; then
    [ -e "$SMOLLM2" ] || die "SMOLLM2=$SMOLLM2: no such file or folder; name the GGUF file or folder of SmolLM2-135M-Instruct"
    SMOLLM2=$(realpath -- "$SMOLLM2")
fi
cd "$(dirname "$0")/.."
export GPUS=${GPUS:-1} TRAINER=${TRAINER:-./train_gpt_nsa}
MICRO_TOKENS=${MICRO_TOKENS:-65536}

# Each model, or "64k" for a run that continues another one: context and flags.
declare -A MODELS=(
    [97m]="16384 -e gpt-124m -theta 1e6 -l 6e-4"
    [350m]="16384 -e gpt-124m -theta 1e6 -l 3e-4 -layers 24 -channels 1024 -hidden 3328 -heads 16 -kv-heads 4"
    [64k]="65536 -l 1e-4"
    [smollm2-8k]="8192 -e data/smollm2/full.bin -l 1e-4"
    [smollm2-16k]="16384 -e data/smollm2/full.bin -l 1e-4"
)

# Each text, in data/TEXT: flags of data/bpe. All training tokens are in one shard, because the trainer mixes the samples of
# a shard alone. A quarter is every fourth document, with the same held-out ones.
declare -A TEXTS=(
    [linux]="--val-documents 8"
    [linux_quarter]="--val-documents 8 --every 4"
    [linux_smollm2]="--val-documents 2 --every 4"
)

# name                 model       text          tokens  flags
mapfile -t TABLE <<'END'
nsa-1                  97m         linux          200M  -attn nsa -seed 1
full-1                 97m         linux          200M  -attn full -seed 1
window-1               97m         linux          200M  -attn window -seed 1
nsa-64k                nsa-1       linux           20M  -attn nsa -seed 1 -u 15
full-64k               full-1      linux           20M  -attn full -seed 1 -u 15
window-64k             window-1    linux           20M  -attn window -seed 1 -u 15
nsa-2                  97m         linux          200M  -attn nsa -seed 2
full-2                 97m         linux          200M  -attn full -seed 2
window-2               97m         linux          200M  -attn window -seed 2
window-3               97m         linux          200M  -attn window -seed 3
nsa-3                  97m         linux          200M  -attn nsa -seed 3
full-3                 97m         linux          200M  -attn full -seed 3
full-x2-1              97m         linux          200M  -attn full -seed 1 -l 1.2e-3
full-x2-2              97m         linux          200M  -attn full -seed 2 -l 1.2e-3
full-x2-64k            full-x2-1   linux           20M  -attn full -seed 1 -u 15
full-x3-1              97m         linux          200M  -attn full -seed 1 -l 1.8e-3
full-x3-2              97m         linux          200M  -attn full -seed 2 -l 1.8e-3
full-x6-1              97m         linux          200M  -attn full -seed 1 -l 3.6e-3
nsa-half-1             97m         linux          200M  -attn nsa -seed 1 -l 3e-4
nsa-x2-1               97m         linux          200M  -attn nsa -seed 1 -l 1.2e-3
nsa-x3-1               97m         linux          200M  -attn nsa -seed 1 -l 1.8e-3
window-half-1          97m         linux          200M  -attn window -seed 1 -l 3e-4
window-x2-1            97m         linux          200M  -attn window -seed 1 -l 1.2e-3
window-x3-1            97m         linux          200M  -attn window -seed 1 -l 1.8e-3
long-full-x2           97m         linux          400M  -attn full -seed 1 -l 1.2e-3 -v 200 -n 500
long-nsa               97m         linux          400M  -attn nsa -seed 1 -v 200 -n 500
nsa-fp8-1              97m         linux          200M  -attn nsa -seed 1 -matmul fp8
graded-1               97m         linux          200M  -attn nsa -seed 1 -gate-bias -2,0,2
graded-2               97m         linux          200M  -attn nsa -seed 2 -gate-bias -2,0,2
graded-3               97m         linux          200M  -attn nsa -seed 3 -gate-bias -2,0,2
graded-64k             graded-1    linux           20M  -attn nsa -seed 1 -u 15
graded-mean-1          97m         linux          200M  -attn nsa -seed 1 -gate-bias -2,0,2 -phi mean
graded-fp8-1           97m         linux          200M  -attn nsa -seed 1 -gate-bias -2,0,2 -matmul fp8
zero-1                 97m         linux          200M  -attn nsa -seed 1 -gate-bias 0,0,0
zero-2                 97m         linux          200M  -attn nsa -seed 2 -gate-bias 0,0,0
zero-64k               zero-1      linux           20M  -attn nsa -seed 1 -u 15
50m-full-1             97m         linux_quarter   50M  -attn full -seed 1
50m-full-2             97m         linux_quarter   50M  -attn full -seed 2
50m-full-x3-1          97m         linux_quarter   50M  -attn full -seed 1 -l 1.8e-3
50m-full-warm-1        97m         linux_quarter   50M  -attn full -seed 1 -u 38
50m-full-fp8-1         97m         linux_quarter   50M  -attn full -seed 1 -matmul fp8
50m-window-1           97m         linux_quarter   50M  -attn window -seed 1
50m-nsa-1              97m         linux_quarter   50M  -attn nsa -seed 1
50m-nsa-2              97m         linux_quarter   50M  -attn nsa -seed 2
50m-nsa-hybrid-1       97m         linux_quarter   50M  -attn nsa -seed 1 -full-every 4
50m-graded-1           97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias -2,0,2
50m-graded-2           97m         linux_quarter   50M  -attn nsa -seed 2 -gate-bias -2,0,2
50m-graded-fp8-1       97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias -2,0,2 -matmul fp8
50m-graded-fp8-2       97m         linux_quarter   50M  -attn nsa -seed 2 -gate-bias -2,0,2 -matmul fp8
50m-graded-hybrid-1    97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias -2,0,2 -full-every 4
50m-graded-mean-1      97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias -2,0,2 -phi mean
50m-zero-1             97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias 0,0,0
50m-zero-2             97m         linux_quarter   50M  -attn nsa -seed 2 -gate-bias 0,0,0
50m-zero-fp8-1         97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias 0,0,0 -matmul fp8
50m-zero-fp8-2         97m         linux_quarter   50M  -attn nsa -seed 2 -gate-bias 0,0,0 -matmul fp8
50m-zero-x3-1          97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias 0,0,0 -l 1.8e-3
50m-zero-x3-fp8-1      97m         linux_quarter   50M  -attn nsa -seed 1 -gate-bias 0,0,0 -l 1.8e-3 -matmul fp8
350m-zero-30m          350m        linux_quarter   30M  -attn nsa -seed 1 -gate-bias 0,0,0
350m-zero-30m-fp8      350m        linux_quarter   30M  -attn nsa -seed 1 -gate-bias 0,0,0 -matmul fp8
350m-graded            350m        linux          100M  -attn nsa -seed 1 -gate-bias -2,0,2
350m-nsa               350m        linux          100M  -attn nsa -seed 1
350m-full              350m        linux          100M  -attn full -seed 1
350m-window            350m        linux          100M  -attn window -seed 1
350m-nsa-x3            350m        linux          100M  -attn nsa -seed 1 -l 9e-4
350m-window-x3         350m        linux          100M  -attn window -seed 1 -l 9e-4
smollm2-8k-full        smollm2-8k  linux_smollm2   50M  -attn full -seed 1 -u 8 -v 8
smollm2-8k-nsa         smollm2-8k  linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8
smollm2-8k-open32      smollm2-8k  linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8 -topk 32 -gate-bias -8,4,-4
smollm2-8k-open64      smollm2-8k  linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8 -cmp-len 16 -cmp-stride 8 -block 32 -topk 64 -local-blocks 4 -gate-bias -8,4,-4
smollm2-16k-full       smollm2-16k linux_smollm2   50M  -attn full -seed 1 -u 8 -v 8
smollm2-16k-nsa        smollm2-16k linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8
smollm2-16k-open32     smollm2-16k linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8 -topk 32 -gate-bias -8,4,-4
smollm2-16k-open4k     smollm2-16k linux_smollm2   50M  -attn nsa -seed 1 -u 8 -v 8 -topk 64 -gate-bias -8,4,-4
END

# has_shards TEXT: whether its shards exist
has_shards() {
    local shards=("data/$1"/linux_train_*.bin "data/$1"/linux_val_*.bin)
    [ -f "${shards[0]}" ] && [ -f "${shards[-1]}" ]
}

# has_smollm2: whether there is SmolLM2, or all that is made of it
has_smollm2() { [ -n "${SMOLLM2:-}" ] || { has_shards linux_smollm2 && [ -f data/smollm2/full.bin ]; }; }

# make_text TEXT: makes the shards, if there are none, and SmolLM2's checkpoint for its text. Documents have 400 KB and more,
# so that most samples of 64K tokens lie in one document. Some whole documents are held out.
make_text() {
    local documents=data/corpora/linux_c tokenizer=data/linux_bpe/tokenizer.json flags
    if [ "$1" = linux_smollm2 ]; then
        tokenizer=${SMOLLM2:-}
        [ -f data/smollm2/full.bin ] || run scripts/from_hf.py "$SMOLLM2" -o data/smollm2/full.bin
    fi
    ! has_shards "$1" || return 0
    # data/bpe's error, before the text is written, if its packages are missing
    PYTHONPATH=data python3 -c 'import shards; shards.run_main(lambda: __import__("vocab"))'
    [ -d $documents ] || run data/corpus -o $documents --suffix .c --min-bytes 400000
    [ -e "$tokenizer" ] || run data/bpe -o data/linux_bpe --name linux --train-vocab 16384 $documents/*/{fs,kernel,mm,net}
    read -ra flags <<<"${TEXTS[$1]}"
    run data/bpe -o "data/$1" --name linux --tokenizer "$tokenizer" "${flags[@]}" --min-tokens 131072 --shard 2000000000 \
        $documents
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

# start_of MODEL: the checkpoint of the run MODEL that another one continues; nothing if it is one of MODELS
start_of() {
    local tokens
    [ -z "${MODELS[$1]:-}" ] || return 0
    tokens=$(printf '%s\n' "${TABLE[@]}" | awk -v name="$1" '$1 == name { print $4 }')
    checkpoint "$1" "$(steps "${tokens%M}")"
}

# need_start NAME MODEL: the checkpoint that the run continues exists, if it continues one
need_start() {
    local start
    start=$(start_of "$2")
    [ -z "$start" ] || [ -f "$start" ] || die "$1 continues $2, which has no $start; run scripts/learning.sh $2"
}

# train NAME MODEL TEXT TOKENS FLAGS: trains a run
train() {
    local name=$1 model=$2 steps start settings share=() cp batch out=log/learning/$1
    steps=$(steps "${4%M}")
    if is_complete "$name" "$steps"; then
        echo "== $name: complete"
        is_continued "$name" || rm -f "$out"/ckpt_*.bin # of a run that was killed at its end
        return
    fi
    (need_start "$name" "$model") || return # the run before it has failed; others go on
    start=$(start_of "$model")
    [ -z "$start" ] || model=64k
    read -ra settings <<<"${MODELS[$model]}"
    cp=$((GPUS * settings[0] / 131072)) # GPUs that share a sequence, where there are more GPUs than sequences in a step
    [ $cp -le 1 ] || share=(-cp "$cp")
    batch=$(((MICRO_TOKENS * GPUS < 131072 ? MICRO_TOKENS : 131072 / GPUS) / settings[0])) # sequences at a time
    [ $batch -ge 1 ] || batch=1
    echo "== $name"
    run scripts/gpus_host.sh ${start:+-e "$start"} -t "${settings[@]}" -b $batch -d 131072 "${share[@]}" -x "$steps" \
        -u 100 -k cosine -q 0.1 -v $((steps < 700 ? 50 : 100)) -m 0 -n 100 -nk 1 -o "$out" -y 1 \
        -i "data/$3/linux_train_*.bin" -j "data/$3/linux_val_*.bin" "${@:5}" || return
    is_continued "$name" || rm -f "$out"/ckpt_*.bin
}

# train_on GPU,... LANES NAME MODEL TEXT TOKENS FLAGS: trains a run on these GPUs, while LANES runs train in all
train_on() {
    set +m
    pids=() signals=() # those of the runs beside it
    export CUDA_VISIBLE_DEVICES=$1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + GPUS * $2 - 1) / (GPUS * $2)))}
    mkdir -p "log/learning/$3"
    exec >>"log/learning/$3/output.txt" 2>&1
    train "${@:3}"
}

# train_at_once LANES: trains the selected runs, so many at a time. One that continues another one waits for it.
train_at_once() {
    local gpus own lane=() i line name running=1
    local -A state=() pid=()
    mapfile -t gpus < <(gpu_list)
    for line in "${selected[@]}"; do
        read -ra run <<<"$line"
        if is_complete "${run[0]}" "$(steps "${run[3]%M}")"; then train "${run[@]}"
        else state[${run[0]}]=waiting; fi
    done
    while [ $running -gt 0 ]; do
        running=0
        for ((i = 0; i < $1; i++)); do
            name=${lane[i]:-}
            if [ -n "$name" ] && kill -0 "${pid[$name]}" 2>/dev/null; then
                running=$((running + 1))
                continue
            fi
            if [ -n "$name" ]; then
                lane[i]="" state[$name]=ended
                if wait_for "${pid[$name]}"; then echo "== $name: complete"
                elif [ ${#signals[@]} -gt 0 ]; then echo "== $name: stopped"
                else echo "== $name: failed; log/learning/$name/output.txt says why" && failed="$failed $name"; fi
            fi
            [ ${#signals[@]} -eq 0 ] || continue
            for line in "${selected[@]}"; do
                read -ra run <<<"$line"
                name=${run[0]}
                [[ ${state[$name]:-} = waiting && ${state[${run[1]}]:-ended} = ended ]] || continue
                printf -v own '%s,' "${gpus[@]:i*GPUS:GPUS}"
                echo "== $name on GPU ${own%,}"
                start train_on "${own%,}" "$1" "${run[@]}"
                lane[i]=$name state[$name]=running pid[$name]=$! running=$((running + 1))
                break
            done
        done
        sleep 1 || true # a signal ends it
    done
}

names=$(printf '%s\n' "${TABLE[@]}" | awk '{ print $1 }')
[ $# -gt 0 ] || set -- $(has_smollm2 && echo "$names" || grep -v ^smollm2 <<<"$names")
for name; do
    grep -qxF -e "$name" <<<"$names" || die "$name: no such run; there are" $names
    [[ $name != smollm2* ]] || has_smollm2 || die "$name continues SmolLM2-135M-Instruct;" \
        "scripts/hf.md has the commands that get it; name its GGUF file or folder in SMOLLM2"
done
whole_numbers GPUS MICRO_TOKENS
[ $((131072 % GPUS)) -eq 0 ] || die "GPUS=$GPUS: a step of 131,072 tokens must be a multiple of it; take 1, 2, 4 or 8"
[ $((131072 % MICRO_TOKENS)) -eq 0 ] || die "MICRO_TOKENS=$MICRO_TOKENS: a step of 131,072 tokens must be a multiple of it; take 16384"
need_trainer
selected=()
for line in "${TABLE[@]}"; do
    read -ra run <<<"$line"
    grep -qxF -e "${run[0]}" <<<"$(printf '%s\n' "$@")" || continue
    # a run that continues another one needs its checkpoint, unless the other one is trained before or it is complete
    grep -qxF -e "${run[1]}" <<<"$(printf '%s\n' "$@")" || is_complete "${run[0]}" "$(steps "${run[3]%M}")" ||
        need_start "${run[0]}" "${run[1]}"
    selected+=("$line")
done
for line in "${selected[@]}"; do
    read -ra run <<<"$line"
    make_text "${run[2]}"
done
failed="" lanes=$(($(all_gpus) / GPUS))
if [ $lanes -gt 1 ] && [ ${#selected[@]} -gt 1 ]; then
    train_at_once $lanes
else
    for line in "${selected[@]}"; do
        read -ra run <<<"$line"
        train "${run[@]}" || failed="$failed ${run[0]}"
    done
fi
[ -z "$failed" ] || echo "== these runs failed:$failed"
[ -z "$failed" ] && [ ${#signals[@]} -eq 0 ] || exit 1
