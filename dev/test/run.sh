#!/usr/bin/env bash
# run.sh TEST...: runs these test commands, LANES at a time in the order given, and prints a line when each ends, with
# its time, its program and the counts of its last line ("...: N passed, N failed, N skipped"). The output of a test that
# fails follows its line. The last line has the sums. A test without a summary line counts as one failure.
#   LANES (2): tests that run at the same time. CORES (nproc): each test has CORES / LANES threads, but at least two.
set -u
LANES=${LANES:-2} CORES=${CORES:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES >= 2 * LANES ? CORES / LANES : 2))}
export OMP_WAIT_POLICY=passive # threads that wait for others leave the cores to the other lanes
T=$(mktemp -d)
trap 'kill "${watcher:-}" 2>/dev/null; rm -rf "$T"' EXIT
passed=0 failed=0 skipped=0 ended=0

seconds() { awk -v ms="$1" 'BEGIN { printf "%.1f s", ms / 1000 }'; }
now() { date +%s%3N; }
begin=$(now)

# run INDEX COMMAND: writes the output and then, in one step, the exit code and the time.
run() {
    local start code
    start=$(now)
    name_of "$2" >"$T/$1.name"
    $2 >"$T/$1.out" 2>&1 </dev/null
    code=$?
    rm "$T/$1.name"
    echo "$code $(($(now) - start)) $2" >"$T/$1.tmp" && mv "$T/$1.tmp" "$T/$1.done"
}

# name_of COMMAND: the program (the first word with a folder) without folder and suffix, and the kernels that FSA_KERNELS
# selects. A command without a program: what it echoes.
name_of() {
    local name kernels=
    [[ $1 == *FSA_KERNELS=* ]] && kernels=" ($(expr "$1" : '.*FSA_KERNELS=\([a-z0-9]*\)'))"
    name=$(tr ' ' '\n' <<<"$1" | grep -m 1 /) || name=$(expr "$1" : 'echo \([^:]*\)')
    name=${name##*/}
    echo "${name%.*}$kernels"
}

# Prints the tests that have ended since the last call.
report() {
    local file code ms command last ok
    for file in "$T"/*.done; do
        [ -e "$file" ] || continue
        read -r code ms command <"$file"
        ended=$((ended + 1)) last=$(tail -n 1 "${file%.done}.out") ok=1
        if [[ $last =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)?$ ]]; then
            passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2]))
            skipped=$((skipped + ${BASH_REMATCH[4]:-0}))
            last="${BASH_REMATCH[1]} passed, ${BASH_REMATCH[2]} failed, ${BASH_REMATCH[4]:-0} skipped"
            if [ "${BASH_REMATCH[2]}" -ne 0 ]; then ok=0
            elif [ "$code" -ne 0 ]; then ok=0 failed=$((failed + 1)) last="$last, but exit code $code"; fi
        else
            ok=0 failed=$((failed + 1)) last="exit code $code, without a summary line"
        fi
        printf '%s %8s  %s\n' "$([ $ok -eq 1 ] && echo "ok    " || echo "FAILED")" "$(seconds "$ms")" "[$ended/$count] $(name_of "$command"): $last"
        if [ $ok -eq 1 ]; then grep '^skipped: ' "${file%.done}.out" | sed 's/^/                   /'
        else echo "---- $command"; cat "${file%.done}.out"; echo "----"; fi
        rm "$file" "${file%.done}.out"
    done
}

# Names the tests that run, once a minute, while none ends.
watch() {
    local before= after
    while sleep 60 >/dev/null 2>&1; do # else it would hold the output open after the end
        after=$(cat "$T"/*.name 2>/dev/null | paste -sd,)
        [ -z "$after" ] || [ "$after" != "$before" ] || printf 'running           %s\n' "${after//,/, }"
        before=$after
    done
}
watch &
watcher=$!
disown $watcher # it is no job to wait for

count=$#
echo "$count tests, $LANES at a time, $OMP_NUM_THREADS threads each"
index=0
for test in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$LANES" ]; do wait -n; report; done
    index=$((index + 1))
    run "$(printf %03d $index)" "$test" &
done
while [ -n "$(jobs -rp)" ]; do wait -n; report; done
wait
report
echo "$passed passed, $failed failed, $skipped skipped in $(seconds $(($(now) - begin)))"
[ $failed -eq 0 ] && [ $ended -eq $count ]
