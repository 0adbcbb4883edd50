"""The sliding window of the systems that call FlashAttention for it: FlashAttention-3 or FlashAttention-4 if it is
installed, otherwise the FlashAttention-2 inside PyTorch."""

import importlib.metadata

import torch


def _find():
    try:
        from flash_attn_interface import flash_attn_func

        return "FlashAttention-3", lambda q, k, v, left: flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    except ImportError:
        pass
    try:
        from flash_attn.cute import flash_attn_func

        name = "flash-attn-4 " + importlib.metadata.version("flash-attn-4")
        return name, lambda q, k, v, left: flash_attn_func(q, k, v, causal=True, window_size=(left, 0))[0]
    except ImportError:
        return "PyTorch's FlashAttention-2", _flash_attention_2


def _flash_attention_2(q, k, v, left):
    n = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, n, n, 0.0, True, False, window_size_left=left, window_size_right=0
    )[0]


NAME, FUNCTION = _find()


def attention(q, k, v, left):
    """Returns o [n, Hq, d]; a query sees itself and `left` keys before it."""
    return FUNCTION(q[None], k[None], v[None], left)[0]
