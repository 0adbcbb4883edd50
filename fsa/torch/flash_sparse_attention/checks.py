"""Checks of arguments. An error names the argument, its value and the rule.

Shapes, types and devices are checked on every call. Values (cu_seqlens, segments, block indices) are checked on demand,
since that waits for the GPU: check=True, or FSA_CHECK=1 in the environment when the package is imported. The operators for
the CPU always check them.
"""

import math
import os

import torch

from . import reference
from .library import RULES

CHECK_VALUES = os.environ.get("FSA_CHECK") == "1"
INT_MAX = 2**31 - 1  # of a C int


def wanted(check):
    """Returns whether values are checked; `check` is the caller's argument. A compiled graph checks no values."""
    return (CHECK_VALUES if check is None else check) and not torch.compiler.is_compiling()


def shape(name, tensor, rule, *sizes):
    """Checks a shape. A size of None may be any; `rule` states the shape in words."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} {type(tensor).__name__}: must be a tensor {rule}")
    if tensor.dim() != len(sizes) or any(s is not None and n != s for n, s in zip(tensor.shape, sizes)):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: must be {rule}")


def same_kind(q, **tensors):
    """Checks the type and device of q, and that the tensors have the same; None is skipped."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q on {q.device}: must be on a GPU (cuda) or on the cpu")
    if q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"q of type {q.dtype}: must be torch.bfloat16 or torch.float16 on a GPU; try q.bfloat16()"
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"q of type {q.dtype}: must be a float type")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(f"{name} on {tensor.device}: must be on {q.device}, the device of q")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} of type {tensor.dtype}: must be {q.dtype}, the type of q")


def of_type(q, name, tensor, *dtypes):
    """Checks that a tensor has one of the types, and the device of q."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} of type {tensor.dtype}: must be {' or '.join(str(t) for t in dtypes)}")
    if tensor.device != q.device:
        raise ValueError(f"{name} on {tensor.device}: must be on {q.device}, the device of q")


def integers(**sizes):
    """Checks the types of sizes."""
    _converts("__index__", "an int", sizes)


def numbers(**values):
    """Checks the types of numbers."""
    _converts("__float__", "a number", values)


def _converts(method, kind, values):
    """Checks that the values have a method, and are no tensors, whose method would wait for the GPU."""
    if torch.compiler.is_compiling():  # the graph knows them
        return
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace: not supported, as it would make sizes constants; try torch.compile")
    for name, value in values.items():
        if isinstance(value, torch.Tensor) or not hasattr(value, method):
            raise TypeError(f"{name} {value!r}: must be {kind}")


def scale(value):
    """Checks the scale. Returns it as the operators take it: 0 for 1/sqrt(d)."""
    if value is None:
        return 0.0
    if not isinstance(value, float):  # the usual case is quick
        numbers(scale=value)
    if not 2.0**-150 < float(value) < 2.0**128 - 2.0**103:  # what float32 rounds to neither 0 nor infinity
        raise ValueError(f"scale {value}: must be positive and finite in float32, or None for 1/sqrt(d)")
    return float(value)


def recompute(value):
    """Checks the type of recompute."""
    if not isinstance(value, (bool, int)):
        raise TypeError(f"recompute {value!r}: must be True or False")


def heads(q, k, v):
    """Checks the shapes of q [Nq, Hq, d] and k, v [N, Hkv, d], and the number of heads."""
    shape("q", q, "[Nq, Hq, d]", None, None, None)
    shape("k", k, f"[N, Hkv, d] with d = {q.shape[2]} of q", None, None, q.shape[2])
    if v is not None:
        shape("v", v, f"{tuple(k.shape)}, the shape of k", *k.shape)
    head_counts(q.shape[1], k.shape[1], q.shape[2])


def head_counts(q_heads, kv_heads, d):
    """Checks the number of heads, and their size."""
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads or q_heads > 16 * kv_heads:
        raise ValueError(
            f"q of {q_heads} heads, k of {kv_heads}: must have 1 to 16 query heads for each KV head"
        )
    if d < 2 or d % 2:
        raise ValueError(f"q of head size d = {d}: must be even and at least 2; 64 or 128 on a GPU")


def config(cmp_len=16, cmp_stride=16, block=64, topk=1, init_blocks=0, local_blocks=0, window=1):
    """Checks the sizes against the rules of FsaConfig in fsa.h, whose fields are C ints."""
    always = init_blocks + local_blocks
    for holds, name, value, text in (
        (1 <= cmp_len <= INT_MAX, "cmp_len", cmp_len, "from 1 to 2^31 - 1"),
        (1 <= cmp_stride <= INT_MAX, "cmp_stride", cmp_stride, "from 1 to 2^31 - 1"),
        (16 <= block <= INT_MAX and block % 16 == 0, "block", block, "a multiple of 16, from 16 to 2^31 - 16"),
        (cmp_len % max(cmp_stride, 1) == 0, "cmp_stride", cmp_stride, f"a divisor of cmp_len {cmp_len}"),
        (block % max(cmp_stride, 1) == 0, "cmp_stride", cmp_stride, f"a divisor of block {block}"),
        (cmp_len <= block, "cmp_len", cmp_len, f"at most block {block}"),
        (1 <= topk <= 4096, "topk", topk, "from 1 to 4096"),
        (init_blocks >= 0, "init_blocks", init_blocks, "at least 0"),
        (local_blocks >= 0, "local_blocks", local_blocks, "at least 0"),
        (topk >= always, "topk", topk,
         f"at least init_blocks {init_blocks} + local_blocks {local_blocks} = {always}"),
        (1 <= window <= INT_MAX, "window", window, "from 1 to 2^31 - 1"),
    ):  # fmt: skip
        if not holds:
            raise ValueError(f"{name} {value}: must be {text}")


def batch(q, cu_seqlens, segments):
    """Checks the shapes and types of cu_seqlens and segments. segments may be None."""
    shape("cu_seqlens", cu_seqlens, "[num_seqs + 1]", None)
    of_type(q, "cu_seqlens", cu_seqlens, torch.int32, torch.int64)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens of shape (0,): must be [num_seqs + 1], at least one element")
    if segments is not None:
        shape("segments", segments, "[num_segments, 3]", None, 3)
        of_type(q, "segments", segments, torch.int32, torch.int64)


# ---- the arguments of the operators of ops.py ------------------------------------------------------------------------


def nsa(
    q, k, v, gate_logits, wk, pe, wv, cu_seqlens, segments, inv_freq, block_indices, sizes, scale, recompute
):
    heads(q, k, v)
    same_kind(q, k=k, v=v, gate_logits=gate_logits, wk=wk, pe=pe, wv=wv)
    config(*sizes)
    (num_queries, q_heads, d), kv_heads, cmp_len, topk = q.shape, k.shape[1], sizes[0], sizes[3]
    if gate_logits.dim() == 2:
        shape("gate_logits", gate_logits, f"[Nq, 3] = {(num_queries, 3)}", num_queries, 3)
    else:
        rule = f"[Nq, Hq, 3] = {(num_queries, q_heads, 3)} or [Nq, 3]"
        shape("gate_logits", gate_logits, rule, num_queries, q_heads, 3)
    if (wk is None) != (wv is None) or (wk is None and pe is not None):
        missing, given = ("wk", "wv" if wv is not None else "pe") if wk is None else ("wv", "wk")
        raise ValueError(f"{missing} None: must be given with {given}; leave out wk, pe and wv for the mean")
    for name, weight, rows in (("wk", wk, cmp_len * d), ("pe", pe, cmp_len), ("wv", wv, cmp_len * d)):
        if weight is not None:
            rule = f"[Hkv, {'cmp_len' if name == 'pe' else 'cmp_len*d'}, d] = {(kv_heads, rows, d)}"
            shape(name, weight, rule, kv_heads, rows, d)
    rope(q, inv_freq)
    batch(q, cu_seqlens, segments)
    if block_indices is not None:
        indices(q, k, block_indices, topk)


def selected(q, k, v, block_indices, cu_seqlens, segments, sizes, scale):
    heads(q, k, v)
    same_kind(q, k=k, v=v)
    indices(q, k, block_indices, None)
    block, init_blocks, local_blocks = sizes
    slots, always = block_indices.shape[2], init_blocks + local_blocks
    if not max(always, 1) <= slots <= 4096:
        raise ValueError(f"block_indices of shape {tuple(block_indices.shape)}: must have 1 to 4096 slots for each query, "
                         f"and at least init_blocks {init_blocks} + local_blocks {local_blocks} = {always}")  # fmt: skip
    config(block=block, topk=slots, init_blocks=init_blocks, local_blocks=local_blocks)
    batch(q, cu_seqlens, segments)


def select_blocks(q, kc, lse_c, cu_seqlens, segments, num_keys, sizes, scale):
    heads(q, kc, None)
    same_kind(q, kc=kc)
    config(*sizes)
    shape("lse_c", lse_c, f"[Nq, Hq] = {tuple(q.shape[:2])}", *q.shape[:2])
    of_type(q, "lse_c", lse_c, reference.compute_dtype(q.dtype))
    windows("kc", kc, num_keys, sizes[1])
    batch(q, cu_seqlens, segments)


def attention(q, k, v, cu_seqlens, segments, inv_freq, rule, num_keys, sizes, scale):
    heads(q, k, v)
    same_kind(q, k=k, v=v)
    visibility(rule)
    rope(q, inv_freq)
    cmp_len, cmp_stride, window = sizes
    config(cmp_len, cmp_stride, smallest_block(cmp_len, cmp_stride), window=window)
    if rule == "compressed":
        if inv_freq is not None:
            raise ValueError(
                "inv_freq of a tensor: must be None for rule='compressed'; rotate q and kc before"
            )
        windows("k", k, num_keys, cmp_stride)
    batch(q, cu_seqlens, segments)


def visibility(rule):
    """Checks the name of a visibility rule."""
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule {rule!r}: must be one of {', '.join(RULES)}")


def rope(q, inv_freq):
    """Checks the RoPE frequencies."""
    if inv_freq is not None:
        shape("inv_freq", inv_freq, f"[d/2] = ({q.shape[2] // 2},)", q.shape[2] // 2)
        of_type(q, "inv_freq", inv_freq, torch.float64)


def indices(q, k, block_indices, topk):
    """Checks the shape and type of block indices; topk None may be any."""
    rule = f"[Hkv, Nq, T] with Hkv = {k.shape[1]}, Nq = {q.shape[0]}, T = {topk or 'any'}"
    shape("block_indices", block_indices, rule, k.shape[1], q.shape[0], topk)
    of_type(q, "block_indices", block_indices, torch.int32)


def windows(name, kc, num_keys, cmp_stride):
    """Checks the number of rows of compressed keys."""
    if kc.shape[0] < num_keys // cmp_stride:
        raise ValueError(f"{name} of {kc.shape[0]} rows: must have at least num_keys // cmp_stride = "
                         f"{num_keys} // {cmp_stride} = {num_keys // cmp_stride}")  # fmt: skip


def smallest_block(cmp_len, cmp_stride):
    """Returns a `block` that is valid with these sizes; dense attention does not use it."""
    multiple = math.lcm(16, max(cmp_stride, 1))
    return max(-(-cmp_len // multiple), 1) * multiple


# ---- values ----------------------------------------------------------------------------------------------------------


def batch_values(q, num_keys, cu_seqlens, segments):
    """Checks the values of cu_seqlens and segments. Waits for the GPU."""
    cu = cu_seqlens.tolist()
    if not cu or cu[0] != 0:
        raise ValueError(f"cu_seqlens[0] {cu[0] if cu else 'missing'}: must be 0")
    for i in range(1, len(cu)):
        if cu[i] < cu[i - 1]:
            raise ValueError(f"cu_seqlens[{i}] {cu[i]}: must be at least cu_seqlens[{i - 1}] {cu[i - 1]}")
    if cu[-1] != num_keys:
        raise ValueError(f"cu_seqlens[{len(cu) - 1}] {cu[-1]}: must be {num_keys}, the number of keys")
    total, end = 0, (0, 0)
    for i, (seq, pos, length) in enumerate(segments.tolist()):
        name = f"segments[{i}] {(seq, pos, length)}"
        if not 0 <= seq < len(cu) - 1:
            raise ValueError(f"{name}: the sequence must be from 0 to {len(cu) - 2}")
        if pos < 0 or length < 0 or pos + length > cu[seq + 1] - cu[seq]:
            raise ValueError(f"{name}: must lie in its sequence of {cu[seq + 1] - cu[seq]} tokens")
        if (seq, pos) < end:
            raise ValueError(f"{name}: must not begin before {end}, the end of the segment before it")
        total, end = total + length, (seq, pos + length)
    if total != q.shape[0]:
        raise ValueError(f"segments of {total} queries: must have {q.shape[0]}, the number of rows of q")


def block_range(name, block_indices):
    """Checks that a cast of block indices to int32 will keep them. Waits for the GPU."""
    wrong = (block_indices < -1) | (block_indices > INT_MAX)
    for at in wrong.nonzero()[:1].tolist():
        raise ValueError(
            f"{name}{at} {block_indices[tuple(at)]}: must be -1 or a block of the query's sequence"
        )


def block_values(block_indices, cu_seqlens, segments, num_keys, block, init_blocks, local_blocks):
    """Checks that the block indices ascend, are padded with -1 at the end, are not after the query's own block, and
    contain the initial and local blocks. Waits for the GPU. cu_seqlens and segments must have been checked.
    """
    layout = reference.BatchLayout(cu_seqlens, segments, block_indices.shape[1], num_keys)
    own = layout.query_pos // block
    x = block_indices.long()

    def rule(wrong, text):
        at = wrong.nonzero()
        if len(at):
            h, query, slot = at[0].tolist()
            value = x[h, query, slot].item()
            raise ValueError(
                f"block_indices[{h}, {query}, {slot}] {value}: {text.format(own=own[query].item())}"
            )

    rule(x < -1, "must be -1 or a block of the query's sequence")
    rule(x > own[:, None], "must be at most {own}, the query's own block")
    before, after = x[..., :-1], x[..., 1:]
    wrong = (after >= 0) & (after <= before) | (after >= 0) & (before < 0)
    rule(torch.nn.functional.pad(wrong, (1, 0)), "blocks must ascend, and -1 come after them")
    for i in range(init_blocks + local_blocks):
        needed = own.clamp(max=i) if i < init_blocks else (own - (i - init_blocks)).clamp(min=0)
        missing = ~(x == needed[:, None]).any(-1, keepdim=True)
        kind = "initial" if i < init_blocks else "local"
        rule(
            missing,
            f"the list must contain the {kind} blocks; set init_blocks and local_blocks to 0 for other lists",
        )
