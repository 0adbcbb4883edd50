#!/usr/bin/env bash
# headers.sh: checks that every header for plain C compiles on its own, as C11 and, if there is a C++ compiler,
# as C++17.
set -u
cd "$(dirname "$0")/../.." || exit 1
passed=0 failed=0 skipped=0
for header in llmc/*.h fsa/fsa.h fsa/reference.h train_gpt_nsa.h; do
    for language in "${CC:-cc} -std=c11 -x c" "${CXX:-c++} -std=c++17 -x c++"; do
        if ! command -v "${language%% *}" >/dev/null; then
            skipped=$((skipped + 1))
        elif printf 'typedef float real;\n#include "%s"\n' "$header" |
            { [ "$header" = train_gpt_nsa.h ] && tail -n 1 || cat; } |
            $language -Wall -Wextra -Werror -Wno-unused-function -Wno-unknown-pragmas -fsyntax-only -I. -
        then
            passed=$((passed + 1))
        else
            failed=$((failed + 1)) && echo "FAILED $header: $language"
        fi
    done
done
[ $skipped -eq 0 ] || echo "skipped: no C++ compiler"
echo "headers: $passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
