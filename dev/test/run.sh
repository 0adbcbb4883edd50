#!/usr/bin/env bash
# run.sh COMMAND...: runs these test programs, the Python tests, headers.sh and cli.sh. Adds up their last lines
# ("name: N passed, N failed, N skipped"). A program without such a line counts as one failure.
set -u
passed=0 failed=0 skipped=0
if command -v python3 >/dev/null 2>&1; then
    set -- "$@" "python3 dev/test/test_bpe.py" "python3 dev/test/test_compare_sass.py" "python3 dev/test/test_performance.py"
else
    skipped=1
    echo "skipped: data/bpe, data/hub, data/get, dev/compare_sass.py and dev/results/performance.py need python3"
fi
for program in "$@" "bash dev/test/headers.sh" "bash dev/test/cli.sh"; do
    output=$($program 2>&1)
    code=$?
    echo "$output"
    last=$(echo "$output" | tail -n 1)
    if [[ $last =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)?$ ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2]))
        skipped=$((skipped + ${BASH_REMATCH[4]:-0}))
        if [ $code -ne 0 ] && [ "${BASH_REMATCH[2]}" -eq 0 ]; then failed=$((failed + 1)); fi
    else
        echo "FAILED $program: ended with code $code and without a summary line"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
