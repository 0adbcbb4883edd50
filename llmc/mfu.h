// mfu.h: peak FLOP rates of GPUs, for model FLOPs utilization (MFU).
#ifndef LLMC_MFU_H
#define LLMC_MFU_H
#include <ctype.h>
#include <stddef.h>
#include <string.h>

// Returns the GPU's peak in TFLOP/s for dense 16-bit matmuls with fp32 accumulation, at boost clock, from the
// data sheets; 0 for an unknown GPU. The first entry counts that `gpu`, the device name, contains as whole
// words.
static inline double peak_tflops(const char *gpu) {
    // clang-format off
    static const struct { const char *name; double tflops; } table[] = {
        {"GB200", 2500}, {"B200", 2250}, {"H200 NVL", 835.5}, {"H200", 989.4}, {"GH200", 989.4},
        {"H100 PCIe", 756}, {"H100 NVL", 835.5}, {"H100", 989.4}, {"H800", 989.4}, {"H20", 148},
        {"A100", 311.9}, {"A100X", 311.9}, {"A800", 311.9}, {"A40", 149.7}, {"A30", 165}, {"A10", 125},
        {"L40S", 362}, {"L40", 181}, {"L4", 121}, {"RTX A6000", 154.8}, {"RTX 6000 Ada", 364.2},
        {"RTX 5090", 209.5}, {"RTX 4090", 165.2}, {"RTX 4080", 97.5}, {"RTX 3090 Ti", 80}, {"RTX 3090", 71.2},
    };
    // clang-format on
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        size_t length = strlen(table[i].name);
        for (const char *match = strstr(gpu, table[i].name); match;
             match = strstr(match + 1, table[i].name)) {
            int at_word_start = match == gpu || !isalnum((unsigned char)match[-1]);
            if (at_word_start && !isalnum((unsigned char)match[length])) return table[i].tflops;
        }
    }
    return 0;
}
#endif
