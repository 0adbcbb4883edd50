// rand.h: random numbers as a pure function of (seed, stream, index). Any thread can compute any of them in
// any order, with the same bits. The hash is SplitMix64's.
#ifndef LLMC_RAND_H
#define LLMC_RAND_H

#include <math.h>
#include <stdint.h>

// A counter-based generator: number i depends only on the key and on counter = i.
typedef struct {
    uint64_t key, counter;
} Rng;

// The finalizer of SplitMix64: a bijection of 64 bits that mixes them.
static inline uint64_t rng_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Returns the key of a stream.
static inline uint64_t rng_key(uint64_t seed, uint64_t stream) {
    return rng_mix(rng_mix(seed + 0x9E3779B97F4A7C15ull) + stream * 0xD1342543DE82EF95ull);
}

// Returns 64 random bits, number `index` of a key's sequence.
static inline uint64_t rng_u64_at(uint64_t key, uint64_t index) {
    return rng_mix(key + (index + 1) * 0x9E3779B97F4A7C15ull);
}

// Starts a generator. Different streams of one seed are independent.
static inline void rng_seed(Rng *r, uint64_t seed, uint64_t stream) {
    r->key = rng_key(seed, stream);
    r->counter = 0;
}

// Returns the generator's next 64 bits.
static inline uint64_t rng_u64(Rng *r) {
    return rng_u64_at(r->key, r->counter++);
}

// Returns a uniform number in [0, 1) of 53 bits.
static inline double rng_uniform(Rng *r) {
    return (double)(rng_u64(r) >> 11) * 0x1p-53;
}

// Returns a uniform integer in [0, n), without bias; n >= 1.
static inline int64_t rng_below(Rng *r, int64_t n) {
    uint64_t range = (uint64_t)n, num_rejected = (0 - range) % range; // reject 2^64 mod n values
    uint64_t u = rng_u64(r);
    while (u < num_rejected) u = rng_u64(r);
    return (int64_t)(u % range);
}

// Returns standard normal number `index` of (seed, stream), by the Box-Muller transform.
static inline double rng_normal_at(uint64_t seed, uint64_t stream, int64_t index) {
    uint64_t key = rng_key(seed, stream), i = 2 * (uint64_t)index;
    double u = (double)((rng_u64_at(key, i) >> 11) + 1) * 0x1p-53; // in (0, 1], so log(u) is finite
    double v = (double)(rng_u64_at(key, i + 1) >> 11) * 0x1p-53;
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586477 * v);
}

// Shuffles a [n] in place (Fisher-Yates). The order depends only on (seed, stream).
static inline void rng_shuffle(int64_t *a, int64_t n, uint64_t seed, uint64_t stream) {
    Rng r;
    rng_seed(&r, seed, stream);
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = rng_below(&r, i + 1), t = a[i];
        a[i] = a[j];
        a[j] = t;
    }
}

#endif
