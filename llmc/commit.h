// commit.h: the commit that was built.
#ifndef LLMC_COMMIT_H
#define LLMC_COMMIT_H

#ifdef __cplusplus
extern "C" {
#endif

// Returns what `git describe --always --dirty` printed when the program was built, or "unknown".
const char *build_commit(void);

#ifdef __cplusplus
}
#endif
#endif
