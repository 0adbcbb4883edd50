"""libfsa, called through its PyTorch package."""

import flash_sparse_attention as fsa
from sizes import BLOCKS as SELECTION
from sizes import CMP, WINDOW

STEP = "core"


def version():
    import torch

    if torch.cuda.is_available():
        from flash_sparse_attention import library

        library.load()
    return f"libfsa {fsa.__version__}"


def core(x):
    return fsa.native_sparse_attention(x.q, x.k, x.v, x.gate, x.wk, None, x.wv, x.cu_seqlens, window=WINDOW, **CMP,
                                       **SELECTION)  # fmt: skip


def core_mean(x):
    return fsa.native_sparse_attention(x.q, x.k, x.v, x.gate, cu_seqlens=x.cu_seqlens, window=WINDOW, **CMP,
                                       **SELECTION)  # fmt: skip


def blocks(x, wk=None, wv=None):
    _, block_indices = fsa.native_sparse_attention(x.q, x.k, x.v, x.gate, wk, None, wv, x.cu_seqlens, window=WINDOW,
                                                   return_block_indices=True, **CMP, **SELECTION)  # fmt: skip
    return block_indices


def selected(x):
    sizes = {name: value for name, value in SELECTION.items() if name != "topk"}
    return fsa.selected_attention(x.q, x.k, x.v, x.block_indices, x.cu_seqlens, **sizes)


def window(x):
    return fsa.attention(x.q, x.k, x.v, x.cu_seqlens, rule="window", window=WINDOW)


def full(x):
    return fsa.attention(x.q, x.k, x.v, x.cu_seqlens)


PARTS = {"core": core, "core_mean": core_mean, "sel": selected, "win": window, "full": full}
BLOCKS = {"core": lambda x: blocks(x, x.wk, x.wv), "core_mean": blocks}
