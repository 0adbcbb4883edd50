"""NativeSparseAttention: an attention layer with its projections, gate, compression and RoPE."""

import torch
from torch import nn

from . import checks
from .functions import native_sparse_attention


def rope_frequencies(head_dim, theta=10000.0, device=None):
    """Returns the RoPE frequencies theta^(-2i/d), float64 [d/2], in radians per token.

    Args:
        head_dim: d, channels of a head.
        theta: base.
        device: of the result.

    Raises:
        ValueError, TypeError: head_dim is not even and at least 2, or theta is not positive.
    """
    checks.integers(head_dim=head_dim)
    checks.numbers(theta=theta)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim {head_dim}: must be even and at least 2")
    if not theta > 0:
        raise ValueError(f"theta {theta}: must be positive")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return theta**-exponent


class NativeSparseAttention(nn.Module):
    """A layer of native sparse attention (NSA, arXiv 2502.11089): y = W_o nsa(W_q x, W_k x, W_v x, W_g x).

    One matmul computes q, k and v; the attention reads them where they are. The gate has three logits for each query
    head. The sliding branch begins with most of the weight, by the gate's biases, and the linear compression as the mean of
    a window.

    Args:
        hidden_size: channels C of x and y.
        q_heads, kv_heads: Hq and Hkv; Hq is a multiple of Hkv, at most 16 times.
        head_dim: d; 64 or 128 on a GPU. None: hidden_size // q_heads.
        phi: compression, "linear" (with weights) or "mean".
        rope_theta: base of RoPE's frequencies; None: no RoPE.
        cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window, scale, recompute: as of
            `native_sparse_attention`.
        device, dtype: of the parameters. On a GPU without autocast, dtype must be bf16 or fp16.

    A layer that was made on the meta device gets its frequencies when `to_empty` moves it. Its parameters are empty then:
    load or initialize them; `reset_nsa` initializes gate.bias, wk, pe and wv.

    Raises:
        ValueError, TypeError: a size breaks its rule, or phi is unknown.
    """

    def __init__(self, hidden_size, q_heads, kv_heads, head_dim=None, *, phi="linear", rope_theta=10000.0, cmp_len=32,
                 cmp_stride=16, block=64, topk=16, init_blocks=1, local_blocks=2, window=512, scale=None,
                 recompute=False, device=None, dtype=None):  # fmt: skip
        super().__init__()
        if phi not in ("linear", "mean"):
            raise ValueError(f"phi {phi!r}: must be 'linear' or 'mean'")
        checks.integers(hidden_size=hidden_size, q_heads=q_heads, kv_heads=kv_heads,
                        head_dim=2 if head_dim is None else head_dim)  # fmt: skip
        if hidden_size < 1:
            raise ValueError(f"hidden_size {hidden_size}: must be at least 1")
        if head_dim is None and (q_heads < 1 or hidden_size % q_heads):
            raise ValueError(f"hidden_size {hidden_size}: must be a multiple of q_heads {q_heads}, or head_dim be given")
        d = hidden_size // q_heads if head_dim is None else head_dim
        checks.head_counts(q_heads, kv_heads, d)
        sizes = dict(cmp_len=cmp_len, cmp_stride=cmp_stride, block=block, topk=topk, init_blocks=init_blocks,
                     local_blocks=local_blocks, window=window)  # fmt: skip
        checks.integers(**sizes)
        checks.config(**sizes)
        checks.scale(scale)
        checks.recompute(recompute)
        self.hidden_size, self.q_heads, self.kv_heads, self.head_dim = hidden_size, q_heads, kv_heads, d
        self.sizes, self.rope_theta = dict(sizes, scale=scale, recompute=recompute), rope_theta
        kind = dict(device=device, dtype=dtype)
        self.qkv = nn.Linear(hidden_size, (q_heads + 2 * kv_heads) * d, bias=False, **kind)
        self.gate = nn.Linear(hidden_size, 3 * q_heads, **kind)
        self.o = nn.Linear(q_heads * d, hidden_size, bias=False, **kind)
        if phi == "linear":
            self.wk = nn.Parameter(torch.empty(kv_heads, cmp_len * d, d, **kind))
            self.pe = nn.Parameter(torch.empty(kv_heads, cmp_len, d, **kind))
            self.wv = nn.Parameter(torch.empty(kv_heads, cmp_len * d, d, **kind))
        else:
            self.wk = self.pe = self.wv = None
        frequencies = None if rope_theta is None else rope_frequencies(d, rope_theta, device)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.reset_nsa()

    def _apply(self, *arguments, **kwargs):
        """Is Module._apply, which all moves and casts of a module call."""
        super()._apply(*arguments, **kwargs)
        if self.inv_freq is not None and not self.inv_freq.is_meta:
            self._restore_frequencies(self.inv_freq.device)
        return self

    def _restore_frequencies(self, device):
        """Computes the frequencies again, which no checkpoint has: a cast to another type has rounded them, and those that
        leave the meta device are empty."""
        self.inv_freq = rope_frequencies(self.head_dim, self.rope_theta, device)

    @torch.no_grad()
    def reset_nsa(self):
        """Sets the gate's biases to -2, -2 and 2 (compressed, selected, sliding), as the trainers (`default_gate_bias` in
        llmc/config.h), and the linear compression to the mean of a window."""
        self.gate.bias.copy_(self.gate.bias.new_tensor([-2.0, -2.0, 2.0]).repeat(self.q_heads))
        if self.wk is None:
            return
        cmp_len = self.sizes["cmp_len"]
        mean = (
            torch.eye(self.head_dim, device=self.wk.device, dtype=self.wk.dtype).repeat(cmp_len, 1) / cmp_len
        )
        self.wk.copy_(mean.expand_as(self.wk))
        self.wv.copy_(mean.expand_as(self.wv))
        self.pe.zero_()

    def forward(self, x, cu_seqlens=None, *, segments=None, check=None):
        """Computes the layer.

        Args:
            x: [N, C], packed sequences, or [batch, n, C], sequences of n tokens.
            cu_seqlens: int [num_seqs + 1] of packed sequences; None: one sequence. Must be None for [batch, n, C].
            segments: `whole_sequences(cu_seqlens)`, made once for many layers, or None.
            check: check the values of cu_seqlens; waits for the GPU. None: if FSA_CHECK=1 is in the
                environment.

        Returns:
            y of x's shape.

        Raises:
            ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x {type(x).__name__}: must be a tensor")
        shape = x.shape
        if x.dim() not in (2, 3) or shape[-1] != self.hidden_size:
            channels = self.hidden_size
            raise ValueError(f"x of shape {tuple(shape)}: must be [N, {channels}] or [batch, n, {channels}]")
        if x.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError(f"cu_seqlens of a tensor: must be None for x of shape {tuple(shape)}")
            cu_seqlens = shape[1] * torch.arange(shape[0] + 1, device=x.device)
            x = x.flatten(0, 1)
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.q_heads, self.kv_heads, self.kv_heads], dim=1)
        gate_logits = self.gate(x).unflatten(-1, (self.q_heads, 3))
        if self.inv_freq is not None and (self.inv_freq.is_meta or self.inv_freq.dtype != torch.float64):
            self._restore_frequencies(x.device)  # parameters were assigned to a module on the meta device, or FSDP cast it
        o = native_sparse_attention(q, k, v, gate_logits, self.wk, self.pe, self.wv, cu_seqlens, inv_freq=self.inv_freq,
                                    segments=segments, check=check, **self.sizes)  # fmt: skip
        return self.o(o.flatten(1)).view(shape)
