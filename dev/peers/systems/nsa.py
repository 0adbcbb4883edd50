"""NSA in Triton (Xunhao Lai's), as it stands in the FSA authors' repository."""

from nsa_ref.ops import topk_sparse_attention
from systems import checkout, fsa, window


def version():
    return f"commit {checkout.commit('nsa_ref.ops')}; window: {window.NAME}"


PARTS = {
    "core": lambda x: fsa.whole(x, True, topk_sparse_attention),
    "core_mean": lambda x: fsa.whole(x, False, topk_sparse_attention),
    "sel": lambda x: topk_sparse_attention(x.q, x.k, x.v, x.block_indices, fsa.BLOCK, x.cu_seqlens32),
}
BLOCKS = fsa.BLOCKS
