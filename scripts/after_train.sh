#!/usr/bin/env bash
# after_train.sh TASK TRAINER: the last lines of make train: what was run, read from its folder and its log, and what can
# be run next. Environment, set by make: ARGS (flags of the run; they may name another folder), PROMPT, BUILD.
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; exit ;; esac
[ $# -eq 2 ] || { echo "error: after_train.sh TASK TRAINER: two arguments, not $#; -h explains them" >&2; exit 1; }
task=$1 trainer=$2 out=log/$1 last=
[[ $trainer == */* ]] || trainer=./$trainer
for word in ${ARGS//=/ }; do
    case $last in -o | --o | -output | --output) out=$word ;; esac
    last=$word
done
ckpt=$(ls "$out"/ckpt_*.bin 2>/dev/null | tail -n 1)
[ -n "$ckpt" ] || exit 0
attn=$(sed -n 's/.*"model":.*"attn":"\([a-z]*\)".*/\1/p' "$out/log.jsonl" | tail -n 1)
step=$(basename "$ckpt" .bin | sed 's/ckpt_0*//')
args=$(printf '%s' "${ARGS:-}" | sed "s/'/'\\\\''/g")
[ "$task" = recall ] && preset=tiny || preset=shakespeare
cat <<END

This was $out: attention $attn, $step steps. The log is $out/log.jsonl, the newest checkpoint $ckpt. Next:
  sample:             $trainer -e $ckpt -sample 1 -temp 0 -g 24 -prompt '$PROMPT'
  go on training:     make train ARGS='${args:+$args }-x $((step + 800))'
  plot:               python3 scripts/plot_log.py $out -o $out/log.png    # needs pip install matplotlib
  train on your text: $BUILD/text -o data/mytext -name mytext README.md fsa llmc && $trainer -e $preset -i 'data/mytext/mytext_train_*.bin' -j 'data/mytext/mytext_val_*.bin' -o log/mytext -y 1 -t 256 -x 100 -v 50 -s 100
END
