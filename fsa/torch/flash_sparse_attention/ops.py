"""The operators of libfsa for PyTorch: torch.ops.flash_sparse_attention.*. Here are their schemas, their kernels for fake
tensors and those for the CPU (reference.py); cuda.py has those for the GPU (libfsa). All kernels check their arguments,
and a backward pass is an operator of its own.

Shapes: N keys (tokens), Nq queries, Hq query heads, Hkv KV heads, d channels of a head, T = topk blocks of a query.
"""

import torch

from . import checks, reference

_LIBRARY = torch.library.Library("flash_sparse_attention", "DEF")
_BATCH = "Tensor cu_seqlens, Tensor segments"
_PHI = "Tensor? wk, Tensor? pe, Tensor? wv"
_SCHEMAS = {
    # sizes: cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window. Returns o, saved.
    "nsa_forward": f"(Tensor q, Tensor k, Tensor v, Tensor gate_logits, {_PHI}, {_BATCH}, Tensor? inv_freq, "
    "Tensor? block_indices, int[] sizes, float scale, bool recompute) -> (Tensor, Tensor)",
    # Returns dq, dk, dv, dgate_logits, and dwk, dpe, dwv one after another in one array: so they need one memset.
    "nsa_backward": f"(Tensor dout, Tensor k, Tensor v, Tensor gate_logits, {_PHI}, {_BATCH}, Tensor? inv_freq, "
    "Tensor saved, int[] sizes, float scale, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # sizes: block, init_blocks, local_blocks. Returns o, lse.
    "selected_forward": f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_BATCH}, int[] sizes, float scale) "
    "-> (Tensor, Tensor)",
    "selected_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor block_indices, "
    f"{_BATCH}, int[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
    # sizes: cmp_len, cmp_stride, block, topk, init_blocks, local_blocks. Returns the block indices.
    "select_blocks": f"(Tensor q, Tensor kc, Tensor lse_c, {_BATCH}, SymInt num_keys, int[] sizes, float scale) "
    "-> Tensor",
    # sizes: cmp_len, cmp_stride, window. Returns o, lse.
    "attention_forward": f"(Tensor q, Tensor k, Tensor v, {_BATCH}, Tensor? inv_freq, str rule, SymInt num_keys, "
    "int[] sizes, float scale) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_BATCH}, "
    "Tensor? inv_freq, str rule, SymInt num_keys, int[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)


def kernel(name, key):
    """Registers a function as the kernel of an operator for a dispatch key, or as its fake."""

    def register(function):
        if key == "fake":
            torch.library.register_fake(f"flash_sparse_attention::{name}", function, lib=_LIBRARY)
            return function
        if key == "CPU":  # reference.py chooses its own types
            function = torch.autocast("cpu", enabled=False)(function)
        _LIBRARY.impl(name, function, key)
        return function

    return register


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _round_up(num_bytes):
    return (num_bytes + 255) // 256 * 256


def saved_bytes(q, k, cmp_stride, topk, recompute):
    """Returns the bytes of `saved`: fsa_saved_size of fsa.h, as a formula of the shapes. The first array is q, the last one
    the block indices."""
    num_queries, q_heads, d = q.shape
    q_bytes = num_queries * q_heads * d * q.dtype.itemsize
    k_bytes, kc_bytes = (
        n * k.shape[1] * d * k.dtype.itemsize for n in (k.shape[0], k.shape[0] // cmp_stride)
    )
    outputs = 1 if recompute else 4  # q, and the outputs of three branches
    return (
        outputs * _round_up(q_bytes) + _round_up(k_bytes) + 2 * _round_up(kc_bytes)
        + 3 * _round_up(num_queries * q_heads * 4) + _round_up(k.shape[1] * num_queries * topk * 4)
    )  # fmt: skip


def saved_block_indices(saved, kv_heads, num_queries, topk):
    """Returns the block indices [Hkv, Nq, T] inside `saved`, a view."""
    num_bytes = kv_heads * num_queries * topk * 4
    start = saved.shape[0] - _round_up(num_bytes)
    return saved[start : start + num_bytes].view(torch.int32).view(kv_heads, num_queries, topk)


def phi_layouts(*weights):
    """Returns where the array that nsa_backward returns holds the gradients of wk, pe and wv, packed whatever the weights'
    strides are: a list of (shape, strides, offset), or None for a weight that is None; and the number of elements."""
    layouts, size = [], 0
    for w in weights:
        if w is None:
            layouts.append(None)
            continue
        _, rows, d = w.shape
        layouts.append((w.shape, (rows * d, d, 1), size))
        size += w.numel()
    return layouts, size


def new_lse(q):
    return q.new_empty(q.shape[:2], dtype=reference.compute_dtype(q.dtype))


def new_like(x):
    """Returns a contiguous tensor of the shape, type and device of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---- kernels for fake tensors, and for the CPU -----------------------------------------------------------------------


def _scale(scale, q):
    return scale or q.shape[2] ** -0.5


def _gradients(function, dout, *inputs):
    """Returns the gradients of function(*inputs), whose first output has the gradient dout, for the inputs that are
    not None; an empty tensor for the others."""
    # A kernel that a dispatch mode calls runs below autograd, which the guard undoes.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        o = function(*leaves)[0]
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(o, given, dout, allow_unused=True, materialize_grads=True))
    return tuple(dout.new_empty(0) if x is None else next(found).contiguous() for x in leaves)


@kernel("nsa_forward", "fake")
def _(*arguments):
    checks.nsa(*arguments)
    q, k, *_, sizes, _, recompute = arguments
    return new_like(q), q.new_empty(saved_bytes(q, k, sizes[1], sizes[3], recompute), dtype=torch.uint8)


@kernel("nsa_forward", "CPU")
def _nsa_forward(q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale,
      recompute):  # fmt: skip
    inputs = q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices
    checks.nsa(*inputs, sizes, scale, recompute)
    checks.batch_values(q, k.shape[0], cu_seqlens, segments)
    if block_indices is not None:
        checks.block_values(block_indices, cu_seqlens, segments, k.shape[0], sizes[2], *sizes[4:6])
    o, block_indices = reference.native_sparse_attention(*inputs, *sizes, _scale(scale, q))
    saved = q.new_zeros(saved_bytes(q, k, sizes[1], sizes[3], recompute), dtype=torch.uint8)
    saved[: q.numel() * q.dtype.itemsize].view(q.dtype).view(q.shape).copy_(q)
    saved_block_indices(saved, k.shape[1], q.shape[0], sizes[3]).copy_(block_indices)
    return o.contiguous(), saved


@kernel("nsa_backward", "fake")
def _(dout, k, v, gate_logits, wk, pe, wv, *_):
    return *map(new_like, (dout, k, v, gate_logits)), dout.new_empty(phi_layouts(wk, pe, wv)[1])


@kernel("nsa_backward", "CPU")
def _nsa_backward(
    dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved, sizes, scale, recompute
):
    q = saved[: dout.numel() * dout.dtype.itemsize].view(dout.dtype).view(dout.shape)
    rest = cu_seqlens, segments, inv_freq, saved_block_indices(saved, k.shape[1], q.shape[0], sizes[3])
    function = lambda *x: reference.native_sparse_attention(*x, *rest, *sizes, _scale(scale, q))  # noqa: E731
    *gradients, dwk, dpe, dwv = _gradients(function, dout, q, k, v, gate_logits, wk, pe, wv)
    return *gradients, torch.cat([x.flatten() for x in (dwk, dpe, dwv)])


@kernel("selected_forward", "fake")
def _(*arguments):
    checks.selected(*arguments)
    return new_like(arguments[0]), new_lse(arguments[0])


@kernel("selected_forward", "CPU")
def _selected_forward(*arguments):
    checks.selected(*arguments)
    *inputs, sizes, scale = arguments
    num_keys, block_indices, batch = inputs[1].shape[0], inputs[3], inputs[4:6]
    checks.batch_values(inputs[0], num_keys, *batch)
    checks.block_values(block_indices, *batch, num_keys, *sizes)
    o, lse = reference.selected_attention(*inputs, sizes[0], _scale(scale, inputs[0]))
    return o.contiguous(), lse


@kernel("selected_backward", "fake")
def _(dout, q, k, v, *_):
    return tuple(map(new_like, (q, k, v)))


@kernel("selected_backward", "CPU")
def _selected_backward(dout, q, k, v, o, lse, block_indices, cu_seqlens, segments, sizes, scale):
    rest = block_indices, cu_seqlens, segments, sizes[0], _scale(scale, q)
    return _gradients(lambda *x: reference.selected_attention(*x, *rest), dout, q, k, v)


@kernel("select_blocks", "fake")
def _(*arguments):
    checks.select_blocks(*arguments)
    q, kc, *_, sizes, _ = arguments
    return q.new_empty(kc.shape[1], q.shape[0], sizes[3], dtype=torch.int32)


@kernel("select_blocks", "CPU")
def _select_blocks(*arguments):
    checks.select_blocks(*arguments)
    *inputs, sizes, scale = arguments
    checks.batch_values(inputs[0], inputs[5], *inputs[3:5])
    return reference.select_blocks(*inputs, *sizes, _scale(scale, inputs[0]))


@kernel("attention_forward", "fake")
def _(*arguments):
    checks.attention(*arguments)
    return new_like(arguments[0]), new_lse(arguments[0])


@kernel("attention_forward", "CPU")
def _attention_forward(*arguments):
    checks.attention(*arguments)
    *inputs, sizes, scale = arguments
    checks.batch_values(inputs[0], inputs[7], *inputs[3:5])
    o, lse = reference.attention(*inputs, *sizes, _scale(scale, inputs[0]))
    return o.contiguous(), lse


@kernel("attention_backward", "fake")
def _(dout, q, k, v, *_):
    return tuple(map(new_like, (q, k, v)))


@kernel("attention_backward", "CPU")
def _attention_backward(dout, q, k, v, o, lse, *rest):
    *rest, sizes, scale = rest
    return _gradients(lambda *x: reference.attention(*x, *rest, *sizes, _scale(scale, q)), dout, q, k, v)
