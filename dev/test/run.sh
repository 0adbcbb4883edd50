#!/usr/bin/env bash
# Runs the test programs named as arguments and the tests of the command line, and sums up their last
# lines ("name: N passed, N failed, N skipped"). A program that ends without one has failed.
set -u
passed=0 failed=0 skipped=0
if command -v python3 >/dev/null 2>&1; then
    set -- "$@" "python3 dev/test/test_bpe.py" "python3 dev/test/test_compare_sass.py"
else
    skipped=1
    echo "skipped: data/bpe, data/hub, data/get and dev/compare_sass.py, for want of python3"
fi
for program in "$@" "bash dev/test/headers.sh" "bash dev/test/cli.sh"; do
    output=$($program 2>&1)
    code=$?
    echo "$output"
    last=$(echo "$output" | tail -n 1)
    if [[ $last =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed(,\ ([0-9]+)\ skipped)?$ ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2])) skipped=$((skipped + ${BASH_REMATCH[4]:-0}))
        if [ $code -ne 0 ] && [ "${BASH_REMATCH[2]}" -eq 0 ]; then failed=$((failed + 1)); fi
    else
        echo "FAILED $program: ended with code $code before its last line"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
