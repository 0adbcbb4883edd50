"""The kernels of the operators for the GPU: calls of libfsa. Workspaces come from PyTorch's allocator, on the current
stream.

What depends only on the layout of the arguments (shapes, strides, types, device) and on the sizes is checked and computed
once, and kept in a _Plan. A call then looks the plan up, and fills in the pointers.
"""

import functools

import torch

from . import checks
from . import library as lib
from .ops import kernel, new_like, new_lse, phi_layouts, saved_bytes


@functools.lru_cache(maxsize=None)
def _check_gpu(device):
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"GPU {device} of compute capability {major}.{minor}: must be at least 8.0 (Ampere)"
        )


def _new_bytes(num_bytes, device):
    """Returns device memory whose address is a multiple of 256, as those of PyTorch's allocator are."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


# ---- strides ---------------------------------------------------------------------------------------------------------


def _row_stride(name, tensor, multiple=8):
    """Returns the row stride of a tensor whose rows (all axes but the first) are contiguous; 0: packed.

    Raises:
        ValueError: a row is not contiguous, rows overlap, or the row stride is not a multiple of `multiple` elements.
    """
    if tensor.numel() == 0:
        return 0
    row = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:])):
        if size != 1 and stride != row:
            raise ValueError(f"{name} of strides {tensor.stride()}: a token's row must be contiguous; "
                             f"try {name}.contiguous()")  # fmt: skip
        row *= size
    if tensor.shape[0] < 2:
        return 0
    stride = tensor.stride(0)
    if stride < row or stride % multiple:
        raise ValueError(f"{name} of row stride {stride}: must be at least {row}, the elements of a row, and a multiple "
                         f"of {multiple}; try {name}.contiguous()")  # fmt: skip
    return stride


def _strides(**tensors):
    """Returns the fields NAME_stride of an argument struct."""
    return {name + "_stride": _row_stride(name, tensor) for name, tensor in tensors.items()}


def _check_packed(**tensors):
    """Checks that the tensors are contiguous or None."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} of strides {tensor.stride()}: must be contiguous; try {name}.contiguous()"
            )


def _readable(dout):
    """Returns dout, or a copy if the library cannot read it. Autograd makes such gradients, as an expanded one."""
    if not dout.is_contiguous():
        try:
            _row_stride("dout", dout)
        except ValueError:
            return dout.contiguous()
    return dout if dout.data_ptr() % 16 == 0 else dout.clone()


# ---- plans -----------------------------------------------------------------------------------------------------------


class _Plan:
    """What all calls of an operation with one layout of arguments and one configuration share.

    Args:
        operation: of FsaOperation.
        fields: of the argument struct, but for pointers.
        config: of FsaConfig, but for the shape of q and k.
    """

    def __init__(self, operation, fields, q, kv_heads, num_keys, cu_seqlens, segments, scale, **config):
        _check_gpu(q.device)
        _check_packed(cu_seqlens=cu_seqlens, segments=segments)
        library, (name, self.struct) = lib.load(), lib.OPERATIONS[operation]
        self.function, self.device = getattr(library, name), q.device
        self.arguments = self.struct(**fields)
        num_queries, q_heads, d = q.shape
        config = {**dict(cmp_len=16, cmp_stride=16, block=64, topk=1, window=1), **config}
        self.config = lib.FsaConfig(q_heads=q_heads, kv_heads=kv_heads, head_dim=d, scale=scale, **config)
        self.dtype = lib.BF16 if q.dtype == torch.bfloat16 else lib.FP16
        self.batch = lib.FsaDeviceBatch(num_queries=num_queries, num_keys=num_keys, num_seqs=cu_seqlens.shape[0] - 1,
                                        num_segments=segments.shape[0])  # fmt: skip
        with torch.cuda.device(self.device):
            size = library.fsa_workspace_size(self.config, self.dtype, self.batch, operation)
        self.workspace_bytes = self.arguments.workspace_bytes = size or lib.fail(0)

    def run(self, arguments, cu_seqlens, segments):
        """Calls the function with a new workspace. arguments: a copy of self.arguments, complete but for the workspace."""
        device = self.device
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self.run(arguments, cu_seqlens, segments)
        batch = lib.FsaDeviceBatch.from_buffer_copy(self.batch)
        batch.cu_seqlens, batch.segments = cu_seqlens.data_ptr(), segments.data_ptr()
        workspace = _new_bytes(self.workspace_bytes, device)
        arguments.workspace = workspace.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        status = self.function(self.config, self.dtype, batch, arguments, stream)
        if status:
            lib.fail(status)

    def new_arguments(self):
        """Returns a new argument struct. All its fields are set but the pointers."""
        return self.struct.from_buffer_copy(self.arguments)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


_PLANS = {}


def _key(build, tensors, rest):
    # A device by its number, -1 for the CPU: torch.device takes longer to hash.
    return (build, rest, *[x if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors])


def _plan(build, tensors, rest):
    """Returns build(*tensors, *rest), from the second call with this layout and `rest` on from a cache."""
    key = _key(build, tensors, rest)
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= 4096:  # of batches that always differ, none comes again
            _PLANS.clear()
        plan = _PLANS[key] = build(*tensors, *rest)
    return plan


# ---- native sparse attention -----------------------------------------------------------------------------------------


def _nsa_plan(
    operation, fields, q, k, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, sizes, scale, recompute
):
    _check_packed(wk=wk, pe=pe, wv=wv, inv_freq=inv_freq)
    fields["gate_stride"] = _row_stride("gate_logits", gate_logits, multiple=1)
    names = ("cmp_len", "cmp_stride", "block", "topk", "init_blocks", "local_blocks", "window")
    phi = lib.PHI_MEAN if wk is None else lib.PHI_LINEAR
    plan = _Plan(operation, fields, q, k.shape[1], k.shape[0], cu_seqlens, segments, scale, phi=phi,
                 gate_per_token=gate_logits.dim() == 2, recompute=recompute, **dict(zip(names, sizes)))  # fmt: skip
    plan.phi_layouts, plan.phi_size = phi_layouts(wk, pe, wv)
    # In bytes of the float32 array. The library ignores the gradient of a weight that is None.
    plan.dpe_offset, plan.dwv_offset = (4 * x[2] if x else 0 for x in plan.phi_layouts[1:])
    return plan


def _nsa_forward_plan(*arguments):
    checks.nsa(*arguments)
    q, k, v, *rest, block_indices, sizes, scale, recompute = arguments
    gate_logits = rest[0]
    _check_packed(block_indices=block_indices)
    strides = _strides(k=k, v=v)
    plan = _nsa_plan(lib.FORWARD, {**strides, **_strides(q=q)}, q, k, *rest, sizes, scale, recompute)
    plan.saved_bytes = saved_bytes(q, k, sizes[1], sizes[3], recompute)
    needed = lib.load().fsa_saved_size(plan.config, plan.dtype, plan.batch)
    if needed != plan.saved_bytes:
        raise RuntimeError(f"fsa_saved_size {needed}: must be {plan.saved_bytes}; libfsa.so is of other sources than the "
                           "Python package")  # fmt: skip
    # The plan of a backward pass with a contiguous dout, and tensors of these strides.
    plan.backward = _nsa_plan(lib.BACKWARD, strides, q, k, *rest, sizes, scale, recompute)
    plan.strides = k.stride(), v.stride(), gate_logits.stride()
    return plan


def _nsa_backward_plan(dout, k, v, *rest):
    return _nsa_plan(lib.BACKWARD, _strides(dout=dout, k=k, v=v), dout, k, *rest)


def nsa_plan(tensors, rest):
    """Returns the plan of a call of nsa_forward and of its backward pass. rest: sizes, a tuple; scale; recompute."""
    return _plan(_nsa_forward_plan, tensors, rest)


def known_nsa_plan(tensors, rest):
    """Returns this plan if nsa_plan has made it before, else None. The tensors and the values of rest need not be valid."""
    return _PLANS.get(_key(_nsa_forward_plan, tensors, rest))


def nsa_forward(plan, q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices):
    """Computes the operator nsa_forward."""
    o, saved = new_like(q), _new_bytes(plan.saved_bytes, plan.device)
    a = plan.new_arguments()
    a.q, a.k, a.v, a.gate_logits = q.data_ptr(), k.data_ptr(), v.data_ptr(), gate_logits.data_ptr()
    a.wk, a.pe, a.wv, a.inv_freq = _pointer(wk), _pointer(pe), _pointer(wv), _pointer(inv_freq)
    a.block_indices, a.o, a.saved = _pointer(block_indices), o.data_ptr(), saved.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return o, saved


def nsa_backward(plan, dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, saved, *rest):
    """Computes the operator nsa_backward. plan: of forward, or None."""
    strides = k.stride(), v.stride(), gate_logits.stride()
    if plan is not None and plan.strides == strides and dout.is_contiguous() and dout.data_ptr() % 16 == 0:
        plan = plan.backward
    else:  # saved_tensors_hooks may change the strides
        dout = _readable(dout)
        inputs = dout, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq
        plan = _plan(_nsa_backward_plan, inputs, rest)
    dq, dk, dv, dgate_logits = new_like(dout), new_like(k), new_like(v), new_like(gate_logits)
    # The library adds to the gradients of the weights, in float32.
    dphi = torch.zeros(plan.phi_size, dtype=torch.float32, device=plan.device)
    a = plan.new_arguments()
    a.k, a.v, a.gate_logits, a.dout = k.data_ptr(), v.data_ptr(), gate_logits.data_ptr(), dout.data_ptr()
    a.wk, a.pe, a.wv, a.inv_freq = _pointer(wk), _pointer(pe), _pointer(wv), _pointer(inv_freq)
    a.saved, a.dq, a.dk, a.dv = saved.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    a.dgate_logits, dwk = dgate_logits.data_ptr(), dphi.data_ptr()
    a.dwk, a.dpe, a.dwv = dwk, dwk + plan.dpe_offset, dwk + plan.dwv_offset
    plan.run(a, cu_seqlens, segments)
    return dq, dk, dv, dgate_logits, dphi.to(dtype=dout.dtype)


@kernel("nsa_forward", "CUDA")
def _nsa_forward(*arguments):
    *tensors, sizes, scale, recompute = arguments
    return nsa_forward(nsa_plan(tensors, (tuple(sizes), scale, recompute)), *tensors)


@kernel("nsa_backward", "CUDA")
def _nsa_backward(*arguments):
    *tensors, sizes, scale, recompute = arguments
    return nsa_backward(None, *tensors, tuple(sizes), scale, recompute)


# ---- selected attention, block selection -----------------------------------------------------------------------------


def _selected_plan(operation, tensors, q, k, block_indices, cu_seqlens, segments, sizes, scale):
    _check_packed(block_indices=block_indices)
    block, init_blocks, local_blocks = sizes
    return _Plan(operation, _strides(**tensors), q, k.shape[1], k.shape[0], cu_seqlens, segments, scale, block=block,
                 topk=block_indices.shape[2], init_blocks=init_blocks, local_blocks=local_blocks)  # fmt: skip


def _selected_forward_plan(q, k, v, block_indices, *rest):
    checks.selected(q, k, v, block_indices, *rest)
    return _selected_plan(lib.SELECTED_FORWARD, dict(q=q, k=k, v=v), q, k, block_indices, *rest)


@kernel("selected_forward", "CUDA")
def _selected_forward(q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
    plan = _plan(_selected_forward_plan, (q, k, v, block_indices, cu_seqlens, segments), (tuple(sizes), scale))
    o, lse = new_like(q), new_lse(q)
    a = plan.new_arguments()
    a.q, a.k, a.v, a.block_indices = q.data_ptr(), k.data_ptr(), v.data_ptr(), block_indices.data_ptr()
    a.o, a.lse = o.data_ptr(), lse.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return o, lse


def _selected_backward_plan(dout, q, k, v, *rest):
    return _selected_plan(lib.SELECTED_BACKWARD, dict(dout=dout, q=q, k=k, v=v), q, k, *rest)


@kernel("selected_backward", "CUDA")
def _selected_backward(dout, q, k, v, o, lse, block_indices, cu_seqlens, segments, sizes, scale):
    dout = _readable(dout)
    inputs = dout, q, k, v, block_indices, cu_seqlens, segments
    plan = _plan(_selected_backward_plan, inputs, (tuple(sizes), scale))
    dq, dk, dv = map(new_like, (q, k, v))
    a = plan.new_arguments()
    a.q, a.k, a.v, a.o, a.dout = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), dout.data_ptr()
    a.lse, a.block_indices = lse.data_ptr(), block_indices.data_ptr()
    a.dq, a.dk, a.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return dq, dk, dv


def _select_blocks_plan(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    checks.select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale)
    _check_packed(lse_c=lse_c)
    names = ("cmp_len", "cmp_stride", "block", "topk", "init_blocks", "local_blocks")
    return _Plan(lib.SELECT_BLOCKS, _strides(q=q, kc=kc), q, kc.shape[1], num_keys, cu_seqlens, segments, scale,
                 **dict(zip(names, sizes)))  # fmt: skip


@kernel("select_blocks", "CUDA")
def _select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    plan = _plan(_select_blocks_plan, (q, kc, lse_c, cu_seqlens, segments), (num_keys, tuple(sizes), scale))
    block_indices = q.new_empty(kc.shape[1], q.shape[0], sizes[3], dtype=torch.int32)
    a = plan.new_arguments()
    a.q, a.kc, a.lse_c, a.block_indices = q.data_ptr(), kc.data_ptr(), lse_c.data_ptr(), block_indices.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return block_indices


# ---- dense attention -------------------------------------------------------------------------------------------------


def _attention_plan(operation, tensors, q, k, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    _check_packed(inv_freq=inv_freq)
    cmp_len, cmp_stride, window = sizes
    fields = dict(rule=lib.RULES[rule], **_strides(**tensors))
    return _Plan(operation, fields, q, k.shape[1], num_keys, cu_seqlens, segments, scale, cmp_len=cmp_len,
                 cmp_stride=cmp_stride, block=checks.smallest_block(cmp_len, cmp_stride), window=window)  # fmt: skip


def _attention_forward_plan(q, k, v, *rest):
    checks.attention(q, k, v, *rest)
    return _attention_plan(lib.ATTENTION_FORWARD, dict(q=q, k=k, v=v), q, k, *rest)


@kernel("attention_forward", "CUDA")
def _attention_forward(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    inputs = q, k, v, cu_seqlens, segments, inv_freq
    plan = _plan(_attention_forward_plan, inputs, (rule, num_keys, tuple(sizes), scale))
    o, lse = new_like(q), new_lse(q)
    a = plan.new_arguments()
    a.q, a.k, a.v, a.inv_freq = q.data_ptr(), k.data_ptr(), v.data_ptr(), _pointer(inv_freq)
    a.o, a.lse = o.data_ptr(), lse.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return o, lse


def _attention_backward_plan(dout, q, k, v, *rest):
    return _attention_plan(lib.ATTENTION_BACKWARD, dict(dout=dout, q=q, k=k, v=v), q, k, *rest)


@kernel("attention_backward", "CUDA")
def _attention_backward(dout, q, k, v, o, lse, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    dout = _readable(dout)
    inputs = dout, q, k, v, cu_seqlens, segments, inv_freq
    plan = _plan(_attention_backward_plan, inputs, (rule, num_keys, tuple(sizes), scale))
    dq, dk, dv = map(new_like, (q, k, v))
    if rule == "compressed":  # the library does not write the rows after the last window
        dk.zero_(), dv.zero_()
    a = plan.new_arguments()
    a.q, a.k, a.v, a.o, a.dout = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), dout.data_ptr()
    a.inv_freq, a.lse = _pointer(inv_freq), lse.data_ptr()
    a.dq, a.dk, a.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    plan.run(a, cu_seqlens, segments)
    return dq, dk, dv
