"""FlashAttention-4 (CuTe DSL), its default backward pass."""

import importlib.metadata

from flash_attn.cute import flash_attn_func
from sizes import WINDOW

STEP = "full"


def version():
    names = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def full(x):
    return flash_attn_func(x.q[None], x.k[None], x.v[None], causal=True)[0][0]


def window(x):
    return flash_attn_func(x.q[None], x.k[None], x.v[None], causal=True, window_size=(WINDOW - 1, 0))[0][0]


PARTS = {"win": window, "full": full}
BLOCKS = {}
