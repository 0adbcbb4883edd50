"""flash_nsa: NSA in Triton for Hopper, with mean compression."""

import functools
import sys
import types

import torch
from sizes import BLOCKS as SELECTION
from sizes import CMP, HEAD_DIM, WINDOW
from systems import checkout, window

# flash_nsa imports its sliding window from FlashAttention-3 or -2. Where they are not installed, it gets `window`.
if "flash_attn_interface" not in sys.modules and window.NAME != "FlashAttention-3":
    module = types.ModuleType("flash_attn_interface")

    def flash_attn_varlen_func(q, k, v, *_, window_size, **__):  # of one sequence
        return window.attention(q, k, v, window_size[0])

    module.flash_attn_varlen_func = flash_attn_varlen_func
    module._flash_attn_forward = module._flash_attn_backward = None  # of its Megatron module, which is not called
    sys.modules["flash_attn_interface"] = module

import flash_nsa  # noqa: E402

STEP = "core_mean"
SIZES = dict(
    kernel_size=CMP["cmp_len"],
    stride=CMP["cmp_stride"],
    block_size=SELECTION["block"],
    window_size=WINDOW - 1,  # keys before the query
    top_n=SELECTION["topk"],
    num_init_blocks=SELECTION["init_blocks"],
    num_local_blocks=SELECTION["local_blocks"],
)


def version():
    return f"commit {checkout.commit('flash_nsa')}; window: {window.NAME}"


def begin(x):
    flash_nsa.NSAHelper.set_hyperparameters(**SIZES)
    flash_nsa.NSAHelper.init_cu_seqlens(x.cu_seqlens32)


@functools.lru_cache(maxsize=None)
def whole(hq, hkv):
    return flash_nsa.HFNSACore(flash_nsa.NSAConfig(num_heads=hq, num_kv_heads=hkv, head_dim=HEAD_DIM, **SIZES))


def core_mean(x):
    return whole(x.q.shape[1], x.k.shape[1])(x.q, x.k, x.v, x.gate, x.cu_seqlens32)


def blocks(x):
    begin(x)
    kc, vc = flash_nsa.mean_pooling(x.k), flash_nsa.mean_pooling(x.v)
    _, lse = flash_nsa.compress_attn(x.q, kc, vc)
    block_indices, _ = flash_nsa.slc_topk_indices(x.q, kc, lse, maybe_efficient_version=True, scale_slc_p=True)
    query = torch.arange(x.q.shape[0], device=x.q.device)[:, None]
    used = torch.arange(SELECTION["topk"], device=x.q.device) <= query // SELECTION["block"]
    return torch.where(used, block_indices, -1)


def selected(x):
    begin(x)
    padding = -(-x.q.shape[0] // SELECTION["block"])
    return flash_nsa.select_attn(x.q, x.k, x.v, torch.where(x.block_indices < 0, padding, x.block_indices))


PARTS = {"core_mean": core_mean, "sel": selected}
BLOCKS = {"core_mean": blocks}
