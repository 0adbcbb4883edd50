// commit.c: the commit that was built. This file alone is compiled again after a commit.
#include "commit.h"

const char *build_commit(void) {
    return LLMC_COMMIT;
}
