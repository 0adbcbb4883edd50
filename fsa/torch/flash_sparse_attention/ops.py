"""The operators of libfsa for PyTorch: torch.ops.flash_sparse_attention.*, and differentiable functions around them.

Each operator has a kernel for CUDA (libfsa), one for the CPU (reference.py) and one for fake tensors. A backward pass is
an operator of its own; an autograd.Function ties the two together. Workspaces come from PyTorch's allocator, on the
current stream.

Shapes: N keys (tokens), Nq queries, Hq query heads, Hkv KV heads, d channels of a head, T = topk blocks of a query.
"""

import contextlib
import functools
import math

import torch
from torch.autograd.function import once_differentiable

from . import checks, reference
from . import library as lib

_LIBRARY = torch.library.Library("flash_sparse_attention", "DEF")
_OPS = torch.ops.flash_sparse_attention
_BATCH = "Tensor cu_seqlens, Tensor segments"
_PHI = "Tensor? wk, Tensor? pe, Tensor? wv"
_SCHEMAS = {
    # sizes: cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window. Returns o, saved.
    "nsa_forward": f"(Tensor q, Tensor k, Tensor v, Tensor gate_logits, {_PHI}, {_BATCH}, Tensor? inv_freq, "
    "Tensor? block_indices, SymInt[] sizes, float scale, bool recompute) -> (Tensor, Tensor)",
    # Returns dq, dk, dv, dgate_logits, dwk, dpe, dwv; a gradient of a weight that is None is empty.
    "nsa_backward": f"(Tensor dout, Tensor k, Tensor v, Tensor gate_logits, {_PHI}, {_BATCH}, Tensor? inv_freq, "
    "Tensor saved, SymInt[] sizes, float scale, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # sizes: block, init_blocks, local_blocks. Returns o, lse.
    "selected_forward": f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {_BATCH}, SymInt[] sizes, float scale) "
    "-> (Tensor, Tensor)",
    "selected_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor block_indices, "
    f"{_BATCH}, SymInt[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
    # sizes: cmp_len, cmp_stride, block, topk, init_blocks, local_blocks. Returns the block indices.
    "select_blocks": f"(Tensor q, Tensor kc, Tensor lse_c, {_BATCH}, SymInt num_keys, SymInt[] sizes, float scale) "
    "-> Tensor",
    # sizes: cmp_len, cmp_stride, window. Returns o, lse.
    "attention_forward": f"(Tensor q, Tensor k, Tensor v, {_BATCH}, Tensor? inv_freq, str rule, SymInt num_keys, "
    "SymInt[] sizes, float scale) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_BATCH}, "
    "Tensor? inv_freq, str rule, SymInt num_keys, SymInt[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)


def _kernel(name, key):
    """Registers a function as the kernel of an operator for a dispatch key, or as its fake."""

    def register(function):
        if key == "fake":
            torch.library.register_fake(f"flash_sparse_attention::{name}", function, lib=_LIBRARY)
        else:
            _LIBRARY.impl(name, function, key)
        return function

    return register


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _round_up(num_bytes):
    return (num_bytes + 255) // 256 * 256


def _saved_bytes(q, k, cmp_stride, topk, recompute):
    """Returns the bytes of `saved`. On a GPU: fsa_saved_size of fsa.h, as a formula of the shapes. On the CPU: q, and
    the block indices. The block indices are the last array in both."""
    num_queries, q_heads, d = q.shape
    indices = _round_up(k.shape[1] * num_queries * topk * 4)
    q_bytes = num_queries * q_heads * d * q.dtype.itemsize
    if q.device.type == "cpu":
        return _round_up(q_bytes) + indices
    k_bytes, kc_bytes = (n * k.shape[1] * d * 2 for n in (k.shape[0], k.shape[0] // cmp_stride))
    outputs = 1 if recompute else 4  # q, and the outputs of three branches
    return (
        outputs * _round_up(q_bytes) + _round_up(k_bytes) + 2 * _round_up(kc_bytes)
        + 3 * _round_up(num_queries * q_heads * 4) + indices
    )  # fmt: skip


def _saved_block_indices(saved, kv_heads, num_queries, topk):
    """Returns the block indices [Hkv, Nq, T] inside `saved`, a view."""
    num_bytes = kv_heads * num_queries * topk * 4
    start = saved.shape[0] - _round_up(num_bytes)
    return saved[start : start + num_bytes].view(torch.int32).view(kv_heads, num_queries, topk)


def _new_lse(q):
    return q.new_empty(q.shape[:2], dtype=reference.compute_dtype(q.dtype))


# ---- fake kernels ----------------------------------------------------------------------------------------------------


@_kernel("nsa_forward", "fake")
def _(
    q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale, recompute
):
    saved = q.new_empty(_saved_bytes(q, k, sizes[1], sizes[3], recompute), dtype=torch.uint8)
    return q.new_empty(q.shape), saved


@_kernel("nsa_backward", "fake")
def _(dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved, sizes, scale, recompute):
    weights = [dout.new_empty(0) if w is None else w.new_empty(w.shape) for w in (wk, pe, wv)]
    return (*(x.new_empty(x.shape) for x in (dout, k, v, gate_logits)), *weights)


@_kernel("selected_forward", "fake")
def _(q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
    return q.new_empty(q.shape), _new_lse(q)


@_kernel("selected_backward", "fake")
def _(dout, q, k, v, o, lse, block_indices, cu_seqlens, segments, sizes, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@_kernel("select_blocks", "fake")
def _(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    return q.new_empty(kc.shape[1], q.shape[0], sizes[3], dtype=torch.int32)


@_kernel("attention_forward", "fake")
def _(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    return q.new_empty(q.shape), _new_lse(q)


@_kernel("attention_backward", "fake")
def _(dout, q, k, v, o, lse, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


# ---- CPU kernels -----------------------------------------------------------------------------------------------------


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


@_kernel("nsa_forward", "CPU")
def _(
    q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale, recompute
):
    o, block_indices = reference.native_sparse_attention(
        q, k, v, gate_logits, (wk, pe, wv), cu_seqlens, segments, inv_freq, block_indices, *sizes, _scale(scale, q)
    )  # fmt: skip
    saved = q.new_zeros(_saved_bytes(q, k, sizes[1], sizes[3], recompute), dtype=torch.uint8)
    saved[: q.numel() * q.dtype.itemsize].view(q.dtype).view(q.shape).copy_(q)
    _saved_block_indices(saved, k.shape[1], q.shape[0], sizes[3]).copy_(block_indices)
    return o.contiguous(), saved


@_kernel("nsa_backward", "CPU")
def _(dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved, sizes, scale, recompute):
    q = saved[: dout.numel() * dout.dtype.itemsize].view(dout.dtype).view(dout.shape)
    block_indices = _saved_block_indices(saved, k.shape[1], q.shape[0], sizes[3])

    def forward(q, k, v, gate_logits, *phi):
        return reference.native_sparse_attention(q, k, v, gate_logits, phi, cu_seqlens, segments, inv_freq,
                                                 block_indices, *sizes, _scale(scale, q))  # fmt: skip

    return _gradients(forward, dout, q, k, v, gate_logits, wk, pe, wv)


@_kernel("selected_forward", "CPU")
def _(q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
    o, lse = reference.selected_attention(
        q, k, v, block_indices, cu_seqlens, segments, sizes[0], _scale(scale, q)
    )
    return o.contiguous(), lse


@_kernel("selected_backward", "CPU")
def _(dout, q, k, v, o, lse, block_indices, cu_seqlens, segments, sizes, scale):
    def forward(q, k, v):
        return reference.selected_attention(
            q, k, v, block_indices, cu_seqlens, segments, sizes[0], _scale(scale, q)
        )

    return _gradients(forward, dout, q, k, v)


@_kernel("select_blocks", "CPU")
def _(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    return reference.select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, *sizes, _scale(scale, q))


@_kernel("attention_forward", "CPU")
def _(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    o, lse = reference.attention(
        q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, *sizes, _scale(scale, q)
    )  # fmt: skip
    return o.contiguous(), lse


@_kernel("attention_backward", "CPU")
def _(dout, q, k, v, o, lse, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    def forward(q, k, v):
        return reference.attention(
            q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, *sizes, _scale(scale, q)
        )

    return _gradients(forward, dout, q, k, v)


# ---- CUDA kernels ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def _check_gpu(device):
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"GPU {device} of compute capability {major}.{minor}: must be at least 8.0 (Ampere)"
        )


@contextlib.contextmanager
def _on_device(device):
    """Makes the GPU current, and yields the handle of its current stream."""
    with torch.cuda.device(device):
        _check_gpu(device)
        yield torch.cuda.current_stream(device).cuda_stream


def _new_bytes(num_bytes, device):
    """Returns device memory whose address is a multiple of 256, as those of PyTorch's allocator are."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _rows(name, tensor, heads_axis=True, multiple=8):
    """Returns the pointer and the row stride of a tensor whose rows (all axes but the first) are contiguous.

    Raises:
        ValueError: a row is not contiguous, rows overlap, or the row stride is not a multiple of `multiple` elements.
    """
    row = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:])):
        if size != 1 and stride != row:
            raise ValueError(f"{name} of strides {tensor.stride()}: a token's row must be contiguous; "
                             f"try {name}.contiguous()")  # fmt: skip
        row *= size
    stride = tensor.stride(0) if tensor.shape[0] > 1 else 0  # 0: packed
    if tensor.shape[0] > 1 and (stride < row or stride % multiple):
        raise ValueError(f"{name} of row stride {stride}: must be at least {row}, the elements of a row, and a multiple "
                         f"of {multiple}; try {name}.contiguous()")  # fmt: skip
    return tensor.data_ptr(), stride


def _packed(name, tensor):
    """Returns the pointer of a contiguous tensor; None of None."""
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of strides {tensor.stride()}: must be contiguous; try {name}.contiguous()")
    return tensor.data_ptr()


def _dense_gradient(dout):
    """Returns dout, or a copy if the library cannot read its layout. Autograd makes such layouts, as an expanded one."""
    try:
        _rows("dout", dout)
    except ValueError:
        return dout.contiguous()
    return dout if dout.data_ptr() % 16 == 0 else dout.clone()


def _strided(**tensors):
    """Returns the fields NAME and NAME_stride of an argument struct for each tensor."""
    fields = {}
    for name, tensor in tensors.items():
        fields[name], fields[name + "_stride"] = _rows(name, tensor)
    return fields


def _gate(name, tensor):
    """Returns the fields of gate logits or their gradient."""
    pointer, stride = _rows(name + "_logits", tensor, multiple=1)
    return {name + "_logits": pointer, name + "_stride": stride}


class _Call:
    """A call of libfsa: configuration, batch and type, which all of its functions take."""

    def __init__(self, q, kv_heads, num_keys, cu_seqlens, segments, scale, **config):
        num_queries, q_heads, d = q.shape
        fields = dict(cmp_len=16, cmp_stride=16, block=64, topk=1, window=1)
        fields.update(config)
        self.config = lib.FsaConfig(q_heads=q_heads, kv_heads=kv_heads, head_dim=d, scale=scale, **fields)
        self.batch = lib.FsaDeviceBatch(
            num_queries=num_queries,
            num_keys=num_keys,
            num_seqs=cu_seqlens.shape[0] - 1,
            num_segments=segments.shape[0],
            cu_seqlens=_packed("cu_seqlens", cu_seqlens),
            segments=_packed("segments", segments),
        )
        self.dtype = lib.BF16 if q.dtype == torch.bfloat16 else lib.FP16
        self.device = q.device
        self.library = lib.load()

    def saved_bytes(self):
        if self.batch.num_keys == 0:
            return 0
        size = self.library.fsa_saved_size(self.config, self.dtype, self.batch)
        return size or lib.fail(0)

    def run(self, function, operation, arguments):
        """Calls a function of libfsa with its argument struct, and a workspace for the operation."""
        if self.batch.num_keys == 0:  # the outputs are empty, and so are the inputs, whose pointers are NULL
            return
        with _on_device(self.device) as stream:
            size = self.library.fsa_workspace_size(self.config, self.dtype, self.batch, operation)
            workspace = _new_bytes(size or lib.fail(0), self.device)
            arguments.workspace, arguments.workspace_bytes = workspace.data_ptr(), size
            status = function(self.config, self.dtype, self.batch, arguments, stream)
        if status:
            lib.fail(status)


def _nsa_call(q, k, wk, cu_seqlens, segments, gate_logits, sizes, scale, recompute):
    names = ("cmp_len", "cmp_stride", "block", "topk", "init_blocks", "local_blocks", "window")
    return _Call(
        q, k.shape[1], k.shape[0], cu_seqlens, segments, scale, **dict(zip(names, sizes)),
        phi=lib.PHI_MEAN if wk is None else lib.PHI_LINEAR, gate_per_token=gate_logits.dim() == 2, recompute=recompute,
    )  # fmt: skip


def _phi(wk, pe, wv):
    return lib.FsaPhiWeights(wk=_packed("wk", wk), pe=_packed("pe", pe), wv=_packed("wv", wv))


@_kernel("nsa_forward", "CUDA")
def _nsa_forward(q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale,
                 recompute):  # fmt: skip
    call = _nsa_call(q, k, wk, cu_seqlens, segments, gate_logits, sizes, scale, recompute)
    num_bytes = call.saved_bytes()
    expected = _saved_bytes(q, k, sizes[1], sizes[3], recompute)
    if num_bytes != expected:
        raise RuntimeError(f"fsa_saved_size {num_bytes}: must be {expected}; libfsa.so is of other sources than the "
                           "Python package")  # fmt: skip
    o, saved = q.new_empty(q.shape), _new_bytes(num_bytes, q.device)
    arguments = lib.FsaForward(
        **_strided(q=q, k=k, v=v, o=o), **_gate("gate", gate_logits), phi=_phi(wk, pe, wv),
        inv_freq=_packed("inv_freq", inv_freq), block_indices=_packed("block_indices", block_indices),
        saved=saved.data_ptr(),
    )  # fmt: skip
    call.run(call.library.fsa_forward, lib.FORWARD, arguments)
    return o, saved


@_kernel("nsa_backward", "CUDA")
def _nsa_backward(
    dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved, sizes, scale, recompute
):
    dout = _dense_gradient(dout)
    call = _nsa_call(dout, k, wk, cu_seqlens, segments, gate_logits, sizes, scale, recompute)
    dq, dk, dv, dgate = (x.new_empty(x.shape) for x in (dout, k, v, gate_logits))
    # The library adds to the gradients of the weights, in float32.
    sums = [None if w is None else torch.zeros_like(w, dtype=torch.float32) for w in (wk, pe, wv)]
    dphi = lib.FsaPhiGradients(*(None if x is None else x.data_ptr() for x in sums))
    arguments = lib.FsaBackward(
        **_strided(k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv), **_gate("gate", gate_logits), **_gate("dgate", dgate),
        phi=_phi(wk, pe, wv), inv_freq=_packed("inv_freq", inv_freq), saved=saved.data_ptr(), dphi=dphi,
    )  # fmt: skip
    call.run(call.library.fsa_backward, lib.BACKWARD, arguments)
    return dq, dk, dv, dgate, *(dout.new_empty(0) if x is None else x.to(dout.dtype) for x in sums)


def _selected_call(q, k, block_indices, cu_seqlens, segments, sizes, scale):
    block, init_blocks, local_blocks = sizes
    return _Call(q, k.shape[1], k.shape[0], cu_seqlens, segments, scale, block=block, topk=block_indices.shape[2],
                 init_blocks=init_blocks, local_blocks=local_blocks)  # fmt: skip


@_kernel("selected_forward", "CUDA")
def _selected_forward(q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
    call = _selected_call(q, k, block_indices, cu_seqlens, segments, sizes, scale)
    o, lse = q.new_empty(q.shape), _new_lse(q)
    arguments = lib.FsaSelectedForward(
        **_strided(q=q, k=k, v=v, o=o),
        block_indices=_packed("block_indices", block_indices),
        lse=lse.data_ptr(),
    )
    call.run(call.library.fsa_selected_forward, lib.SELECTED_FORWARD, arguments)
    return o, lse


@_kernel("selected_backward", "CUDA")
def _selected_backward(dout, q, k, v, o, lse, block_indices, cu_seqlens, segments, sizes, scale):
    dout = _dense_gradient(dout)
    call = _selected_call(q, k, block_indices, cu_seqlens, segments, sizes, scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    arguments = lib.FsaSelectedBackward(
        **_strided(q=q, k=k, v=v, o=o, dout=dout, dq=dq, dk=dk, dv=dv),
        lse=lse.data_ptr(), block_indices=_packed("block_indices", block_indices),
    )  # fmt: skip
    call.run(call.library.fsa_selected_backward, lib.SELECTED_BACKWARD, arguments)
    return dq, dk, dv


@_kernel("select_blocks", "CUDA")
def _select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    names = ("cmp_len", "cmp_stride", "block", "topk", "init_blocks", "local_blocks")
    call = _Call(q, kc.shape[1], num_keys, cu_seqlens, segments, scale, **dict(zip(names, sizes)))
    indices = q.new_empty(kc.shape[1], q.shape[0], sizes[3], dtype=torch.int32)
    arguments = lib.FsaSelectBlocks(
        **_strided(q=q, kc=kc), lse_c=_packed("lse_c", lse_c), block_indices=indices.data_ptr()
    )
    arguments.kc = arguments.kc or q.data_ptr()  # no rows are read, but the pointer must not be NULL
    call.run(call.library.fsa_select_blocks, lib.SELECT_BLOCKS, arguments)
    return indices


def _attention_call(q, k, cu_seqlens, segments, num_keys, sizes, scale):
    cmp_len, cmp_stride, window = sizes
    return _Call(q, k.shape[1], num_keys, cu_seqlens, segments, scale, cmp_len=cmp_len, cmp_stride=cmp_stride,
                 block=_smallest_block(cmp_len, cmp_stride), window=window)  # fmt: skip


def _smallest_block(cmp_len, cmp_stride):
    """Returns a `block` that is valid with these sizes; dense attention does not use it."""
    multiple = math.lcm(16, max(cmp_stride, 1))
    return max(-(-cmp_len // multiple), 1) * multiple


@_kernel("attention_forward", "CUDA")
def _attention_forward(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    call = _attention_call(q, k, cu_seqlens, segments, num_keys, sizes, scale)
    o, lse = q.new_empty(q.shape), _new_lse(q)
    arguments = lib.FsaAttentionForward(
        rule=lib.RULES[rule], **_strided(q=q, k=k, v=v, o=o), inv_freq=_packed("inv_freq", inv_freq),
        lse=lse.data_ptr(),
    )  # fmt: skip
    # No windows: no rows are read, but the pointers must not be NULL.
    arguments.k, arguments.v = arguments.k or q.data_ptr(), arguments.v or q.data_ptr()
    call.run(call.library.fsa_attention_forward, lib.ATTENTION_FORWARD, arguments)
    return o, lse


@_kernel("attention_backward", "CUDA")
def _attention_backward(dout, q, k, v, o, lse, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    dout = _dense_gradient(dout)
    call = _attention_call(q, k, cu_seqlens, segments, num_keys, sizes, scale)
    dq = q.new_empty(q.shape)
    # The library does not write the rows after the last window.
    new = torch.zeros if rule == "compressed" else torch.empty
    dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    arguments = lib.FsaAttentionBackward(
        rule=lib.RULES[rule], **_strided(q=q, k=k, v=v, o=o, dout=dout, dq=dq, dk=dk, dv=dv),
        inv_freq=_packed("inv_freq", inv_freq), lse=lse.data_ptr(),
    )  # fmt: skip
    call.run(call.library.fsa_attention_backward, lib.ATTENTION_BACKWARD, arguments)
    return dq, dk, dv


# ---- autograd --------------------------------------------------------------------------------------------------------


class _NativeSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale,
                recompute):  # fmt: skip
        o, saved = _OPS.nsa_forward(q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices,
                                    sizes, scale, recompute)  # fmt: skip
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved)
        ctx.rest = sizes, scale, recompute
        return o, saved

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        saved_tensors = ctx.saved_tensors  # once: checkpointing unpacks a tensor only once
        gradients = _OPS.nsa_backward(dout, *saved_tensors, *ctx.rest)
        dphi = [None if w is None else dw for w, dw in zip(saved_tensors[3:6], gradients[4:])]
        return (*gradients[:4], *dphi, None, None, None, None, None, None, None)


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
        o, lse = _OPS.selected_forward(q, k, v, block_indices, cu_seqlens, segments, sizes, scale)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, o, lse, block_indices, cu_seqlens, segments)
        ctx.rest = sizes, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dq, dk, dv = _OPS.selected_backward(dout, *ctx.saved_tensors, *ctx.rest)
        return dq, dk, dv, None, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
        o, lse = _OPS.attention_forward(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, segments, inv_freq)
        ctx.rest = rule, num_keys, sizes, scale
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
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
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.stack(
        [torch.arange(lengths.shape[0], device=lengths.device), torch.zeros_like(lengths), lengths], 1
    )


def _cast(*tensors):
    """Returns the tensors, under autocast in its type. As everywhere in autocast, float64 stays."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _batch(q, num_keys, cu_seqlens, segments, check):
    """Checks and completes a batch. Returns cu_seqlens and segments, int64 and contiguous."""
    if cu_seqlens is None:
        cu_seqlens = num_keys * torch.arange(2, device=q.device)
    checks.batch(q, cu_seqlens, segments)
    if segments is None:
        if q.shape[0] != num_keys:
            raise ValueError(
                f"segments None: must be given, as q has {q.shape[0]} rows and there are {num_keys} keys"
            )
        segments = whole_sequences(cu_seqlens)
    if checks.wanted(check):
        checks.batch_values(q.shape[0], num_keys, cu_seqlens, segments)
    return cu_seqlens.long().contiguous(), segments.long().contiguous()


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
        check: check the values of cu_seqlens, segments and block_indices; waits for the GPU. None: FSA_CHECK=1.
        return_block_indices: return the block indices too.

    Returns:
        o [Nq, Hq, d]; with return_block_indices a tuple of o and the block indices int32 [Hkv, Nq, topk].

    Raises:
        ValueError, TypeError: an argument breaks its rule.
        RuntimeError: the library is missing, the GPU is too old, or CUDA fails.
    """
    checks.heads(q, k, v)
    q, k, v, gate_logits, wk, pe, wv = _cast(q, k, v, gate_logits, wk, pe, wv)
    checks.config(cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window, scale)
    num_queries, q_heads, _ = q.shape
    if gate_logits.dim() == 2:
        checks.shape("gate_logits", gate_logits, f"[Nq, 3] = {(num_queries, 3)}", num_queries, 3)
    else:
        rule = f"[Nq, Hq, 3] = {(num_queries, q_heads, 3)} or [Nq, 3]"
        checks.shape("gate_logits", gate_logits, rule, num_queries, q_heads, 3)
    checks.phi(q, k.shape[1], cmp_len, wk, pe, wv)
    checks.same_kind(q, k=k, v=v, gate_logits=gate_logits, wk=wk, pe=pe, wv=wv)
    checks.rope(q, inv_freq)
    cu_seqlens, segments = _batch(q, k.shape[0], cu_seqlens, segments, check)
    if block_indices is not None:
        rule = f"[Hkv, Nq, topk] = {(k.shape[1], num_queries, topk)}"
        checks.shape("block_indices", block_indices, rule, k.shape[1], num_queries, topk)
        checks.of_type(q, "block_indices", block_indices, torch.int32)
        if checks.wanted(check):
            checks.block_values(
                block_indices, cu_seqlens, segments, k.shape[0], block, init_blocks, local_blocks
            )
    sizes = [cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, window]
    o, saved = _NativeSparseAttention.apply(q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq,
                                            block_indices, sizes, scale or 0.0, recompute)  # fmt: skip
    return (o, _saved_block_indices(saved, k.shape[1], num_queries, topk)) if return_block_indices else o


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
    checks.heads(q, k, v)
    q, k, v = _cast(q, k, v)
    checks.same_kind(q, k=k, v=v)
    rule = f"[Hkv, Nq, T] with Hkv = {k.shape[1]}, Nq = {q.shape[0]}"
    checks.shape("block_indices", block_indices, rule, k.shape[1], q.shape[0], None)
    checks.of_type(q, "block_indices", block_indices, torch.int32)
    checks.config(block=block, topk=block_indices.shape[2], init_blocks=init_blocks, local_blocks=local_blocks,
                  scale=scale)  # fmt: skip
    cu_seqlens, segments = _batch(q, k.shape[0], cu_seqlens, segments, check)
    if checks.wanted(check):
        checks.block_values(block_indices, cu_seqlens, segments, k.shape[0], block, init_blocks, local_blocks)
    sizes = [block, init_blocks, local_blocks]
    o, lse = _SelectedAttention.apply(q, k, v, block_indices, cu_seqlens, segments, sizes, scale or 0.0)
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
            the last window are not used. `reference.compress` computes them.
        lse_c: [Nq, Hq] float32 (float64 for float64 inputs), of `attention` with rule="compressed", return_lse=True.
        num_keys: tokens of the batch. None: the rows of q.
        Others: as of `native_sparse_attention`.

    Returns:
        int32 [Hkv, Nq, topk], ascending block numbers in the query's sequence, then -1.

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
    """
    checks.heads(q, kc, None)
    q, kc = _cast(q, kc)
    checks.config(cmp_len, cmp_stride, block, topk, init_blocks, local_blocks, scale=scale)
    checks.same_kind(q, kc=kc)
    checks.shape("lse_c", lse_c, f"[Nq, Hq] = {tuple(q.shape[:2])}", *q.shape[:2])
    checks.of_type(q, "lse_c", lse_c, reference.compute_dtype(q.dtype))
    num_keys = q.shape[0] if num_keys is None else num_keys
    _check_windows("kc", kc, num_keys, cmp_stride)
    cu_seqlens, segments = _batch(q, num_keys, cu_seqlens, segments, check)
    sizes = [cmp_len, cmp_stride, block, topk, init_blocks, local_blocks]
    return _OPS.select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale or 0.0)


def _check_windows(name, kc, num_keys, cmp_stride):
    if kc.shape[0] < num_keys // cmp_stride:
        raise ValueError(f"{name} of {kc.shape[0]} rows: must have at least num_keys // cmp_stride = "
                         f"{num_keys} // {cmp_stride} = {num_keys // cmp_stride}")  # fmt: skip


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
    checks.heads(q, k, v)
    q, k, v = _cast(q, k, v)
    checks.same_kind(q, k=k, v=v)
    if rule not in lib.RULES:
        raise ValueError(f"rule {rule!r}: must be one of {', '.join(lib.RULES)}")
    if (rule == "window") != (window is not None):
        raise ValueError(
            f"window {window}: must be given for rule='window', and for no other rule; rule is {rule!r}"
        )
    checks.rope(q, inv_freq)
    if rule == "compressed":
        if inv_freq is not None:
            raise ValueError(
                "inv_freq of a tensor: must be None for rule='compressed'; rotate q and kc before"
            )
        num_keys = q.shape[0] if num_keys is None else num_keys
        checks.config(cmp_len, cmp_stride, _smallest_block(cmp_len, cmp_stride), scale=scale)
        _check_windows("k", k, num_keys, cmp_stride)
    else:
        num_keys, cmp_len, cmp_stride = k.shape[0], 16, 16
        checks.config(window=1 if window is None else window, scale=scale)
    cu_seqlens, segments = _batch(q, num_keys, cu_seqlens, segments, check)
    sizes = [cmp_len, cmp_stride, window or 1]
    o, lse = _Attention.apply(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale or 0.0)
    return (o, lse) if return_lse else o


def FSA_topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):
    """Computes the selected branch, with the signature of the FSA project (arXiv 2508.18224).

    Args:
        q: [N, Hq, d]. k, v: [N, Hkv, d].
        topk_idx: int32 or int64 [Hkv, N, T], as `block_indices` of `selected_attention`.
        block_size: tokens of a block, a multiple of 16.
        cu_seqlens: int32 or int64 [num_seqs + 1].
        softmax_scale: None: 1/sqrt(d).

    Returns:
        o [N, Hq, d].

    Raises:
        ValueError, TypeError, RuntimeError: as of `native_sparse_attention`.
    """
    return selected_attention(q, k, v, topk_idx.to(torch.int32).contiguous(), cu_seqlens, block=block_size,
                              scale=softmax_scale)  # fmt: skip
