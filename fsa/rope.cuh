// rope.cuh: the rotation's angles. Computed in double and reduced to a fraction of a turn before the
// sine: in fp32 the angle at position 1,000,000 is off by 0.03 rad.
#ifndef FSA_ROPE_CUH
#define FSA_ROPE_CUH

// (cosine, sine) of position * inv_freq.
__device__ __forceinline__ float2 rope_cos_sin(int64_t position, double inv_freq) {
    double turns = (double)position * inv_freq * 0.15915494309189534; // over 2 pi
    float fraction = (float)(turns - floor(turns)), cosine, sine;
    sincospif(2 * fraction, &sine, &cosine);
    return make_float2(cosine, sine);
}
#endif
