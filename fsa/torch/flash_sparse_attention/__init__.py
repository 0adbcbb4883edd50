"""Native sparse attention (NSA, arXiv 2502.11089) for PyTorch, by the CUDA kernels of libfsa.

GPU tensors are computed by libfsa, CPU tensors by the plain PyTorch of `reference`.
"""

from . import reference
from .functions import (
    FSA_topk_sparse_attention,
    attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    whole_sequences,
)
from .library import VERSION
from .module import NativeSparseAttention, rope_frequencies

__version__ = ".".join(str(number) for number in VERSION)
__all__ = [
    "FSA_topk_sparse_attention",
    "NativeSparseAttention",
    "attention",
    "native_sparse_attention",
    "reference",
    "rope_frequencies",
    "select_blocks",
    "selected_attention",
    "whole_sequences",
]
