"""Checks the arguments of the calls of libfsa that the package makes: every pointer and every stride. And that arguments
of a wrong type make none, also if a plan is there."""

import torch
import torch_stub  # noqa: F401
from torch_checks import check, expect, finish, fsa

from flash_sparse_attention import cuda, library

calls = []  # the batch and the argument struct of each call
COPY = object()  # the address of a tensor that the package makes


def recording(plan_init):
    """Returns the constructor of plans whose calls are recorded."""

    def init(self, *arguments, **kwargs):
        plan_init(self, *arguments, **kwargs)
        self.function = lambda config, dtype, batch, struct, stream: calls.append(
            (library.FsaDeviceBatch.from_buffer_copy(batch), type(struct).from_buffer_copy(struct))
        )

    return init


def fields(struct):
    """Returns the fields of a struct; those of an inner struct are among them."""
    found = {}
    for name, kind in struct._fields_:
        value = getattr(struct, name)
        found.update(fields(value) if isinstance(value, library.Structure) else {name: value})
    return found


def expect_call(name, **want):
    """Checks the call since the last check. want: its fields as tensors or numbers; all others must be 0."""
    batch, struct = calls.pop()
    check(not calls, f"{name}: {1 + len(calls)} calls; must be 1")
    got = fields(struct)
    for i, count in (("cu_seqlens", 3), ("segments", 2)):
        check(getattr(batch, i) == BATCH[i].data_ptr() and len(BATCH[i]) == count, f"{name}: {i}")
    check(got.pop("size") == library.ctypes.sizeof(struct), f"{name}: size")
    check(got.pop("workspace") and got.pop("workspace_bytes") == 256, f"{name}: workspace")
    for field, value in got.items():
        right = want.pop(field, None)
        right = right.data_ptr() if isinstance(right, torch.Tensor) else value if right is COPY and value else right
        check((value or 0) == (right or 0), f"{name}: {field} is {value}; must be {right}")
    check(not want, f"{name}: {list(want)} are no fields")


cuda._Plan.__init__ = recording(cuda._Plan.__init__)
N, d, sizes = 64, 64, [32, 16, 64, 16, 1, 2, 512]
new = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)  # noqa: E731
q, k, v = new(N, 12 * d + 8)[:, 8:].unflatten(1, (-1, d)).split([8, 2, 2], dim=1)  # views of row stride 776
gate = new(N, 30)[:, :24].unflatten(1, (8, 3))
wk, pe, wv = new(2, 32 * d, d), new(2, 32, d), new(2, 32 * d, d)
kc, lse_c, indices = new(4, 2, d), torch.zeros(N, 8), torch.zeros(2, N, 16, dtype=torch.int32)
cu, freq = torch.tensor([0, 20, N]), fsa.rope_frequencies(d)
BATCH = dict(cu_seqlens=cu, segments=fsa.whole_sequences(cu))
batch = tuple(BATCH.values())
doutputs = (new(N, 8, d), new(N, 8, 2 * d)[..., :d])  # the library cannot read the rows of the second one
given = lambda dout: dict(dout=dout if dout is doutputs[0] else COPY)  # noqa: E731

for phi, inv_freq, blocks in (((wk, pe, wv), freq, None), ((wk, None, wv), None, indices), ((None,) * 3, freq, None)):
    name = f"phi {[x is not None for x in phi]}"
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, gate, *phi)]
    shared = dict(zip(("k", "v", "gate_logits", "wk", "pe", "wv"), leaves[1:]), inv_freq=inv_freq, k_stride=776,
                  v_stride=776, gate_stride=30)  # fmt: skip
    for call in range(2):  # the second one finds the plan of the first one
        o = fsa.native_sparse_attention(*leaves, cu, segments=batch[1], inv_freq=inv_freq, block_indices=blocks)
        saved = o.grad_fn.saved_tensors[-1]
        expect_call(f"forward, {name}, {call}", **shared, q=q, q_stride=776, block_indices=blocks, o=o, saved=saved)
        for dout in doutputs:
            inputs = [x for x in leaves if x is not None]
            gradients = torch.autograd.grad(o, inputs, dout, retain_graph=True)
            check([x.shape for x in gradients] == [x.shape for x in inputs], f"gradients, {name}: shapes")
            # dwk, dpe and dwv are views of a copy of what the library writes. It ignores the address of one that is missing.
            weights = {n: getattr(calls[-1][1], n) for n in ("dwk", "dpe", "dwv")}
            names = [n for n, x in zip(weights, phi) if x is not None]
            weights.update({n: weights["dwk"] + 4 * x.storage_offset() for n, x in zip(names, gradients[4:])})
            stride = 0 if dout is doutputs[0] else 8 * d  # 0: the plan that forward has made
            expect_call(f"backward, {name}, {call}", **shared, **given(dout), dout_stride=stride, **weights, saved=saved,
                        **dict(zip(("dq", "dk", "dv", "dgate_logits"), gradients)))  # fmt: skip

for error, name, value, rule in (
    (TypeError, "topk", [16], "must be an int"),
    (TypeError, "topk", 16.0, "must be an int"),
    (TypeError, "recompute", [0], "must be True or False"),
    (TypeError, "recompute", 0.0, "must be True or False"),
    (TypeError, "scale", "a", "must be a number"),
    (ValueError, "window", 2**32 + 512, "must be from 1 to 2^31 - 1"),
):
    kwargs = {"segments": batch[1], "inv_freq": freq, name: value}  # else as in the last of the calls above
    expect(error, f"{name} {value!r}: {rule}", fsa.native_sparse_attention, *leaves, cu, **kwargs)
    check(not calls, f"{name} {value}: {len(calls)} calls; must be 0")

for call in range(2):
    shared = dict(q=q, k=k, v=v, block_indices=indices, q_stride=776, k_stride=776, v_stride=776)
    o, lse = cuda._selected_forward(q, k, v, indices, *batch, [64, 1, 2], 0.0)
    expect_call("selected_forward", **shared, o=o, lse=lse)
    for dout in doutputs:
        gradients = cuda._selected_backward(dout, q, k, v, o, lse, indices, *batch, [64, 1, 2], 0.0)
        expect_call("selected_backward", **shared, o=o, lse=lse, **given(dout), dout_stride=8 * d,
                    **dict(zip(("dq", "dk", "dv"), gradients)))  # fmt: skip
    blocks = cuda._select_blocks(q, kc, lse_c, *batch, N, sizes[:6], 0.0)
    expect_call("select_blocks", q=q, kc=kc, lse_c=lse_c, block_indices=blocks, q_stride=776, kc_stride=2 * d)
    for i, (rule, x, y, stride, inv_freq) in enumerate((("causal", k, v, 776, freq), ("window", k, v, 776, None),
                                                        ("compressed", kc, kc, 2 * d, None))):  # fmt: skip
        shared = dict(rule=i, q=q, k=x, v=y, q_stride=776, k_stride=stride, v_stride=stride, inv_freq=inv_freq)
        rest = (*batch, inv_freq, rule, N, [32, 16, 7], 0.0)
        o, lse = cuda._attention_forward(q, x, y, *rest)
        expect_call(f"attention_forward, {rule}", **shared, o=o, lse=lse)
        for dout in doutputs:
            gradients = cuda._attention_backward(dout, q, x, y, o, lse, *rest)
            expect_call(f"attention_backward, {rule}", **shared, o=o, lse=lse, **given(dout), dout_stride=8 * d,
                        **dict(zip(("dq", "dk", "dv"), gradients)))  # fmt: skip
finish()
