// test.h: counts checks. A test program includes it once, calls CHECK and SKIP, and ends main with
// `return test_end("name");`. dev/test/run.sh adds up the counts that test_end prints in the last line.
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed, test_skipped;

// Counts a check as passed or failed. A failed check prints the message, in printf's format. With
// FIRST_FAILURE in the environment it ends the program, since dev/test/faults.sh need not know about more.
#define CHECK(condition, ...)                                                                                \
    do {                                                                                                     \
        if (condition) {                                                                                     \
            test_passed++;                                                                                   \
        } else {                                                                                             \
            test_failed++;                                                                                   \
            printf("FAILED %s:%d: %s: ", __FILE__, __LINE__, #condition);                                    \
            printf(__VA_ARGS__);                                                                             \
            printf("\n");                                                                                    \
            if (getenv("FIRST_FAILURE")) exit(1);                                                            \
        }                                                                                                    \
    } while (0)

// Counts a skipped check and prints the reason, in printf's format.
#define SKIP(...)                                                                                            \
    do {                                                                                                     \
        test_skipped++;                                                                                      \
        printf("skipped: ");                                                                                 \
        printf(__VA_ARGS__);                                                                                 \
        printf("\n");                                                                                        \
    } while (0)

// Prints the counts in one line. Returns the exit code: 1 if a check failed, else 0.
static inline int test_end(const char *name) {
    printf("%s: %d passed, %d failed, %d skipped\n", name, test_passed, test_failed, test_skipped);
    return test_failed != 0;
}
#endif
