// llmc/ptx.cuh: the functions of llmc/ptx.cuh on the emulator, which are those of fsa/sm90/ptx.cuh and of
// fsa/sm80/ptx.cuh, which it includes.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH
#include "../fsa/sm90/ptx.cuh"
inline void bulk_wait_read_but_newest() {
    bulk_wait_read();
}
#endif
