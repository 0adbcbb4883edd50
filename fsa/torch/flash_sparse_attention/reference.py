"""Native sparse attention in plain PyTorch: the equations of fsa/README.md with dense masks [queries, keys],
[queries, windows] and [queries, blocks].

All functions work on any device and in any float type, and autograd differentiates them. 16-bit inputs are computed in
float32, and the results are rounded at the end. Sizes depend only on shapes, never on values, so torch.compile traces
them. Memory grows with queries x keys: they are for tests, small runs and machines without a GPU.
"""

import torch
import torch.nn.functional as F

SKIPPED = 2**30  # more than any block index


def compute_dtype(dtype):
    """Returns the type in which tensors of `dtype` are computed: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class BatchLayout:
    """Sequence and position of each query, key and compression window of a batch.

    Args:
        cu_seqlens: int [num_seqs + 1], first key of each sequence, then the number of keys.
        segments: int [num_segments, 3], (sequence, position of the first query, queries).
        num_queries, num_keys: Nq and N.
        cmp_len, cmp_stride: tokens of a compression window, and between the starts of windows.

    Attributes:
        query_seq, query_pos [Nq]; key_seq, key_pos [N]; window_seq, window_pos, is_window [M]: M is N // cmp_stride,
        an upper bound of the number of windows. `is_window` is False for the rows after the last window.
    """

    def __init__(self, cu_seqlens, segments, num_queries, num_keys, cmp_len=1, cmp_stride=1):
        cu_seqlens, segments = cu_seqlens.long(), segments.long()
        device = cu_seqlens.device

        def rows(n, ends):  # the part that each of n rows belongs to; `ends` is ascending
            return torch.searchsorted(ends.contiguous(), torch.arange(n, device=device), right=True)

        self.cu_seqlens = cu_seqlens
        self.key_seq = rows(num_keys, cu_seqlens[1:])
        self.key_pos = torch.arange(num_keys, device=device) - cu_seqlens[self.key_seq]
        query_ends = segments[:, 2].cumsum(0)
        segment = rows(num_queries, query_ends)
        self.query_seq = segments[segment, 0]
        first = segments[segment, 1] - (query_ends - segments[:, 2])[segment]
        self.query_pos = first + torch.arange(num_queries, device=device)

        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        num_windows = torch.where(lengths < cmp_len, 0, (lengths - cmp_len) // cmp_stride + 1)
        cu_windows = F.pad(num_windows.cumsum(0), (1, 0))
        window = torch.arange(num_keys // cmp_stride, device=device)
        self.is_window = window < cu_windows[-1]
        self.window_seq = rows(num_keys // cmp_stride, cu_windows[1:]) * self.is_window
        self.window_pos = torch.where(self.is_window, cmp_stride * (window - cu_windows[self.window_seq]), 0)

    def visible(self, rule, window=1, cmp_len=1):
        """Returns the mask of a visibility rule: [Nq, N], or [Nq, M] for the compressed rule."""
        if rule == "compressed":
            same = (self.query_seq[:, None] == self.window_seq) & self.is_window
            return same & (self.window_pos + cmp_len - 1 <= self.query_pos[:, None])
        causal = (self.query_seq[:, None] == self.key_seq) & (self.key_pos <= self.query_pos[:, None])
        return causal & (self.key_pos > self.query_pos[:, None] - window) if rule == "window" else causal


def rotate(x, position, inv_freq):
    """Applies RoPE (half rotation) to x [rows, heads, d] at position [rows]. Angles are in float64, since in float32
    they are off by 0.03 rad at position 1,000,000. inv_freq: [d/2], radians per token; None: returns x."""
    if inv_freq is None:
        return x
    angle = (position.double()[:, None] * inv_freq.double())[:, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q, k, v, mask, scale):
    """Computes softmax attention under a mask [Nq, K] or [Hkv, Nq, K]. A row that sees no key has o = 0, lse = -inf.

    Returns o [Nq, Hq, d], lse [Nq, Hq] and the probabilities [Hq, Nq, K].
    """
    g = q.shape[1] // k.shape[1]
    mask = mask.expand(k.shape[1], -1, -1).repeat_interleave(g, dim=0)
    score = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(g, dim=1))
    sees_a_key = mask.any(-1, keepdim=True)
    score = torch.where(sees_a_key, score.masked_fill(~mask, -torch.inf), 0)
    p = torch.where(mask, torch.softmax(score, dim=-1), 0)
    lse = torch.where(sees_a_key[..., 0], torch.logsumexp(score, dim=-1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(g, dim=1)), lse.T, p


def compress(layout, k, v, cmp_len, phi=(None, None, None), inv_freq=None):
    """Computes the compressed keys (after RoPE) and values (fsa/README.md, "Compression").

    Args:
        layout: a BatchLayout of this cmp_len.
        k, v: [N, Hkv, d]; k before RoPE.
        phi: (wk, pe, wv) of shapes [Hkv, cmp_len*d, d], [Hkv, cmp_len, d] or None, [Hkv, cmp_len*d, d];
            wk None: the mean of the window.

    Returns:
        kc, vc [N // cmp_stride, Hkv, d]. Rows after the last window are 0.
    """
    wk, pe, wv = phi
    first = torch.where(layout.is_window, layout.cu_seqlens[layout.window_seq] + layout.window_pos, 0)
    tokens = first[:, None] + torch.arange(cmp_len, device=k.device)
    tokens = torch.where(layout.is_window[:, None], tokens, 0)
    kw, vw = k[tokens].transpose(1, 2), v[tokens].transpose(1, 2)  # [M, Hkv, cmp_len, d]
    if wk is None:
        kc, vc = kw.mean(2), vw.mean(2)
    else:
        kw = kw if pe is None else kw + pe
        kc = torch.einsum("mhx,hxe->mhe", kw.flatten(2), wk)
        vc = torch.einsum("mhx,hxe->mhe", vw.flatten(2), wv)
    valid = layout.is_window[:, None, None]
    return torch.where(valid, rotate(kc, layout.window_pos, inv_freq), 0), torch.where(valid, vc, 0)


def select(layout, p, cmp_len, cmp_stride, block, topk, init_blocks, local_blocks):
    """Selects the blocks of each query and KV head (fsa/README.md, "Block scores", "Block selection").

    Args:
        p: [Hkv, Nq, M] probabilities of the compressed branch, summed over the query heads of a KV head.

    Returns:
        int32 [Hkv, Nq, topk]: ascending block indices within the sequence, then -1.
    """
    num_blocks = (layout.key_pos.shape[0] + block - 1) // block
    j = torch.arange(num_blocks, device=p.device)
    first = layout.window_pos[:, None]
    shared = torch.minimum(first + cmp_len, block * j + block) - torch.maximum(first, block * j)
    score = p @ (shared.clamp(min=0) // cmp_stride).to(p.dtype)  # [Hkv, Nq, blocks]
    own = (layout.query_pos // block)[:, None]
    always = (j < init_blocks) | (j > own - local_blocks)
    score = torch.where(always, torch.inf, score)
    score = torch.where(j <= own, score, -torch.inf)
    # A stable sort gives ties to the lower index.
    best = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :topk]
    best = torch.where(best <= own, best, SKIPPED).sort(dim=-1).values
    best = torch.where(best == SKIPPED, -1, best)
    return F.pad(best, (0, topk - best.shape[-1]), value=-1).to(torch.int32)


def selected_mask(layout, block_indices, block):
    """Returns [Hkv, Nq, N]: whether a query sees a key of its selected blocks, up to the query itself."""
    num_blocks = (layout.key_pos.shape[0] + block - 1) // block
    slots = torch.where(block_indices < 0, num_blocks, block_indices).long()
    selected = torch.zeros(*slots.shape[:2], num_blocks + 1, dtype=torch.bool, device=slots.device)
    selected = selected.scatter(2, slots, True)
    return selected[:, :, layout.key_pos // block] & layout.visible("causal")


def _compute(*tensors):
    """Returns the tensors in the type in which the first one is computed."""
    dtype = compute_dtype(tensors[0].dtype)
    return [None if t is None else t.to(dtype) for t in tensors]


def attention(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, cmp_len, cmp_stride, window, scale):
    """Computes attention under a visibility rule. Returns o and lse; flash_sparse_attention.attention has the shapes."""
    layout = BatchLayout(cu_seqlens, segments, q.shape[0], num_keys, cmp_len, cmp_stride)
    dtype = q.dtype
    q, k, v = _compute(q, k, v)
    if rule == "compressed":
        k, v = k[: num_keys // cmp_stride], v[: num_keys // cmp_stride]
        # Rows after the last window may be uninitialized: 0 * NaN would be NaN.
        k, v = (torch.where(layout.is_window[:, None, None], x, 0) for x in (k, v))
    q = rotate(q, layout.query_pos, inv_freq)
    k = rotate(k, layout.key_pos, inv_freq)
    o, lse, _ = attend(q, k, v, layout.visible(rule, window, cmp_len), scale)
    return o.to(dtype), lse.contiguous()


def selected_attention(q, k, v, block_indices, cu_seqlens, segments, block, scale):
    """Computes the selected branch. Returns o and lse; flash_sparse_attention.selected_attention has the shapes."""
    layout = BatchLayout(cu_seqlens, segments, q.shape[0], k.shape[0])
    dtype = q.dtype
    q, k, v = _compute(q, k, v)
    o, lse, _ = attend(q, k, v, selected_mask(layout, block_indices, block), scale)
    return o.to(dtype), lse.contiguous()


def select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, cmp_len, cmp_stride, block, topk, init_blocks,
                  local_blocks, scale):  # fmt: skip
    """Computes the block selection from q, kc and lse_c. flash_sparse_attention.select_blocks has the shapes."""
    layout = BatchLayout(cu_seqlens, segments, q.shape[0], num_keys, cmp_len, cmp_stride)
    q, kc, lse_c = _compute(q, kc, lse_c)
    kv_heads = kc.shape[1]
    kc = kc[: num_keys // cmp_stride].repeat_interleave(q.shape[1] // kv_heads, dim=1)
    score = scale * torch.einsum("qhd,khd->hqk", q, kc)
    p = torch.where(layout.visible("compressed", cmp_len=cmp_len), torch.exp(score - lse_c.T[..., None]), 0)
    p = p.unflatten(0, (kv_heads, -1)).sum(1)
    return select(layout, p, cmp_len, cmp_stride, block, topk, init_blocks, local_blocks)


def native_sparse_attention(q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, cmp_len,
                            cmp_stride, block, topk, init_blocks, local_blocks, window, scale):  # fmt: skip
    """Computes native sparse attention, all steps. Returns o and the block indices [Hkv, Nq, topk];
    flash_sparse_attention.native_sparse_attention has the shapes. block_indices None: blocks are selected."""
    layout = BatchLayout(cu_seqlens, segments, q.shape[0], k.shape[0], cmp_len, cmp_stride)
    dtype = q.dtype
    q, k, v, gate_logits, *phi = _compute(q, k, v, gate_logits, wk, pe, wv)
    kc, vc = compress(layout, k, v, cmp_len, phi, inv_freq)
    q, k = rotate(q, layout.query_pos, inv_freq), rotate(k, layout.key_pos, inv_freq)
    o_c, _, p = attend(q, kc, vc, layout.visible("compressed", cmp_len=cmp_len), scale)
    if block_indices is None:
        p = p.detach().unflatten(0, (k.shape[1], -1)).sum(1)
        block_indices = select(layout, p, cmp_len, cmp_stride, block, topk, init_blocks, local_blocks)
    o_s, _, _ = attend(q, k, v, selected_mask(layout, block_indices, block), scale)
    o_w, _, _ = attend(q, k, v, layout.visible("window", window), scale)
    if gate_logits.dim() == 2:  # one gate for all heads of a token
        gate_logits = gate_logits[:, None]
    gate = torch.sigmoid(gate_logits)[..., None]
    o = gate[:, :, 0] * o_c + gate[:, :, 1] * o_s + gate[:, :, 2] * o_w
    return o.to(dtype), block_indices
