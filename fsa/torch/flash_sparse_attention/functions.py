"""Differentiable functions around the operators of ops.py."""

import torch

from . import checks, cuda
from .ops import phi_layouts, saved_block_indices

_OPS = torch.ops.flash_sparse_attention

# ---- autograd --------------------------------------------------------------------------------------------------------

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_INTEGERS = frozenset((int, bool))


def _unwatched():
    """Returns whether nothing traces or watches operators: no compiler, no mode of PyTorch's dispatcher, no profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _on_gpu(x):
    return isinstance(x, torch.Tensor) and x.is_cuda


def _direct(q, tensors):
    """Returns whether the kernels for the GPU may be called without PyTorch's dispatcher, which takes 10 us a call: no tensor
    is of a subclass."""
    return _on_gpu(q) and _unwatched() and _PLAIN.issuperset(map(type, tensors))


def _refuse_create_graph():
    """Refuses a backward pass that autograd records for a gradient of a gradient. PyTorch's once_differentiable is not enough:
    its error does not reach torch.autograd.grad, which returns None. The backends of torch.compile refuse it themselves,
    but for "eager"."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("create_graph=True: must be False, as attention has no gradient of a gradient; "
                           "try flash_sparse_attention.reference")  # fmt: skip


def _second_output(ctx, second):
    """Says that the second output of a function has no gradient, and that PyTorch makes no zeros in its place. A gradient
    of o that is undefined is None then. torch.compile does so anyway."""
    ctx.mark_non_differentiable(second)
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class _NativeSparseAttention(torch.autograd.Function):
    """Returns o, and with return_saved also `saved`.

    call: (plan, rest, return_saved); plan: cuda.nsa_plan(tensors, rest), to call the kernels for the GPU; None: to call the
    operators.
    """

    @staticmethod
    def forward(ctx, call, q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq,
                block_indices):  # fmt: skip
        plan, rest, return_saved = ctx.call = call
        tensors = q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices
        o, saved = _OPS.nsa_forward(*tensors, *rest) if plan is None else cuda.nsa_forward(plan, *tensors)
        ctx.save_for_backward(k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved)
        if not return_saved:
            return o
        _second_output(ctx, saved)
        return o, saved

    @staticmethod
    def backward(ctx, dout, *_):
        _refuse_create_graph()
        if dout is None:
            return (None,) * 12
        plan, rest, _ = ctx.call
        tensors = ctx.saved_tensors  # once: checkpointing unpacks a tensor only once
        if plan is not None and _unwatched():
            *gradients, dphi = cuda.nsa_backward(plan, dout, *tensors, *rest)
            layouts = plan.phi_layouts
        else:
            *gradients, dphi = _OPS.nsa_backward(dout, *tensors, *rest)
            layouts, _ = phi_layouts(*tensors[3:6])
        weights = [None if x is None else dphi.as_strided(*x) for x in layouts]
        return None, *gradients, *weights, None, None, None, None


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
        o, lse = _OPS.selected_forward(q, k, v, block_indices, cu_seqlens, segments, sizes, scale)
        _second_output(ctx, lse)
        ctx.save_for_backward(q, k, v, o, lse, block_indices, cu_seqlens, segments)
        ctx.rest = sizes, scale
        return o, lse

    @staticmethod
    def backward(ctx, dout, _):
        _refuse_create_graph()
        if dout is None:
            return (None,) * 8
        dq, dk, dv = _OPS.selected_backward(dout, *ctx.saved_tensors, *ctx.rest)
        return dq, dk, dv, None, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
        o, lse = _OPS.attention_forward(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale)
        _second_output(ctx, lse)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, segments, inv_freq)
        ctx.rest = rule, num_keys, sizes, scale
        return o, lse

    @staticmethod
    def backward(ctx, dout, _):
        _refuse_create_graph()
        if dout is None:
            return (None,) * 10
        dq, dk, dv = _OPS.attention_backward(dout, *ctx.saved_tensors, *ctx.rest)
        return dq, dk, dv, None, None, None, None, None, None, None


# ---- functions -------------------------------------------------------------------------------------------------------


def whole_sequences(cu_seqlens):
    """Returns the segments of a batch whose queries are all its tokens: (sequence, 0, its length) for each sequence.

    The functions below make them if `segments` is None, by a few small kernels. A caller with many layers can make
    them once.

    Args:
        cu_seqlens: int [num_seqs + 1], first token of each sequence, then the number of tokens.

    Returns:
        int64 [num_seqs, 3].

    Raises:
        ValueError, TypeError: cu_seqlens is no int tensor of one axis, or empty.
    """
    checks.batch(cu_seqlens, cu_seqlens, None)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.stack(
        [torch.arange(lengths.shape[0], device=lengths.device), torch.zeros_like(lengths), lengths], 1
    )


def _require_tensors(names, *tensors):
    for name, x in zip(names, tensors):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} {type(x).__name__}: must be a tensor")
        if x.dim() == 0:
            raise ValueError(f"{name} of shape (): must have a dimension for tokens")


def _require_optional(**tensors):
    for name, x in tensors.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} {type(x).__name__}: must be a tensor or None")


def _cast(*tensors):
    """Returns the tensors, under autocast in its type. As everywhere in autocast, float64 stays."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _batch(q, num_keys, cu_seqlens, segments):
    """Completes a batch. Returns cu_seqlens and segments; they are int64 and contiguous if their type is right."""
    if cu_seqlens is None:
        cu_seqlens = num_keys * torch.arange(2, device=q.device)
    if segments is not None:
        checks.batch(q, cu_seqlens, segments)
    else:
        if q.shape[0] != num_keys:
            raise ValueError(
                f"segments None: must be given, as q has {q.shape[0]} rows and there are {num_keys} keys"
            )
        checks.batch(q, cu_seqlens, None)
        segments = whole_sequences(cu_seqlens)
    return _int64(cu_seqlens), _int64(segments)


def _int64(x):
    return x.contiguous() if x.dtype != torch.int32 else x.long()


def native_sparse_attention(q, k, v, gate_logits, wk=None, pe=None, wv=None, cu_seqlens=None, *, inv_freq=None,
                            segments=None, block_indices=None, cmp_len=32, cmp_stride=16, block=64, topk=16,
                            init_blocks=1, local_blocks=2, window=512, scale=None, recompute=False, check=None,
                            return_block_indices=False):  # fmt: skip
    """Computes native sparse attention: the gated sum of the compressed, the selected and the sliding branch.

    o = sigmoid(l_c) O_c + sigmoid(l_s) O_s + sigmoid(l_w) O_w (NSA, arXiv 2502.11089, equation 5; all equations are in
    fsa/README.md). Differentiable in q, k, v, gate_logits, wk, pe and wv. No gradient flows through the block
    selection. On a GPU q, k, v and gate_logits may be views: a token's row must be contiguous, and the stride from a
    row to the next a multiple of 8 (gate_logits: any), as of slices of one QKV matmul.

    Args:
        q: [Nq, Hq, d], bf16 or fp16 on a GPU with d = 64 or 128, any float type on the CPU. Before RoPE if inv_freq is
            given.
        k, v: [N, Hkv, d], same type. Hq is a multiple of Hkv, at most 16 times.
        gate_logits: [Nq, Hq, 3], or [Nq, 3] for all heads: compressed, selected, sliding; before the sigmoid.
        wk, wv: [Hkv, cmp_len*d, d], weights of the linear compression; row r*d + c multiplies channel c of the
            window's token r. None: a window is compressed to its mean.
        pe: [Hkv, cmp_len, d], added to the keys of a window before wk, or None.
        cu_seqlens: int [num_seqs + 1], first token of each sequence, then N; int64 saves a conversion. None: one
            sequence.
        inv_freq: [d/2] float64, radians per token (see `rope_frequencies`): q and k are rotated, the compressed keys
            to the start of their window. None: no RoPE; rotate q and k before, then the compression sees rotated keys.
        segments: int [num_segments, 3], (sequence, position of the first query, number of queries), ascending: q holds
            these queries. None: all tokens are queries.
        block_indices: int32 [Hkv, Nq, topk], blocks to attend to, as of `selected_attention`. None: they are selected.
        cmp_len, cmp_stride: tokens of a compression window, and between the starts of windows.
        block, topk: tokens of a block, and blocks of a query, of which the first `init_blocks` of the sequence and the
            last `local_blocks` are always selected.
        window: tokens of the sliding branch.
        scale: factor of q.k before softmax. None: 1/sqrt(d).
        recompute: backward computes the branches again, so that forward saves a third of the memory.
        check: check the values of cu_seqlens, segments and block_indices; waits for the GPU. None: if FSA_CHECK=1 is in
            the environment. On the CPU they are always checked.
        return_block_indices: return the block indices too.

    Returns:
        o [Nq, Hq, d]; with return_block_indices a tuple of o and the block indices int32 [Hkv, Nq, topk].

    Raises:
        ValueError, TypeError: an argument breaks its rule.
        RuntimeError: the library is missing, the GPU is too old, or CUDA fails.
    """
    tensors = q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices
    sizes = cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window
    rest = sizes, checks.scale(scale), recompute
    direct, plan = _direct(q, tensors), None
    if direct and not (torch.is_autocast_enabled("cuda") or checks.wanted(check)):
        if _INTEGERS.issuperset(map(type, (*sizes, recompute))):  # 16.0 would find the plan of 16
            plan = cuda.known_nsa_plan(tensors, rest)
    if plan is None:  # else this layout needs no checks and no conversions
        _require_tensors(("q", "k", "v", "gate_logits"), q, k, v, gate_logits)
        _require_optional(wk=wk, pe=pe, wv=wv, inv_freq=inv_freq, block_indices=block_indices)
        checks.integers(cmp_len=cmp_len, cmp_stride=cmp_stride, block=block, topk=topk, init_blocks=init_blocks,
                        local_blocks=local_blocks, window=window)  # fmt: skip
        checks.recompute(recompute)
        cu_seqlens, segments = _batch(q, k.shape[0], cu_seqlens, segments)
        tensors = *_cast(*tensors[:7]), cu_seqlens, segments, inv_freq, block_indices
        if checks.wanted(check):
            checks.nsa(*tensors, *rest)
            checks.batch_values(q, k.shape[0], cu_seqlens, segments)
            if block_indices is not None:
                checks.block_values(
                    block_indices, cu_seqlens, segments, k.shape[0], block, init_blocks, local_blocks
                )
        plan = cuda.nsa_plan(tensors, rest) if direct else None
    output = _NativeSparseAttention.apply((plan, rest, return_block_indices), *tensors)
    if not return_block_indices:
        return output
    o, saved = output
    return o, saved_block_indices(saved, k.shape[1], q.shape[0], topk).clone()  # a view would keep all of `saved`


def selected_attention(q, k, v, block_indices, cu_seqlens=None, *, segments=None, block=64, init_blocks=0,
                       local_blocks=0, scale=None, check=None, return_lse=False):  # fmt: skip
    """Computes the selected branch alone: softmax attention over the tokens of a query's blocks, up to the query itself.

    NSA, "Token Selection", in the loop order of FSA (arXiv 2508.18224). Differentiable in q, k and v.

    Args:
        q, k, v: as of `native_sparse_attention`, after RoPE.
        block_indices: int32 [Hkv, Nq, T], ascending block numbers in the query's sequence, not after its own block, then
            -1.
        cu_seqlens, segments, scale, check: as of `native_sparse_attention`.
        block: tokens of a block, a multiple of 16.
        init_blocks, local_blocks: say that every list contains the first and the last so many blocks up to the query's
            own, as those of `select_blocks` do. Hopper computes these blocks without reading the list. 0: any list.
        return_lse: return the lse too.

    Returns:
        o [Nq, Hq, d]; with return_lse a tuple of o and lse [Nq, Hq], the natural log-sum-exp, -inf for a query without
        blocks. lse is float32 (float64 for float64 inputs) and has no gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
    """
    _require_tensors(("q", "k", "v", "block_indices"), q, k, v, block_indices)
    checks.integers(block=block, init_blocks=init_blocks, local_blocks=local_blocks)
    q, k, v = _cast(q, k, v)
    cu_seqlens, segments = _batch(q, k.shape[0], cu_seqlens, segments)
    sizes = [block, init_blocks, local_blocks]
    arguments = (q, k, v, block_indices, cu_seqlens, segments, sizes, checks.scale(scale))
    if checks.wanted(check):
        checks.selected(*arguments)
        checks.batch_values(q, k.shape[0], cu_seqlens, segments)
        checks.block_values(block_indices, cu_seqlens, segments, k.shape[0], block, init_blocks, local_blocks)
    o, lse = _SelectedAttention.apply(*arguments)
    return (o, lse) if return_lse else o


@torch.no_grad()
def select_blocks(q, kc, lse_c, cu_seqlens=None, *, segments=None, num_keys=None, cmp_len=32, cmp_stride=16, block=64,
                  topk=16, init_blocks=1, local_blocks=2, scale=None, check=None):  # fmt: skip
    """Selects the blocks of each query by the probabilities of the compressed branch (NSA, equations 8 to 12).

    A query gets min(topk, blocks up to its own) blocks: the initial and local ones, and of the others those with the
    greatest scores; ties go to the lower index.

    Args:
        q: [Nq, Hq, d], after RoPE.
        kc: [M, Hkv, d], compressed keys after RoPE, by sequence, with at least num_keys // cmp_stride rows. Rows after
            the last window are not used. `reference.compress` computes them; see the example.
        lse_c: [Nq, Hq] float32 (float64 for float64 inputs), of `attention` with rule="compressed", return_lse=True.
        num_keys: tokens of the batch. None: the rows of q.
        Others: as of `native_sparse_attention`.

    Returns:
        int32 [Hkv, Nq, topk], ascending block numbers in the query's sequence, then -1.

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.

    Example, without RoPE and with mean compression:
        layout = reference.BatchLayout(cu_seqlens, whole_sequences(cu_seqlens), len(q), len(k), cmp_len=32, cmp_stride=16)
        kc, vc = reference.compress(layout, k, v, cmp_len=32)
        o_c, lse_c = attention(q, kc, vc, cu_seqlens, rule="compressed", return_lse=True)
        block_indices = select_blocks(q, kc, lse_c, cu_seqlens)
    """
    _require_tensors(("q", "kc", "lse_c"), q, kc, lse_c)
    q, kc = _cast(q, kc)
    num_keys = q.shape[0] if num_keys is None else num_keys
    checks.integers(num_keys=num_keys, cmp_len=cmp_len, cmp_stride=cmp_stride, block=block, topk=topk,
                    init_blocks=init_blocks, local_blocks=local_blocks)  # fmt: skip
    cu_seqlens, segments = _batch(q, num_keys, cu_seqlens, segments)
    sizes = [cmp_len, cmp_stride, block, topk, init_blocks, local_blocks]
    arguments = (q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, checks.scale(scale))
    if checks.wanted(check):
        checks.select_blocks(*arguments)
        checks.batch_values(q, num_keys, cu_seqlens, segments)
    return _OPS.select_blocks(*arguments)


def attention(q, k, v, cu_seqlens=None, *, rule="causal", window=None, inv_freq=None, segments=None, num_keys=None,
              cmp_len=32, cmp_stride=16, scale=None, check=None, return_lse=False):  # fmt: skip
    """Computes o = softmax(scale q k^T) v over the keys that a query sees. Differentiable in q, k and v.

    Args:
        q, k, v: as of `native_sparse_attention`. For rule="compressed", k and v are the compressed keys and values
            [M, Hkv, d] with at least num_keys // cmp_stride rows; rows after the last window are not used.
        rule: "causal": a query at position t sees tokens 0 to t; "window": tokens t - window + 1 to t; "compressed":
            windows i with cmp_stride*i + cmp_len - 1 <= t.
        window: tokens of rule="window"; needed there, and None otherwise.
        inv_freq: [d/2] float64, radians per token: RoPE of q and k. None: none; must be None for rule="compressed".
        num_keys: tokens of the batch for rule="compressed". None: the rows of q. Otherwise the rows of k.
        cmp_len, cmp_stride: of rule="compressed".
        cu_seqlens, segments, scale, check: as of `native_sparse_attention`.
        return_lse: return the lse too.

    Returns:
        o [Nq, Hq, d]; with return_lse a tuple of o and lse [Nq, Hq], the natural log-sum-exp, -inf for a query that sees
        no key, whose o is 0. lse is float32 (float64 for float64 inputs) and has no gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
    """
    _require_tensors("qkv", q, k, v)
    _require_optional(inv_freq=inv_freq)
    checks.visibility(rule)
    q, k, v = _cast(q, k, v)
    if (rule == "window") != (window is not None):
        raise ValueError(
            f"window {window}: must be given for rule='window', and for no other rule; rule is {rule!r}"
        )
    if rule == "compressed":
        num_keys = q.shape[0] if num_keys is None else num_keys
    else:
        num_keys, cmp_len, cmp_stride = k.shape[0], 16, 16
    checks.integers(num_keys=num_keys, cmp_len=cmp_len, cmp_stride=cmp_stride, window=1 if window is None else window)
    cu_seqlens, segments = _batch(q, num_keys, cu_seqlens, segments)
    sizes = [cmp_len, cmp_stride, 1 if window is None else window]
    arguments = (q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, checks.scale(scale))
    if checks.wanted(check):
        checks.attention(*arguments)
        checks.batch_values(q, num_keys, cu_seqlens, segments)
    o, lse = _Attention.apply(*arguments)
    return (o, lse) if return_lse else o


def FSA_topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):
    """Computes the selected branch, with the signature of the FSA project (arXiv 2508.18224).

    Args:
        q: [N, Hq, d]. k, v: [N, Hkv, d].
        topk_idx: int32 or int64 [Hkv, N, T], as `block_indices` of `selected_attention` and as that project makes them:
            ascending, then -1. FSA_CHECK=1 in the environment checks that; on the CPU it is always checked.
        block_size: tokens of a block, a multiple of 16.
        cu_seqlens: int32 or int64 [num_seqs + 1].
        softmax_scale: None: 1/sqrt(d).

    Returns:
        o [N, Hq, d].

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
    """
    _require_tensors(("q", "k", "v", "topk_idx"), q, k, v, topk_idx)
    checks.of_type(q, "topk_idx", topk_idx, torch.int32, torch.int64)
    if type(topk_idx) is torch.Tensor and checks.wanted(topk_idx.is_cpu or None):  # a fake tensor has no values
        checks.block_range("topk_idx", topk_idx)
    return selected_attention(q, k, v, topk_idx.to(torch.int32).contiguous(), cu_seqlens, block=block_size,
                              scale=softmax_scale)  # fmt: skip
