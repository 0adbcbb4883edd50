"""Runs the package's kernels for the GPU on CPU tensors of 16 bits: with libfsa on the emulator, or with a library whose
functions return at once, which leaves the host's own time. Tensors of other types go to the reference.

usage: torch_on_cpu.py emulator LIBRARY [CASES]   compares with the reference, at random shapes
       torch_on_cpu.py time                       prints microseconds of a forward and of a backward call"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch_checks import ROOT, finish, fsa, run

from flash_sparse_attention import cuda, ops

on_gpu = True  # whether 16-bit tensors go to libfsa

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


def use_gpu_kernels(choose):
    """Registers choose(kernel for the GPU, kernel for the CPU) as the kernel for the CPU, for all operators."""
    library = torch.library.Library("flash_sparse_attention", "IMPL")
    for name in ops._SCHEMAS:
        torch.library._impls.discard(f"flash_sparse_attention/{name}/CPU")
        library.impl(name, choose(getattr(cuda, "_" + name), getattr(ops, "_" + name)), "CPU")
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: None  # the index of the device "cpu"
    torch._C._cuda_getCurrentRawStream = lambda index: None
    torch.cuda.get_device_capability = lambda device: (9, 0)
    return library


def emulator(path, cases=2):
    import test_torch_gpu

    os.environ["LIBFSA"] = os.path.abspath(path)

    def by_type(gpu_kernel, cpu_kernel):
        def call(*arguments):
            to_gpu = on_gpu and arguments[0].dtype in (torch.bfloat16, torch.float16)
            return (gpu_kernel if to_gpu else cpu_kernel)(*arguments)

        return call

    library = use_gpu_kernels(by_type)  # noqa: F841  registers as long as it lives
    reference_in = test_torch_gpu.reference_in

    def new_bytes(num_bytes, device):  # the CPU's allocator does not align to 256 bytes
        memory = torch.empty(num_bytes + 256, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 256 :][:num_bytes]

    @contextlib.contextmanager
    def reference_on_cpu(dtype):
        global on_gpu
        on_gpu = False
        with reference_in(dtype):
            yield
        on_gpu = True

    cuda._new_bytes, test_torch_gpu.reference_in = new_bytes, reference_on_cpu
    torch.use_deterministic_algorithms(True)  # outputs begin as NaN
    torch.utils.deterministic.fill_uninitialized_memory = True

    def test_shapes():
        test_torch_gpu.test_shapes(int(cases), "cpu")

    run(test_shapes)
    finish()


def time_host():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, stub = os.path.join(folder, "stub.c"), os.path.join(folder, "stub.so")
        with open(source, "w") as f:
            f.write(STUB)
        compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-I" + os.path.join(ROOT, "fsa")]
        subprocess.run([*compiler, source, "-o", stub], check=True)
        os.environ["LIBFSA"] = stub
        library = use_gpu_kernels(lambda gpu_kernel, cpu_kernel: gpu_kernel)  # noqa: F841
        shapes = [(64, 8, 64), (64, 2, 64), (64, 2, 64), (64, 8, 3), (2, 64, 64), (2, 1, 64), (2, 64, 64)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16).requires_grad_() for s in shapes]
        cu, inv_freq = torch.tensor([0, 64]), fsa.rope_frequencies(64)
        segments, dout = fsa.whole_sequences(cu), torch.zeros(64, 8, 64, dtype=torch.bfloat16)

        def forward():
            return fsa.native_sparse_attention(*leaves, cu, inv_freq=inv_freq, segments=segments, cmp_len=1, cmp_stride=1)

        o = forward()
        for name, function in (
            ("forward", forward),
            ("backward", lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True)),
        ):
            times = []
            for _ in range(2000):
                begin = time.perf_counter()
                function()
                times.append(1e6 * (time.perf_counter() - begin))
            print(f"{name} {statistics.median(times):.1f} us", flush=True)


{"emulator": emulator, "time": time_host}[sys.argv[1]](*sys.argv[2:])
