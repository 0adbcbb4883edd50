"""Prints the host time in microseconds of a forward and of a backward call of native sparse attention, without the calls
of libfsa, and PyTorch's own: that of a function with the same outputs and gradients that computes nothing."""

import statistics
import time

import torch
import torch_stub  # noqa: F401
from test_torch_gpu import Nothing
from torch_checks import fsa

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
