// llmc/bulk_copy.cuh: the functions of llmc/bulk_copy.cuh on the emulator, which are those of
// fsa/sm90/ptx.cuh.
#ifndef LLMC_BULK_COPY_CUH
#define LLMC_BULK_COPY_CUH
#include "../fsa/sm90/ptx.cuh"
inline void bulk_wait_read_but_newest() {
    bulk_wait_read();
}
#endif
