"""The NSA entry points of nvidia-cudnn-frontend. On Hopper they are the selected branch and the sliding window, without a
backward pass. Compression and block selection need compute capability 10.0."""

import importlib.metadata

import torch
from cudnn import NSA
from sizes import BLOCKS as SELECTION
from sizes import HEAD_DIM, WINDOW

FORWARD_ONLY = ("sel", "win")
_handle = None


def version():
    names = ("nvidia-cudnn-frontend", "nvidia-cutlass-dsl")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def selected(x):
    n = x.q.shape[0]
    if not hasattr(x, "cudnn_blocks"):  # its own layout, made once
        block_indices = x.block_indices.transpose(0, 1).contiguous()
        x.cudnn_blocks = block_indices, (block_indices >= 0).sum(-1, dtype=torch.int32)
    return NSA.selection_attention_wrapper(
        x.q, x.k, x.v, *x.cudnn_blocks, x.cu_seqlens32, x.cu_seqlens32, SELECTION["block"], HEAD_DIM**-0.5,
        max_s_q=n, max_s_k=n, is_causal=True,
    )["o_tensor"]  # fmt: skip


def window(x):
    global _handle
    import cudnn

    _handle = _handle or cudnn.create_handle()
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (x.q, x.k, x.v))
    o = NSA.sliding_window_attention_wrapper(q, k, v, left_bound=WINDOW, right_bound=0, cudnn_handle=_handle)
    return o["o_tensor"][0].transpose(0, 1)


PARTS = {"sel": selected, "win": window}
BLOCKS = {}
