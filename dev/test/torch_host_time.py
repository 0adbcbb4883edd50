"""Prints the host time in microseconds of a forward and of a backward call of native sparse attention, without the calls
of libfsa, and PyTorch's own: that of a function with the same outputs and gradients that computes nothing. CPU tensors go
to the package's kernels for the GPU, which call a library whose functions return at once.
"""

import contextlib
import os
import statistics
import subprocess
import tempfile
import time

import torch
from test_torch_gpu import Nothing
from torch_checks import ROOT, fsa

from flash_sparse_attention import cuda, functions

# All functions return at once. The sizes are those that the package expects.
STUB = r"""
#include "fsa.h"
int fsa_version(void) { return 1000 * FSA_VERSION_MAJOR + FSA_VERSION_MINOR; }
const char *fsa_last_error(void) { return ""; }
size_t fsa_workspace_size(const FsaConfig *c, FsaDtype d, const FsaDeviceBatch *b, FsaOperation op) { return 256; }
static size_t up(size_t n) { return (n + 255) / 256 * 256; }
size_t fsa_saved_size(const FsaConfig *c, FsaDtype dtype, const FsaDeviceBatch *b) {
    size_t nq = b->num_queries, n = b->num_keys, d = c->head_dim;
    return (c->recompute ? 1 : 4) * up(nq * c->q_heads * d * 2) + up(n * c->kv_heads * d * 2)
        + 2 * up(n / c->cmp_stride * c->kv_heads * d * 2) + 3 * up(nq * c->q_heads * 4) + up(c->kv_heads * nq * c->topk * 4);
}
#define OPERATION(name, arguments) \
    int name(const FsaConfig *c, FsaDtype d, const FsaDeviceBatch *b, const arguments *a, FsaStream s) { return 0; }
OPERATION(fsa_forward, FsaForward)
OPERATION(fsa_backward, FsaBackward)
OPERATION(fsa_selected_forward, FsaSelectedForward)
OPERATION(fsa_selected_backward, FsaSelectedBackward)
OPERATION(fsa_select_blocks, FsaSelectBlocks)
OPERATION(fsa_attention_forward, FsaAttentionForward)
OPERATION(fsa_attention_backward, FsaAttentionBackward)
"""


with tempfile.TemporaryDirectory() as folder:
    source, stub = os.path.join(folder, "stub.c"), os.path.join(folder, "stub.so")
    with open(source, "w") as f:
        f.write(STUB)
    compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-I" + os.path.join(ROOT, "fsa")]
    subprocess.run([*compiler, source, "-o", stub], check=True)
    os.environ["LIBFSA"] = stub
    cuda.lib.load()

functions._on_gpu = lambda x: isinstance(x, torch.Tensor) and x.is_cpu
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: None  # the index of the device "cpu"
torch.cuda.get_device_capability = lambda device: (9, 0)
torch._C._cuda_getCurrentRawStream = lambda index: None
torch.set_num_threads(1)

# The tensors are small, since PyTorch's own kernels run on the CPU here.
shapes = [(64, 8, 8), (64, 2, 8), (64, 2, 8), (64, 8, 3), (2, 8, 8), (2, 1, 8), (2, 8, 8)]
leaves = [torch.zeros(s, dtype=torch.bfloat16).requires_grad_() for s in shapes]
cu, inv_freq = torch.tensor([0, 64]), fsa.rope_frequencies(8)
segments, dout = fsa.whole_sequences(cu), torch.zeros(64, 8, 8, dtype=torch.bfloat16)


def forward():
    return fsa.native_sparse_attention(
        *leaves, cu, inv_freq=inv_freq, segments=segments, cmp_len=1, cmp_stride=1
    )


def nothing():
    return Nothing.apply(*leaves, cu, segments, inv_freq)


def median_us(function):
    times = []
    for _ in range(2000):
        begin = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times)


def backward_us(o):
    return median_us(lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True))


print(f"forward {median_us(forward):.1f} us, PyTorch's own {median_us(nothing):.1f} us", flush=True)
print(f"backward {backward_us(forward()):.1f} us, PyTorch's own {backward_us(nothing()):.1f} us", flush=True)
