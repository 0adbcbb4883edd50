"""FSA: the Triton code of the FSA paper's authors. The whole attention calls its functions in the order of its module
FlashSparseAttention, without the projections and RoPE."""

import torch
from fsa.ops import FSA_topk_sparse_attention
from nsa_ref.ops import compressed_attention, linear_compress, topk_sparse_attention
from nsa_ref.ops.weighted_pool import avgpool_compress
from sizes import BLOCKS as SELECTION
from sizes import CMP, WINDOW
from systems import checkout, window

STEP = "core"
BLOCK = SELECTION["block"]


def version():
    return f"commit {checkout.commit('fsa.ops')}; window: {window.NAME}"


def compress(x, linear):
    """Returns the compressed keys and values and their cu_seqlens."""
    function = linear_compress if linear else avgpool_compress
    (kc, cu), (vc, _) = (
        function(tensor, weight, x.cu_seqlens32, CMP["cmp_len"], CMP["cmp_stride"])
        for tensor, weight in ((x.k, x.wk if linear else None), (x.v, x.wv if linear else None))
    )
    return kc, vc, cu


def compressed(x, kc, vc, cu):
    """Returns the output of the compressed branch and the block indices."""
    return compressed_attention(
        x.q, kc, vc, CMP["cmp_len"], CMP["cmp_stride"], BLOCK, SELECTION["topk"], x.cu_seqlens32, cu, x.q.shape[0],
        kc.shape[0], None, SELECTION["init_blocks"], SELECTION["local_blocks"], parallel_topk_compute=False,
    )  # fmt: skip


def selected(x):
    return FSA_topk_sparse_attention(x.q, x.k, x.v, x.block_indices, BLOCK, x.cu_seqlens32)


def whole(x, linear, branch):
    o_compressed, block_indices = compressed(x, *compress(x, linear))
    o_selected = branch(x.q, x.k, x.v, block_indices, BLOCK, x.cu_seqlens32)
    o_window = window.attention(x.q, x.k, x.v, WINDOW - 1)
    gate = torch.sigmoid(x.gate)
    return gate[..., :1] * o_compressed + gate[..., 1:2] * o_selected + gate[..., 2:] * o_window


def branch_of(x):
    """The kernel that FlashSparseAttention takes: with more than 8 query heads for each KV head, that of NSA."""
    return FSA_topk_sparse_attention if x.q.shape[1] <= 8 * x.k.shape[1] else topk_sparse_attention


PARTS = {
    "core": lambda x: whole(x, True, branch_of(x)),
    "core_mean": lambda x: whole(x, False, branch_of(x)),
    "sel": selected,
}
BLOCKS = {
    "core": lambda x: compressed(x, *compress(x, True))[1],
    "core_mean": lambda x: compressed(x, *compress(x, False))[1],
}
