# checks.sh: functions of the command line tests. Source it with PROGRAM set to the tested program. It changes to a new
# empty folder, $T, which is removed when the script exits.
BUILD=$(realpath "${BUILD:-build}") PROGRAM=$(realpath "$PROGRAM")
T=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$T"' EXIT
cd "$T" || exit 1
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED $(basename "$0"): $*"; [ -z "${FIRST_FAILURE:-}" ] || exit 1; }
check() { if eval "$1"; then ok; else bad "$2"; fi; }
finish_test() { echo "$(basename "$0" .sh): $passed passed, $failed failed, $skipped skipped"; [ $failed -eq 0 ]; }

# Runs the program; its output is in the files out and err, its exit code in $code.
run() { "$PROGRAM" "$@" >out 2>err; code=$?; return $code; }

# expect_error TEXT FLAG...: the program must exit with code 1 and one line on stderr that contains TEXT, and change no
# file.
expect_error() {
    local want=$1 before after
    shift
    before=$(ls -lR --time-style=+%s "$T" | cksum)
    (cd "$T" && "$PROGRAM" "$@" >"$T.out" 2>"$T.err")
    local code=$?
    after=$(ls -lR --time-style=+%s "$T" | cksum)
    if [ $code -ne 1 ]; then bad "code $code, not 1: $* ($(head -c 300 "$T.err"))"
    elif [ "$(wc -l <"$T.err")" -ne 1 ]; then bad "not one line on stderr: $*: $(head -c 600 "$T.err")"
    elif ! grep -qF -- "$want" "$T.err"; then bad "'$want' is not in: $(cat "$T.err")"
    elif [ "$before" != "$after" ]; then bad "files changed: $*"
    else ok; fi
    rm -f "$T.out" "$T.err"
}

# near A B LIMIT: returns whether |A - B| < LIMIT * A.
near() { awk -v a="$1" -v b="$2" -v limit="$3" 'BEGIN { exit !(a > 0 && b > 0 && (a - b) ^ 2 < (limit * a) ^ 2) }'; }

# same_numbers A B LIMIT: returns whether two files have the same words, numbers up to |a - b| <= LIMIT * |a|.
same_numbers() {
    paste -d '\n' "$1" "$2" | awk -v limit="$3" 'NR % 2 { n = split($0, a); next }
        NF != n { exit 1 }
        { for (i = 1; i <= n; i++) if (a[i] != $i && !(a[i] + 0 != 0 && (a[i] - $i) ^ 2 <= (limit * a[i]) ^ 2)) exit 1 }'
}

# updates DIR BETA1 BETA2 EPS WEIGHT_DECAY: prints the norm and the learning rate of each step's update, as the checkpoints
# of a run with -n 1 have them. Stops with an error if one is not AdamW's next step after the one before.
updates() {
    local before=new after
    for after in $(find "$1" -name 'ckpt_*' | sort); do
        "$BUILD/adamw_step" $before "$after" "${@:2}" || return 1
        before=$after
    done | sed 's/ tokens.*norm/ norm/'
}

# logged DIR CLIP: prints the same from the log, with the norms clipped.
logged() {
    sed -n 's/.*"step":\([0-9]*\),"loss":[^,]*,"lr":\([^,]*\),"norm":\([^,]*\),.*/\1 \2 \3/p' "$1/log.jsonl" |
        awk -v clip="$2" '{ printf "step %d norm %.6g lr %.6g\n", $1, (clip > 0 && $3 > clip ? clip : $3), $2 }'
}

# skipped_steps_change_nothing DIR: returns whether err has warnings about skipped steps, and the checkpoints of these steps,
# of a run with -n 1, have the parameters of the checkpoints before.
skipped_steps_change_nothing() {
    local steps step
    steps=$(sed -n 's/^warning: step \([0-9]*\): .*skipped.*/\1/p' err)
    [ -n "$steps" ] || return 1
    for step in $steps; do
        cmp -s -i 4096 "$1/$(printf 'ckpt_%08d.bin' $((step - 1)))" "$1/$(printf 'ckpt_%08d.bin' "$step")" || return 1
    done
}

# int32 N...: prints numbers as little-endian int32.
int32() {
    local n
    for n; do printf "\\x$(printf %02x $((n & 255)))\\x$(printf %02x $((n >> 8 & 255)))\\x$(printf %02x $((n >> 16 & 255)))\\x$(printf %02x $((n >> 24 & 255)))"; done
}

# make_eval_files VOCABULARY: writes mc.bin, 6 questions of 3 choices, and needle.bin, 6 needles, of tokens below 60.
make_eval_files() {
    local i c
    for kind in 0 1; do
        int32 20260803 1 $kind 6 "$1" 1
        head -c 1000 /dev/zero
        for i in 1 2 3 4 5 6; do
            int32 $((kind ? 0 : i % 3)) $((kind ? 1 : 3)) $((i * 100)) 4 $((i * 7)) $((i * 5)) $((i * 9)) $((i * 3))
            for c in $(seq $((kind ? 1 : 3))); do int32 $c 2 $((i * 8 + c)) $((c * 13)); done
        done
    done >eval_files
    head -c $((1024 + 4 * 6 * 20)) eval_files >mc.bin
    tail -c +$((1025 + 4 * 6 * 20)) eval_files >needle.bin
}
