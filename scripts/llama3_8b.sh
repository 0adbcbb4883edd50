#!/usr/bin/env bash
# llama3_8b.sh: times training steps of Llama 3 8B, all 32 layers, on all GPUs of this host: 32K, 64K and 128K
# tokens, native sparse and full attention, random weights and random tokens. For each it takes the fewest GPUs
# per sequence (-cp), then the least recomputation (-r), then the lowest ZeRO stage (-z) that memory allows, and
# prints the arithmetic. A GPU gets at most 64K tokens, so that all runs together take less than ten minutes on four
# GPUs. The times of each part are printed and appended to dev/results.
#   make && scripts/llama3_8b.sh
#   DRY=1 GPUS=8 MEMORY=81559 scripts/llama3_8b.sh            # the arithmetic alone, also without a GPU
# Environment: LENGTHS ("32768 65536 131072"), MODES ("nsa full"), MATMUL (bf16; fp8), STEPS (3), GPUS (number of
# GPUs; default all), MEMORY (MiB of a GPU; default the smallest of this host's), TRAINER (./train_gpt_nsa), DRY.
set -eu
. "$(dirname "$0")/common.sh"
usage "$@"
no_arguments "$@"
cd "$(dirname "$0")/.."
LENGTHS=${LENGTHS:-"32768 65536 131072"} MODES=${MODES:-"nsa full"} MATMUL=${MATMUL:-bf16} STEPS=${STEPS:-3}
TRAINER=${TRAINER:-./train_gpt_nsa}
GPUS=${GPUS:-$(all_gpus)}
MEMORY=${MEMORY:-$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n | head -1)}
[ "$GPUS" != 0 ] && [ -n "$MEMORY" ] || die "no GPU found; nvidia-smi -L must list one, or set GPUS, MEMORY and DRY=1"
whole_numbers GPUS MEMORY LENGTHS STEPS
attention_modes
[[ $MATMUL =~ ^(bf16|fp8)$ ]] || die "MATMUL=$MATMUL: must be bf16 or fp8"
[ -n "${DRY:-}" ] || need_trainer

# choose MODE TOKENS: prints the arithmetic, and on its last line the flags; nothing there if no flags fit. It counts
# what the trainer allocates, in MiB: 16-bit and fp32 weights, AdamW's two moments, gradients (with -z 2 also two
# buffers of a layer and one of the LM head), the activations that a layer keeps, and scratch: what one layer after
# another uses, and the logits of 4,096 tokens. fp8: two 8-bit copies of the layers' weights, what norms, attention and
# SwiGLU keep in 8 bits, and the operands of a weight gradient and the gradients in 8 bits.
choose() {
    awk -v mode="$1" -v t="$2" -v fp8="$([ "$MATMUL" != fp8 ] || echo 1)" -v N="$GPUS" -v memory="$MEMORY" '
    BEGIN {
        M = 1048576; L = 32; C = 4096; H = 14336; V = 128256; q = 4096; kv = 1024
        gates = mode == "nsa" ? 96 : 0
        layer = C * (q + 2 * kv + gates) + q * C + 3 * C * H + (mode == "nsa" ? 2 * 8 * 32 * 128 * 128 : 0)
        P = 2 * V * C + L * layer
        # bytes of a token: qkv and gates, the attention with its output (nsa: three, and rotated q and k), residual
        # stream, gate and up; without -r 1 or -r 2 also two norms and swiglu
        kept = 2 * (q + 2 * kv + gates) + (mode == "nsa" ? 2 * (4 * q + kv) + 500 : 2 * q) + 2 * C + 4 * H
        cheap = fp8 ? 2 * C + q + H + (mode == "nsa" ? 2 * C : 0) : 2 * (2 * C + H)
        available = memory - 3072 # CUDA, NCCL
        printf "%s, %dK tokens'"$([ "$MATMUL" != fp8 ] || echo ", fp8")"': %.2fB parameters, GPUs: %d of %d MiB\n", mode, t / 1024, P / 1e9, N, memory
        for (cp = 1; cp <= N; cp *= 2) for (r = 0; r <= 2; r++) for (z = N > 1 ? 1 : 0; z <= (N > 1 ? 2 : 0); z++) {
            n = t / cp
            if (N % cp || n > 65536) continue
            weights = 2 * P + 12 * P / N + (fp8 ? 2 * L * (C * (q + 2 * kv) + q * C + 3 * C * H) : 0)
            gradients = z == 2 ? 4 * P / N + 4 * (2 * layer + V * C) : 4 * P
            activations = n * ((L + 1) * 2 * C + (r == 2 ? kept : L * kept) + (r == 0 ? L * cheap : cheap))
            scratch = 1300 * M + n * (80000 + (fp8 ? C + 5 * H : 0)) + (cp > 1 ? t * 20000 : 0) # with -cp also gathered keys and values
            total = (weights + gradients + activations + scratch) / M
            line = sprintf("-cp %d -r %d -z %d", cp, r, z)
            if (r == 2 || total <= available)
                printf "  %s: weights and AdamW %.0f + gradients %.0f + activations %.0f + scratch %.0f = %.0f MiB, %s\n", line,
                    weights / M, gradients / M, activations / M, scratch / M, total, total <= available ? "fits" : "too much"
            if (total <= available) { print line; exit }
        }
    }'
}

failed=
for t in $LENGTHS; do
    for mode in $MODES; do
        arithmetic=$(choose "$mode" "$t")
        flags=$(echo "$arithmetic" | sed -n '$s/^-/-/p')
        echo "$arithmetic" | sed '/^-/d'
        [ -n "$flags" ] || { echo "  no flags fit: not run"; continue; }
        [ -z "${DRY:-}" ] || continue
        cp=$(echo "$flags" | cut -d' ' -f2)
        GPUS=$GPUS run scripts/gpus_host.sh -e llama3-8b \
            -attn "$mode" -matmul "$MATMUL" -t "$t" -b 1 -d $((t * GPUS / cp)) $flags -profile "$STEPS" || failed="$failed $mode/$t"
    done
done
[ -z "$failed" ] || { echo "== these runs failed:$failed"; exit 1; }
