// llmc/ptx.cuh: the functions of llmc/ptx.cuh on the emulator. Those of bulk copies are those of
// fsa/sm90/ptx.cuh.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH
#include "../fsa/sm90/ptx.cuh"
inline float exp2_approx(float x) {
    return exp2f(x);
}
inline float reciprocal_approx(float x) {
    return 1 / x;
}
inline void bulk_wait_read_but_newest() {
    bulk_wait_read();
}
#endif
