"""On import, CPU tensors go to the package's kernels for the GPU, which call a library whose functions return at once."""

import contextlib
import os
import subprocess
import tempfile

import torch
from torch_checks import ROOT

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
