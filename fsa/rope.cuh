// rope.cuh: the angles of RoPE. They are computed in double and reduced to a fraction of a revolution before
// the sine: an fp32 angle at position 1,000,000 is off by 0.03 rad.
#ifndef FSA_ROPE_CUH
#define FSA_ROPE_CUH

// Returns (cosine, sine) of position * inv_freq. inv_freq is in radians per position.
__device__ __forceinline__ float2 rope_cos_sin(int64_t position, double inv_freq) {
    double revolutions = (double)position * inv_freq * 0.15915494309189534; // / (2 pi)
    float fraction = (float)(revolutions - floor(revolutions)), cosine, sine;
    sincospif(2 * fraction, &sine, &cosine);
    return make_float2(cosine, sine);
}
#endif
