// hmac.h: HMAC-SHA256 (RFC 2104, FIPS 180-4), with which two processes prove that they know the same secret.
#ifndef LLMC_HMAC_H
#define LLMC_HMAC_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SHA256_BYTES 32 // of a hash
#define SHA256_BLOCK 64 // bytes that sha256_block reads

typedef struct {
    uint32_t state[8];
    unsigned char block[SHA256_BLOCK]; // the first bytes % SHA256_BLOCK wait for sha256_block
    uint64_t bytes;                    // hashed or waiting
} Sha256;

static inline uint32_t sha256_rotate(uint32_t x, int bits) {
    return x >> bits | x << (32 - bits);
}

// Adds s->block to the state.
static inline void sha256_block(Sha256 *s) {
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], v[8]; // v: a to h of the standard
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)s->block[4 * i] << 24 | (uint32_t)s->block[4 * i + 1] << 16 |
               (uint32_t)s->block[4 * i + 2] << 8 | s->block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = sha256_rotate(w[i - 15], 7) ^ sha256_rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = sha256_rotate(w[i - 2], 17) ^ sha256_rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    memcpy(v, s->state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = sha256_rotate(v[4], 6) ^ sha256_rotate(v[4], 11) ^ sha256_rotate(v[4], 25);
        uint32_t s0 = sha256_rotate(v[0], 2) ^ sha256_rotate(v[0], 13) ^ sha256_rotate(v[0], 22);
        uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + constants[i] + w[i];
        uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1, v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) s->state[i] += v[i];
}

static inline void sha256_start(Sha256 *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->state, start, sizeof start);
    s->bytes = 0;
}

static inline void sha256_add(Sha256 *s, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        s->block[s->bytes++ % SHA256_BLOCK] = ((const unsigned char *)data)[i];
        if (s->bytes % SHA256_BLOCK == 0) sha256_block(s);
    }
}

static inline void sha256_end(Sha256 *s, unsigned char hash[SHA256_BYTES]) {
    static const unsigned char one = 0x80, zero = 0;
    uint64_t bits = 8 * s->bytes;
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)(bits >> (56 - 8 * i));
    sha256_add(s, &one, 1);
    while (s->bytes % SHA256_BLOCK != SHA256_BLOCK - 8) sha256_add(s, &zero, 1);
    sha256_add(s, length, 8);
    for (int i = 0; i < SHA256_BYTES; i++) hash[i] = (unsigned char)(s->state[i / 4] >> (24 - 8 * (i % 4)));
}

// Writes the HMAC-SHA256 of data [bytes] with `key` [key_bytes].
static inline void hmac_sha256(const void *key, size_t key_bytes, const void *data, size_t bytes,
                               unsigned char mac[SHA256_BYTES]) {
    Sha256 s;
    unsigned char pad[SHA256_BLOCK] = {0};
    if (key_bytes > sizeof pad) {
        sha256_start(&s), sha256_add(&s, key, key_bytes), sha256_end(&s, pad);
    } else {
        memcpy(pad, key, key_bytes);
    }
    for (size_t i = 0; i < sizeof pad; i++) pad[i] ^= 0x36;
    sha256_start(&s), sha256_add(&s, pad, sizeof pad), sha256_add(&s, data, bytes), sha256_end(&s, mac);
    for (size_t i = 0; i < sizeof pad; i++) pad[i] ^= 0x36 ^ 0x5c;
    sha256_start(&s), sha256_add(&s, pad, sizeof pad), sha256_add(&s, mac, SHA256_BYTES), sha256_end(&s, mac);
}

#endif
