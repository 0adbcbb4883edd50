"""fla-core's NSA in Triton. Its compression windows are the selected blocks: mean of 64 tokens, without overlap."""

import importlib.metadata

import fla.ops.nsa.parallel as nsa
import torch
from sizes import BLOCKS as SELECTION
from sizes import HEAD_DIM, WINDOW
from systems import window

if nsa.flash_attn_func is None:  # it calls FlashAttention-2 for its sliding window
    nsa.flash_attn_func = lambda q, k, v, causal, window_size: window.FUNCTION(q, k, v, window_size[0])
SIZES = dict(block_counts=SELECTION["topk"], block_size=SELECTION["block"])


def version():
    return f"fla-core {importlib.metadata.version('fla-core')}; window: {window.NAME}"


def refuses(part, n, hq, hkv):
    group = hq // hkv
    if group < 16 or group & (group - 1):
        return f"needs 16, 32, ... query heads for each KV head, not {group}"


def core_mean64(x):
    gates = torch.sigmoid(x.gate)[None].unbind(-1)
    return nsa.parallel_nsa(x.q[None], x.k[None], x.v[None], *gates, window_size=WINDOW, **SIZES)[0]


def blocks(x):
    q, kc, vc = x.q[None], *(nsa.mean_pooling(tensor[None], SELECTION["block"]) for tensor in (x.k, x.v))
    sizes = dict(TK=x.k.shape[0], block_size=SELECTION["block"], scale=HEAD_DIM**-0.5)
    _, lse = nsa.parallel_nsa_compression(q, kc, vc, **sizes)
    block_indices = nsa.parallel_nsa_topk(q, kc, lse=lse, block_counts=SELECTION["topk"], **sizes)
    return block_indices[0].transpose(0, 1).int()


def selected(x):
    block_indices = x.block_indices.transpose(0, 1).contiguous()[None]
    return nsa.ParallelNSAFunction.apply(x.q[None], x.k[None], x.v[None], block_indices, SELECTION["topk"],
                                         SELECTION["block"], HEAD_DIM**-0.5, None)[0]  # fmt: skip


PARTS = {"core_mean64": core_mean64, "sel": selected}
BLOCKS = {"core_mean64": blocks}
