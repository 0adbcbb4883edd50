// test.h: counts checks. A test program includes it once, calls CHECK and CHECK_CLOSE inside test
// functions, and ends main with `return test_end("name");`, whose last line dev/test/run.sh sums up.
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int test_passed, test_failed, test_skipped;

// A check with a message in printf's form; only failures are printed.
#define CHECK(condition, ...)                                                       \
    do {                                                                            \
        if (condition) {                                                            \
            test_passed++;                                                          \
        } else {                                                                    \
            test_failed++;                                                          \
            printf("FAILED %s:%d: %s: ", __FILE__, __LINE__, #condition);           \
            printf(__VA_ARGS__);                                                    \
            printf("\n");                                                           \
        }                                                                           \
    } while (0)

// Skips with the reason in printf's form.
#define SKIP(...)                \
    do {                         \
        test_skipped++;          \
        printf("skipped: ");     \
        printf(__VA_ARGS__);     \
        printf("\n");            \
    } while (0)

static inline int test_end(const char *name) {
    printf("%s: %d passed, %d failed, %d skipped\n", name, test_passed, test_failed, test_skipped);
    return test_failed != 0;
}
#endif
