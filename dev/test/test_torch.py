"""The PyTorch package fsa/torch on the CPU: its reference against the golden values in float64 (golden.py), gradients
against central differences, torch.compile, autocast, checkpointing, opcheck, DDP and FSDP2, bad input, the calls of libfsa,
host time, and the ctypes structs against a C compiler's. On a GPU test_torch_gpu.py follows; `test_torch.py check`, which
make test runs, measures no times there; `seed=N` repeats its random shapes. It is skipped without PyTorch."""

import contextlib
import importlib.util
import inspect
import io
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial

import checks

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")

if importlib.util.find_spec("torch") is None:
    checks.skip("PyTorch is not installed: python3 -m pip install -r dev/test/requirements.txt")
    checks.finish()

import torch  # noqa: E402
from torch_checks import (  # noqa: E402
    PACKAGE,
    ROOT,
    check,
    check_operators,
    check_ranks,
    close,
    expect,
    finish,
    fsa,
    run,
    skip,
)

from flash_sparse_attention import checks as argument_checks  # noqa: E402
from flash_sparse_attention import cuda, library, reference  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(1)  # the tensors are small, and other tests run beside this one


# ---- golden values ---------------------------------------------------------------------------------------------------
MASK64 = (1 << 64) - 1


def uniform(name, *shape):
    """Returns the random numbers that golden.py generates from a name: multiples of 2^-19 in [-1, 1)."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK64
    out = []
    for i in range(math.prod(shape)):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        out.append(((z ^ (z >> 31)) >> 44) / 2.0**19 - 1.0)
    return torch.tensor(out, dtype=torch.float64).reshape(shape)


def read_golden(name):
    """Returns the tensors of dev/test/golden/NAME.txt."""
    tensors = {}
    with open(os.path.join(GOLDEN, name + ".txt")) as f:
        for line in f:
            if line.startswith("#"):
                continue
            head, values = line.split("=")
            key, kind, *dims = head.split()
            values = values.split()
            if kind == "f":
                t = torch.tensor(
                    [struct.unpack(">d", bytes.fromhex(x))[0] for x in values], dtype=torch.float64
                )
            else:
                t = torch.tensor([int(x) for x in values])
            tensors[key] = t.reshape([int(d) for d in dims])
    return tensors


def folded(t, keep):
    """Returns the dot products of t's rows, all axes but the first `keep`, with golden.py's fixed vector."""
    rows = t.detach().reshape(*t.shape[:keep], -1)
    return (rows * uniform("fold", rows.shape[-1])).sum(-1)


def test_golden(name):
    g = read_golden(name)
    Hq, Hkv, d, l, s, block, topk, init, local, window, linear, per_token = g["config"].tolist()
    N, Nq = int(g["cu_seqlens"][-1]), int(g["segments"][:, 2].sum())
    shapes = {
        "q": (Nq, Hq, d),
        "k": (N, Hkv, d),
        "v": (N, Hkv, d),
        "gate": (Nq, 3) if per_token else (Nq, Hq, 3),
    }
    if linear:
        shapes.update(wk=(Hkv, l * d, d), pe=(Hkv, l, d), wv=(Hkv, l * d, d))
    leaves = {}
    for x, shape in shapes.items():
        offset, amplitude = g["fill." + x].tolist()
        leaves[x] = (offset + amplitude * uniform(f"{name}.{x}", *shape)).requires_grad_()
    dout = uniform(f"{name}.dout", Nq, Hq, d)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    scale, inv_freq, cu, segments = (
        g["scale"].item() or None,
        g.get("inv_freq"),
        g["cu_seqlens"],
        g["segments"],
    )
    batch = dict(segments=segments, scale=scale, check=True)
    sizes = dict(cmp_len=l, cmp_stride=s, block=block, topk=topk, init_blocks=init, local_blocks=local)

    o, indices = fsa.native_sparse_attention(*leaves.values(), cu_seqlens=cu, inv_freq=inv_freq, window=window,
                                             return_block_indices=True, **sizes, **batch)  # fmt: skip
    close(f"{name}: o", folded(o, 1), g["o"])
    check(torch.equal(indices.long(), g["indices"]), f"{name}: block indices")
    o.backward(dout)
    for x, t in leaves.items():
        # Golden sums run over one gate with a heads axis of 1.
        close(f"{name}: d{x}", folded(t.grad, 2 if x in ("wk", "wv", "pe") else 1), g["d" + x], 1e-11)
        t.grad = None

    # The branches one by one, of rotated q and k.
    layout = reference.BatchLayout(cu, segments, Nq, N, l, s)
    rotated_q = reference.rotate(q, layout.query_pos, inv_freq).detach()
    rotated_k = reference.rotate(k, layout.key_pos, inv_freq).detach()
    phi = tuple(leaves.get(x) for x in ("wk", "pe", "wv"))
    kc, vc = (x.detach() for x in reference.compress(layout, k, v, l, phi, inv_freq))
    kc[~layout.is_window], vc[~layout.is_window] = math.nan, math.nan  # rows that nobody reads
    kc, vc = (torch.cat([x, torch.full_like(x[:2], math.nan)]) for x in (kc, vc))
    compressed = dict(cmp_len=l, cmp_stride=s, num_keys=N, **batch)
    o, lse = fsa.attention(rotated_q, kc, vc, cu, rule="compressed", return_lse=True, **compressed)
    close(f"{name}: o_c", folded(o, 1), g["o_c"])
    close(f"{name}: lse_c", lse, g["lse_c"])
    indices = fsa.select_blocks(rotated_q, kc, lse, cu, num_keys=N, **sizes, **batch)
    check(torch.equal(indices.long(), g["indices"]), f"{name}: select_blocks")
    for always in (dict(init_blocks=init, local_blocks=local), {}):
        o, lse = fsa.selected_attention(rotated_q, rotated_k, v, indices, cu, block=block, return_lse=True,
                                        **always, **batch)  # fmt: skip
        close(f"{name}: o_s", folded(o, 1), g["o_s"])
        close(f"{name}: lse_s", folded(lse, 1), g["lse_s"])
    arguments = dict(inv_freq=inv_freq, return_lse=True, **batch)
    o, lse = fsa.attention(q, k, v, cu, rule="window", window=window, **arguments)
    close(f"{name}: o_w", folded(o, 1), g["o_w"])
    close(f"{name}: lse_w", folded(lse, 1), g["lse_w"])
    o, lse = fsa.attention(q, k, v, cu, **arguments)
    close(f"{name}: full_o", folded(o, 1), g["full_o"])
    close(f"{name}: full_lse", folded(lse, 1), g["full_lse"])
    o.backward(dout)
    for x in ("q", "k", "v"):
        close(f"{name}: full_d{x}", folded(leaves[x].grad, 1), g["full_d" + x], 1e-11)


# ---- gradients, compile, autocast, checkpointing ---------------------------------------------------------------------
SIZES = dict(cmp_len=8, cmp_stride=4, block=16, topk=2, init_blocks=1, local_blocks=1, window=6)
CU = torch.tensor([0, 29, 29, 40])


def inputs(dtype, N=40, Hq=4, Hkv=2, d=8, requires_grad=True):
    """Returns q, k, v, gate_logits, wk, pe, wv."""
    l = SIZES["cmp_len"]
    shapes = [(N, Hq, d), (N, Hkv, d), (N, Hkv, d), (N, Hq, 3), (Hkv, l * d, d), (Hkv, l, d), (Hkv, l * d, d)]
    factors = [1, 1, 1, 1, 0.2, 1, 0.2]
    return [(f * torch.randn(s)).to(dtype).requires_grad_(requires_grad) for s, f in zip(shapes, factors)]


def nsa(*leaves, **kwargs):
    cu = kwargs.pop("cu_seqlens", CU)
    inv_freq = fsa.rope_frequencies(leaves[0].shape[2])
    return fsa.native_sparse_attention(*leaves, cu_seqlens=cu, inv_freq=inv_freq, **SIZES, **kwargs)


def functions():
    """Returns the differentiable functions: (name, function of tensors, its tensors in float64)."""
    x = inputs(torch.float64)
    q, k, v = x[:3]
    _, indices = nsa(*x, return_block_indices=True)
    layout = reference.BatchLayout(CU, fsa.whole_sequences(CU), 40, 40, 8, 4)
    kc, vc = (t.detach().requires_grad_() for t in reference.compress(layout, k, v, 8, x[4:]))
    freq = fsa.rope_frequencies(8)
    return [
        # The indices are given: central differences must not change the selection.
        ("native_sparse_attention", lambda *x: nsa(*x, block_indices=indices), x),
        ("mean compression", lambda *x: nsa(*x, block_indices=indices), x[:4]),
        ("selected_attention", lambda *x: fsa.selected_attention(*x, indices, CU, block=16), x[:3]),
        ("causal", lambda *x: fsa.attention(*x, CU, inv_freq=freq), x[:3]),
        ("window", lambda *x: fsa.attention(*x, CU, rule="window", window=6), x[:3]),
        (
            "compressed",
            lambda *x: fsa.attention(*x, CU, rule="compressed", cmp_len=8, cmp_stride=4),
            [q, kc, vc],
        ),
    ]


def gradients(function, leaves):
    """Returns o and the gradients of a fixed sum over it, which is not contiguous: autograd expands it."""
    for t in leaves:
        t.grad = None
    o = function(*leaves)
    (o * torch.linspace(-1, 1, o.shape[0])[:, None, None]).sum().backward()
    return [o, *(t.grad for t in leaves)]


def test_functions():
    for name, function, leaves in functions():
        check(torch.autograd.gradcheck(function, leaves, fast_mode=True), f"gradcheck: {name}")
        want = gradients(function, leaves)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        for i, (a, b) in enumerate(zip(gradients(compiled, leaves), want)):
            close(f"compile: {name}, result {i}", a, b)
        checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(
            function, *x, use_reentrant=False
        )  # noqa: E731
        for i, (a, b) in enumerate(zip(gradients(checkpointed, leaves), want)):
            close(f"checkpoint: {name}, result {i}", a, b, 0)
        expect(RuntimeError, "torch.jit.trace: not supported", torch.jit.trace, function, tuple(leaves))
    o = fsa.native_sparse_attention(*[t.detach().to("meta") for t in inputs(torch.float64)], **SIZES)
    check(o.shape == (40, 4, 8) and o.device.type == "meta", "meta tensors")


def test_dynamic_shapes():
    """One compiled graph serves two lengths."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(nsa, fullgraph=True, backend=backend, dynamic=True)
    for n in (40, 57, 73):
        x, cu = inputs(torch.float64, N=n, requires_grad=False), torch.tensor([0, 29, 29, n])
        close(f"dynamic shapes: {n}", compiled(*x, cu_seqlens=cu), nsa(*x, cu_seqlens=cu))
    check(len(graphs) == 1, f"dynamic shapes: {len(graphs)} graphs; must be 1")


def test_autocast():
    x = inputs(torch.float32)
    want = gradients(nsa, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(nsa, x)
        compiled = torch.compile(nsa, fullgraph=True, backend="aot_eager")(*x)
    check(got[0].dtype == torch.bfloat16 == compiled.dtype, f"autocast: {got[0].dtype}, {compiled.dtype}")
    for i, (a, b) in enumerate(zip(got, want)):
        check(i == 0 or a.dtype == torch.float32, f"autocast: gradient {i} of {a.dtype}")
        close(f"autocast: result {i}", a, b, 0.15)  # rounding may change a block index
    x = inputs(torch.bfloat16)
    plain = nsa(*x)
    with torch.autocast("cpu", torch.bfloat16):
        check(torch.equal(nsa(*x), plain), "autocast changes what bf16 inputs give")
        lse = fsa.attention(*x[:3], CU, return_lse=True)[1]
    check(lse.dtype == torch.float32, f"autocast: lse of {lse.dtype}")
    check(nsa(*inputs(torch.float64)).dtype == torch.float64, "autocast leaves float64")


def test_types():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs(dtype)
        want, indices = nsa(*[t.detach().double() for t in x], return_block_indices=True)
        o, own = nsa(*x, return_block_indices=True)
        check(o.dtype == dtype and torch.equal(own, indices), f"{dtype}: type {o.dtype}, block indices")
        close(f"{dtype}", o, want, {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])
        lse = fsa.attention(*x[:3], CU, return_lse=True)[1]
        check(lse.dtype == torch.float32, f"{dtype}: lse of {lse.dtype}")


def test_views():
    """Slices of one matrix give the results of contiguous tensors, and their gradients."""
    qkv = torch.randn(40, 8 * 8 + 12, dtype=torch.float64)

    def views(m):
        q, k, v = m[:, :64].unflatten(1, (8, 8)).split([4, 2, 2], dim=1)
        return [q, k, v, m[:, 64:].unflatten(1, (4, 3))]

    a, b = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    strided, packed = nsa(*views(a)), nsa(*[x.contiguous() for x in views(b)])
    close("views: o", strided, packed)
    strided.sum().backward()
    packed.sum().backward()
    close("views: gradient", a.grad, b.grad)
    *qkvg, wk, pe, wv = inputs(torch.float64)
    for name, w, view in (
        ("transposed", wk.detach().transpose(1, 2).contiguous(), lambda w: w.transpose(1, 2)),
        ("one for all heads", wk.detach()[:1].clone(), lambda w: w.expand_as(wk)),
        ("columns", torch.cat([wk.detach(), wk.detach()], 2), lambda w: w[..., : wk.shape[2]]),
    ):
        gradients = []
        for change in (torch.Tensor.contiguous, lambda w: w):
            leaf = w.clone().requires_grad_()
            nsa(*qkvg, change(view(leaf)), pe, wv).square().sum().backward()
            gradients.append(leaf.grad)
        close(f"views: gradient of weights, {name}", *gradients)


def test_empty():
    """No tokens, no queries, a sequence shorter than a window."""
    nothing = inputs(torch.float64, N=0)
    for cu in ([0], [0, 0]):
        o = nsa(*nothing, cu_seqlens=torch.tensor(cu), check=True)
        o.sum().backward()
        check(o.shape == (0, 4, 8) and nothing[1].grad.shape == (0, 2, 8), f"empty: {cu}")
    x = inputs(torch.float64)
    o = nsa(x[0][:0], x[1], x[2], x[3][:0], *x[4:], segments=torch.zeros(0, 3, dtype=torch.long), check=True)
    o.sum().backward()
    check(o.shape == (0, 4, 8) and not any(t.grad.any() for t in x), "empty: no queries")
    x = inputs(torch.float64, N=3)
    o = nsa(*x, cu_seqlens=None, check=True)
    gate = torch.sigmoid(x[3])[..., None]
    full = fsa.attention(*x[:3], inv_freq=fsa.rope_frequencies(8))
    close("empty: no windows", o, (gate[:, :, 1] + gate[:, :, 2]) * full)
    o, lse = fsa.attention(
        x[0], x[1][:0], x[2][:0], rule="compressed", cmp_len=8, cmp_stride=4, return_lse=True
    )
    check(not o.any() and torch.equal(lse, torch.full_like(lse, -math.inf)), "empty: no compressed keys")


def test_second_gradient():
    """A gradient of a gradient is refused; it would be zero in silence."""
    q, *others = inputs(torch.float64)
    k, v = others[:2]
    message = "create_graph=True: must be False, as attention has no gradient of a gradient"
    indices = torch.zeros(2, 40, 1, dtype=torch.int32)
    functional = torch.autograd.functional
    for function in (
        lambda q: nsa(q, *others),
        lambda q: fsa.attention(q, k, v),
        lambda q: fsa.selected_attention(q, k, v, indices),
    ):
        for loss in (torch.sum, lambda o: o.square().sum()):  # the gradient of o.sum() does not require grad
            expect(RuntimeError, message, torch.autograd.grad, loss(function(q)), [q], create_graph=True)
            expect(RuntimeError, message, functional.hessian, lambda q: loss(function(q)), q)
        expect(RuntimeError, message, functional.jvp, function, q, q)
        check(functional.vjp(function, q, q)[1].any(), "a first gradient passes")


def test_operators():
    x = inputs(torch.float64, requires_grad=False)
    check_operators(*x[:4], x[4:], CU, SIZES)


def test_ranks():
    """DDP and FSDP2 with two processes."""
    check_ranks("cpu", 2)


def test_examples_of_documents():
    """The examples of README.md run. That of select_blocks selects the blocks that native_sparse_attention selects."""
    with open(os.path.join(PACKAGE, "README.md"), encoding="utf-8") as f:
        first, second = re.findall("```python\n(.*?)```", f.read(), re.DOTALL)
    scope = {}
    exec(first.replace("32, 8, 128", "4, 1, 128"), scope)  # fewer heads: on the CPU it would take 15 s
    check(scope["qkv"].grad.isfinite().all(), "README.md's first example: gradients")
    q, k, v = torch.randn(100, 4, 64), torch.randn(100, 2, 64), torch.randn(100, 2, 64)
    topk_idx = torch.where(torch.arange(100)[:, None] // 32 >= torch.arange(4), torch.arange(4), -1).expand(2, -1, -1)
    scope = dict(q=q, k=k, v=v, x=torch.randn(100, 256), cu_seqlens=torch.tensor([0, 100]), topk_idx=topk_idx, block_size=32,
                 C=256, Hq=4, Hkv=2, d=64)  # fmt: skip
    exec(second, scope)
    check(scope["o"].shape == q.shape and scope["y"].shape == (100, 256), "README.md's second example")
    lines = inspect.getdoc(fsa.select_blocks).split("with mean compression:\n")[1]
    q, k, v = torch.randn(400, 4, 8), torch.randn(400, 2, 8), torch.randn(400, 2, 8)
    scope = {**vars(fsa), "q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 150, 400])}
    exec("\n".join(line.strip() for line in lines.splitlines()), scope)
    _, want = fsa.native_sparse_attention(
        q, k, v, torch.zeros(400, 3), cu_seqlens=scope["cu_seqlens"], return_block_indices=True
    )
    check(torch.equal(scope["block_indices"], want), "the example of select_blocks: block indices")


def test_fsa_signature():
    q, k, v, *_ = x = inputs(torch.float64)
    _, indices = nsa(*x, return_block_indices=True)
    want = fsa.selected_attention(q, k, v, indices, CU, block=16, scale=0.5)
    got = fsa.FSA_topk_sparse_attention(q, k, v, indices.long(), 16, CU.int(), softmax_scale=0.5)
    close("FSA_topk_sparse_attention", got, want, 0)
    names = list(inspect.signature(fsa.FSA_topk_sparse_attention).parameters)
    check(
        names == ["q", "k", "v", "topk_idx", "block_size", "cu_seqlens", "softmax_scale"],
        f"signature {names}",
    )


def test_module():
    layer = fsa.NativeSparseAttention(48, 4, 2, 8, **SIZES).double()
    check(
        torch.equal(layer.inv_freq, fsa.rope_frequencies(8)), "module: frequencies"
    )
    check(layer.gate.bias.tolist() == 4 * [-2, -2, 2], f"module: biases of the gate {layer.gate.bias.tolist()}")
    half = fsa.NativeSparseAttention(48, 4, 2, 8, **SIZES).to(torch.bfloat16)
    check(torch.equal(half.inv_freq, layer.inv_freq), "module: .to(bfloat16) keeps the frequencies")
    check(half(torch.randn(40, 48).bfloat16(), CU).dtype == torch.bfloat16, "module: bfloat16")
    x = torch.randn(3, 20, 48, dtype=torch.float64)
    y = layer(x)
    rows = torch.cat([layer(x[i]) for i in range(3)]).view(3, 20, 48)
    close("module: a batch is its sequences", y, rows)
    close("module: packed", layer(x.flatten(0, 1), torch.tensor([0, 20, 40, 60])).view(3, 20, 48), y)
    y.sum().backward()
    missing = [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    check(not missing, f"module: no gradient for {missing}")
    torch._dynamo.reset()
    close("module: compile", torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    mean = fsa.NativeSparseAttention(48, 4, 2, 8, phi="mean", **SIZES).double()
    mean.load_state_dict({n: t for n, t in layer.state_dict().items() if n not in ("wk", "pe", "wv")})
    close("module: linear compression begins as the mean", mean(x), y)
    expect(
        ValueError, "phi 'max': must be 'linear' or 'mean'", fsa.NativeSparseAttention, 48, 4, 2, phi="max"
    )
    expect(TypeError, "x list: must be a tensor", layer, [1, 2])
    expect(ValueError, "cu_seqlens of a tensor: must be None for x of shape (3, 20, 48)", layer, x, CU)
    with torch.autocast("cpu", torch.bfloat16):
        check(half(x.float()).dtype == torch.bfloat16, "module: autocast")
    for shape in ((48,), (2, 3, 20, 48), (40, 47)):
        message = f"x of shape {shape}: must be [N, 48] or [batch, n, 48]"
        expect(ValueError, message, layer, torch.zeros(shape, dtype=torch.float64))
    for error, message, kwargs in (
        (ValueError, "hidden_size 48: must be a multiple of q_heads 5, or head_dim be given", dict(q_heads=5)),
        (ValueError, "hidden_size 48: must be a multiple of q_heads 0", dict(q_heads=0)),
        (ValueError, "q of 3 heads, k of 2: must have 1 to 16 query heads", dict(q_heads=3)),
        (ValueError, "q of head size d = 7: must be even", dict(head_dim=7)),
        (ValueError, "topk 0: must be from 1 to 4096", dict(topk=0)),
        (TypeError, "window 5.0: must be an int", dict(window=5.0)),
        (ValueError, "hidden_size -48: must be at least 1", dict(hidden_size=-48)),
        (TypeError, "q_heads '4': must be an int", dict(q_heads="4")),
        (TypeError, "q_heads 4.0: must be an int", dict(q_heads=4.0)),
        (TypeError, "kv_heads [2]: must be an int", dict(kv_heads=[2])),
        (TypeError, "head_dim '8': must be an int", dict(head_dim="8")),
        (ValueError, "scale -1.0: must be positive", dict(scale=-1.0)),
        (TypeError, "recompute 'a': must be True or False", dict(recompute="a")),
        (TypeError, "theta 'a': must be a number", dict(rope_theta="a")),
    ):
        arguments = dict(hidden_size=48, q_heads=4, kv_heads=2, **SIZES)
        expect(error, message, fsa.NativeSparseAttention, **{**arguments, **kwargs})

    # From the meta device, as FSDP2 and large checkpoints do it.
    with torch.device("meta"):
        empty = fsa.NativeSparseAttention(48, 4, 2, 8, **SIZES).double()
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    close("module: from the meta device", empty(x), y, 0)
    with torch.device("meta"):
        empty = fsa.NativeSparseAttention(48, 4, 2, 8, **SIZES).double()
    empty.load_state_dict(layer.state_dict(), assign=True)
    close("module: parameters assigned to one on the meta device", empty(x), y, 0)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for _ in range(3):
        average.update_parameters(layer)
    close("module: a moving average of parameters and buffers", average(x), y, 1e-12)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input():
    x = inputs(torch.float32, requires_grad=False)
    q, k, v, gate, wk, pe, wv = x
    expect(
        ValueError, "k of shape (40, 2, 6): must be [N, Hkv, d] with d = 8 of q", nsa, q, k[..., :6], v, gate
    )
    expect(ValueError, "v of shape (39, 2, 8): must be (40, 2, 8), the shape of k", nsa, q, k, v[1:], gate)
    expect(
        ValueError, "q of 3 heads, k of 2: must have 1 to 16 query heads", nsa, q[:, :3], k, v, gate[:, :3]
    )
    expect(ValueError, "gate_logits of shape (40, 4, 2)", nsa, q, k, v, gate[..., :2])
    expect(
        TypeError,
        "k of type torch.float64: must be torch.float32, the type of q",
        nsa,
        q,
        k.double(),
        v,
        gate,
    )
    expect(ValueError, "v on meta: must be on cpu, the device of q", nsa, q, k, v.to("meta"), gate)
    expect(TypeError, "q of type torch.int32: must be a float type", nsa, q.int(), k, v, gate)
    expect(TypeError, "q list: must be a tensor", fsa.native_sparse_attention, [1], k, v, gate)
    expect(
        ValueError,
        "wk of shape (2, 63, 8): must be [Hkv, cmp_len*d, d] = (2, 64, 8)",
        nsa,
        *x[:4],
        wk[:, 1:],
        pe,
        wv,
    )
    expect(ValueError, "wv None: must be given with wk", nsa, *x[:4], wk)
    expect(ValueError, "pe of shape (2, 7, 8)", nsa, *x[:4], wk, pe[:, 1:], wv)
    call = fsa.native_sparse_attention
    expect(
        ValueError,
        "inv_freq of shape (8,): must be [d/2] = (4,)",
        call,
        *x[:4],
        inv_freq=fsa.rope_frequencies(16),
    )
    expect(
        TypeError,
        "inv_freq of type torch.float32: must be torch.float64",
        call,
        *x[:4],
        inv_freq=torch.ones(4),
    )
    expect(TypeError, "cu_seqlens of type torch.float32", call, *x[:4], cu_seqlens=torch.ones(2))
    expect(ValueError, "segments of shape (1, 2)", call, *x[:4], segments=torch.ones(1, 2).int())
    expect(ValueError, "segments None: must be given, as q has 39 rows", call, q[1:], k, v, gate[1:])
    expect(ValueError, "cu_seqlens of shape (0,): must be [num_seqs + 1]", call, *x[:4], cu_seqlens=CU[:0])
    expect(TypeError, "wk list: must be a tensor or None", call, *x[:4], [1.0], pe, wv)
    expect(TypeError, "inv_freq list: must be a tensor or None", call, *x[:4], inv_freq=[1.0])
    expect(TypeError, "topk 2.0: must be an int", call, *x[:4], **{**SIZES, "topk": 2.0})
    expect(TypeError, "window None: must be an int", call, *x[:4], **{**SIZES, "window": None})
    expect(TypeError, "scale 'a': must be a number", call, *x[:4], scale="a")
    for name, value, rule in (
        ("cmp_len", 0, "must be from 1 to 2^31 - 1"),
        ("cmp_stride", 3, "must be a divisor of cmp_len 8"),
        ("cmp_len", 32, "must be at most block 16"),
        ("block", 24, "must be a multiple of 16, from 16 to 2^31 - 16"),
        ("block", 2**32 + 16, "must be a multiple of 16, from 16 to 2^31 - 16"),
        ("topk", 1, "must be at least init_blocks 1 + local_blocks 1 = 2"),
        ("topk", 5000, "must be from 1 to 4096"),
        ("init_blocks", -1, "must be at least 0"),
        ("window", 0, "must be from 1 to 2^31 - 1"),
        ("window", 2**31, "must be from 1 to 2^31 - 1"),
        *(("scale", x, "must be positive and finite in float32") for x in (-1.0, 0, math.nan, 2.0**-150, 3.4028236e38)),
    ):
        sizes = {**SIZES, name: value}
        expect(
            ValueError,
            f"{name} {value}: {rule}",
            call,
            *x[:4],
            **sizes,
        )
    attention, selected = fsa.attention, fsa.selected_attention
    for scale in (1.5 * 2.0**-150, 3.4028235e38, 1):
        check(argument_checks.scale(scale) == scale, f"scale {scale} passes")
    expect(ValueError, "rule None: must be one of causal, window, compressed", attention, q, k, v, rule=None)
    expect(ValueError, "rule ['causal']: must be one of causal", attention, q, k, v, rule=["causal"])
    expect(TypeError, "block_indices NoneType: must be a tensor", selected, q, k, v, None)
    expect(ValueError, "block_indices of shape (2, 40, 3): must have 1 to 4096 slots for each query, and at least "
           "init_blocks 2 + local_blocks 2 = 4", selected, q, k, v, torch.zeros(2, 40, 3).int(), init_blocks=2,
           local_blocks=2)  # fmt: skip
    expect(ValueError, "block_indices of shape (2, 40, 0): must have 1 to 4096 slots", selected, q, k, v,
           torch.zeros(2, 40, 0).int())  # fmt: skip
    expect(TypeError, "topk_idx of type torch.float32: must be torch.int32 or torch.int64",
           fsa.FSA_topk_sparse_attention, q, k, v, torch.zeros(2, 40, 2), 16, CU)  # fmt: skip
    expect(TypeError, "lse_c NoneType: must be a tensor", fsa.select_blocks, q, k, None)
    expect(
        ValueError, "rule 'full': must be one of causal, window, compressed", attention, q, k, v, rule="full"
    )
    expect(ValueError, "window None: must be given for rule='window'", attention, q, k, v, rule="window")
    expect(ValueError, "window 5: must be given for rule='window'", attention, q, k, v, window=5)
    short = dict(rule="compressed", cmp_len=8, cmp_stride=4)
    expect(ValueError, "k of 9 rows: must have at least num_keys // cmp_stride = 40 // 4 = 10", attention, q, k[:9],
           v[:9], **short)  # fmt: skip
    for name, value in (("cmp_stride", 0), ("cmp_stride", 2**32 + 16), ("cmp_len", 2**32 + 32)):
        message = f"{name} {value}: must be from 1 to 2^31 - 1"
        expect(ValueError, message, attention, q, k, v, rule="compressed", **{name: value})
    expect(ValueError, "window 4294967297: must be from 1 to 2^31 - 1", attention, q, k, v, rule="window", window=2**32 + 1)
    check(attention(q, k, v, rule="window", window=2**31 - 1).isfinite().all(), "the greatest window passes")
    expect(ValueError, "inv_freq of a tensor: must be None for rule='compressed'", attention, q, k[:10], v[:10],
           inv_freq=fsa.rope_frequencies(8), **short)  # fmt: skip

    expect(TypeError, "cu_seqlens list: must be a tensor", fsa.whole_sequences, [0, 40])
    expect(ValueError, "cu_seqlens of shape (1, 5): must be [num_seqs + 1]", fsa.whole_sequences, torch.zeros(1, 5).int())
    expect(TypeError, "cu_seqlens of type torch.float32", fsa.whole_sequences, torch.zeros(5))
    expect(ValueError, "head_dim 7: must be even and at least 2", fsa.rope_frequencies, 7)
    expect(ValueError, "theta 0: must be positive", fsa.rope_frequencies, 8, 0)

    # Values: those of the batch are always checked on the CPU, others on demand.
    wrong = torch.tensor([0, 30, 20, 40])
    indices = torch.zeros(2, 40, 2, dtype=torch.int32)
    for function, arguments in (
        (nsa, x),
        (attention, (q, k, v)),
        (selected, (q, k, v, indices)),
        (fsa.select_blocks, (q, k, torch.zeros(40, 4))),
    ):
        message = "cu_seqlens[2] 20: must be at least cu_seqlens[1] 30"
        expect(ValueError, message, function, *arguments, cu_seqlens=wrong)
    for cu, message in (
        ([1, 40], "cu_seqlens[0] 1: must be 0"),
        ([0, 30, 20, 40], "cu_seqlens[2] 20: must be at least cu_seqlens[1] 30"),
        ([0, 20, 39], "cu_seqlens[2] 39: must be 40, the number of keys"),
    ):
        expect(ValueError, message, nsa, *x, cu_seqlens=torch.tensor(cu), check=True)
    for segments, message in (
        ([[3, 0, 40]], "segments[0] (3, 0, 40): the sequence must be from 0 to 2"),
        ([[0, 0, 30], [2, 0, 10]], "segments[0] (0, 0, 30): must lie in its sequence of 29 tokens"),
        ([[2, 0, 11], [0, 0, 29]], "segments[1] (0, 0, 29): must not begin before (2, 11)"),
        ([[0, 0, 29]], "segments of 29 queries: must have 40"),
    ):
        expect(ValueError, message, nsa, *x, segments=torch.tensor(segments), check=True)
    _, indices = nsa(*x, return_block_indices=True)
    check(nsa(*x, block_indices=indices, check=True).isfinite().all(), "right block indices pass")
    for at, value, message in (
        ((1, 20, 0), -2, "block_indices[1, 20, 0] -2: must be -1 or a block"),
        ((0, 20, 1), 2, "block_indices[0, 20, 1] 2: must be at most 1, the query's own block"),
        ((0, 20, 1), 0, "block_indices[0, 20, 1] 0: blocks must ascend"),
        ((1, 20, 0), -1, "block_indices[1, 20, 1] 1: blocks must ascend, and -1 come after them"),
        ((1, 28, 1), -1, "block_indices[1, 28, 0] 0: the list must contain the local blocks"),
    ):
        wrong = indices.clone()
        wrong[at] = value
        expect(ValueError, message, nsa, *x, block_indices=wrong)
    wrong = indices.clone()
    wrong[0, 20] = torch.tensor([1, -1])
    expect(ValueError, "block_indices[0, 20, 0] 1: the list must contain the initial blocks", nsa, *x, block_indices=wrong,
           check=True)  # fmt: skip
    fsa.selected_attention(q, k, v, wrong, CU, block=16)  # any list: no block is always selected
    wrong[0, 20] = torch.tensor([1, 0])
    for function in (fsa.selected_attention, fsa.FSA_topk_sparse_attention):
        name = "block" if function is fsa.selected_attention else "block_size"
        expect(ValueError, "block_indices[0, 20, 1] 0: blocks must ascend", function, q, k, v, wrong, cu_seqlens=CU,
               **{name: 16})  # fmt: skip
    for value in (2**32, -(2**32) - 1, -2):
        topk_idx = torch.zeros(2, 40, 1, dtype=torch.int64)
        topk_idx[1, 20, 0] = value
        expect(ValueError, f"topk_idx[1, 20, 0] {value}: must be -1 or a block of the query's sequence",
               fsa.FSA_topk_sparse_attention, q, k, v, topk_idx, 16, CU)  # fmt: skip
    argument_checks.CHECK_VALUES = True
    expect(ValueError, "cu_seqlens[0] 1", nsa, *x, cu_seqlens=torch.tensor([1, 40]))
    argument_checks.CHECK_VALUES = False
    code = "import flash_sparse_attention.checks as c; print(c.CHECK_VALUES)"
    env = {**os.environ, "FSA_CHECK": "1", "PYTHONPATH": PACKAGE}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    check(out == "True\n", f"FSA_CHECK=1: {out!r}")


def test_strides():
    """The layouts that libfsa reads."""
    row_stride = cuda._row_stride
    m = torch.zeros(9, 512, dtype=torch.bfloat16)
    q = m[:, 128:256].unflatten(1, (2, 64))
    check(
        row_stride("q", q) == 512 and row_stride("q", q[:1]) == 0,
        "strides: a view, and one row, which is packed",
    )
    gate_logits = m[:, :6].unflatten(1, (2, 3))
    check(row_stride("gate_logits", gate_logits, multiple=1) == 512, "strides: gate logits")
    expect(ValueError, "q of strides (64, 576, 1): a token's row must be contiguous; try q.contiguous()", row_stride, "q",
           torch.zeros(2, 9, 64).transpose(0, 1))  # fmt: skip
    expect(ValueError, "k of row stride 132: must be at least 128, the elements of a row, and a multiple of 8", row_stride,
           "k", torch.zeros(9, 132)[:, :128].unflatten(1, (2, 64)))  # fmt: skip
    expect(ValueError, "k of row stride 64: must be at least 128", row_stride, "k",
           torch.zeros(700).as_strided((9, 2, 64), (64, 64, 1)))  # fmt: skip
    expect(ValueError, "k of row stride 0: must be at least 128", row_stride, "k",
           torch.zeros(2, 64).expand(9, 2, 64))  # fmt: skip
    expect(ValueError, "pe of strides (1, 3): must be contiguous; try pe.contiguous()", cuda._check_packed,
           pe=torch.zeros(4, 3).T)  # fmt: skip
    for dout in (
        torch.ones(1, 1, 1).expand(9, 2, 64),
        torch.zeros(2, 9, 64).transpose(0, 1),
        torch.zeros(1153)[1:].view(9, 2, 64),
    ):
        copy = cuda._readable(dout)
        right = torch.equal(copy, dout) and copy.is_contiguous() and copy.data_ptr() % 16 == 0
        check(right, f"strides: dout of {dout.stride()}")


# ---- the library -----------------------------------------------------------------------------------------------------


def test_structs():
    """Sizes and offsets of the ctypes structs are those of a C compiler, constants and version those of fsa.h."""
    lines = []
    for s in library.STRUCTS:
        lines.append(f'printf("{s.__name__} %zu\\n", sizeof({s.__name__}));')
        for field, _ in s._fields_:
            at = f"offsetof({s.__name__}, {field}), sizeof((({s.__name__} *)0)->{field})"
            lines.append(f'printf("{s.__name__}.{field} %zu %zu\\n", {at});')
    names = ("PHI_MEAN PHI_LINEAR BF16 FP16 FORWARD BACKWARD SELECTED_FORWARD SELECTED_BACKWARD SELECT_BLOCKS "
             "ATTENTION_FORWARD ATTENTION_BACKWARD ERROR_CONFIG ERROR_ARGUMENT").split()  # fmt: skip
    constants = {n: getattr(library, n) for n in names}
    constants.update({n.upper(): value for n, value in library.RULES.items()})
    constants.update(
        VERSION_MAJOR=library.VERSION[0], VERSION_MINOR=library.VERSION[1], VERSION_PATCH=library.VERSION[2]
    )
    lines += [f'printf("{n} %d\\n", (int)FSA_{n});' for n in constants]
    want = [f"{n} {value}" for n, value in constants.items()]
    got = []
    for s in library.STRUCTS:
        got.append(f"{s.__name__} {library.ctypes.sizeof(s)}")
        for field, _ in s._fields_:
            descriptor = getattr(s, field)
            got.append(f"{s.__name__}.{field} {descriptor.offset} {descriptor.size}")
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "structs.c"), os.path.join(folder, "structs")
        with open(source, "w") as f:
            f.write(
                '#include "fsa.h"\n#include <stdio.h>\nint main(void) {\n'
                + "\n".join(lines)
                + "\nreturn 0;\n}\n"
            )
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-I" + os.path.join(ROOT, "fsa"), source, "-o", program], check=True)
        out = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    got += want
    check(len(out) == len(got), f"structs: {len(out)} lines from C, {len(got)} from Python")
    for a, b in zip(out, got):
        check(a == b, f"structs: C has {a!r}, Python {b!r}")
    # No field of the header is missing here, and no struct or function.
    with open(os.path.join(ROOT, "fsa/fsa.h")) as f:
        header = re.sub(r"//[^\n]*", "", f.read())
    structs = set(re.findall(r"\} (Fsa\w+);", header)) - {"FsaPhi", "FsaVisibility", "FsaDtype", "FsaStatus"}
    known = {s.__name__ for s in library.STRUCTS} | {"FsaSegment", "FsaOperation"}
    check(structs == known, f"structs of fsa.h: {structs ^ known}")
    for body, name in re.findall(r"typedef struct \{(.*?)\} (Fsa\w+);", header, re.S):
        if name != "FsaSegment":
            fields = re.findall(r"(\w+)(?:\[\d+\])?(?=[,;])", body)
            mine = [field for field, _ in getattr(library, name)._fields_]
            check(fields == mine, f"fields of {name}: {fields} in fsa.h, {mine} in Python")
    check(fsa.__version__ == "{}.{}.{}".format(*library.VERSION), f"version {fsa.__version__}")


def test_library():
    """A library that is missing, broken or of another version; an import without one."""
    code = ("import os, sys\nimport flash_sparse_attention.library as l\nfor os.environ['LIBFSA'] in sys.argv[1:]:\n"
            "    try: l.load(); print('loaded')\n    except RuntimeError as e: print(e)")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        text, other = os.path.join(folder, "text.so"), os.path.join(folder, "other.so")
        with open(text, "w") as f:
            f.write("no library")
        source = os.path.join(folder, "other.c")
        with open(source, "w") as f:
            f.write("int fsa_version(void) { return 1000 * 7 + 3; }\n")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", other], check=True)
        missing = os.path.join(folder, "missing.so")
        messages = (
            f"libfsa.so: not found at {missing}; build it with `make libfsa.so` and set LIBFSA",
            f"libfsa.so: cannot be loaded from {text}: ",
            f"libfsa.so: version 7.3 at {other}; must be 0.1 or a later 0.x",
        )
        env = {**os.environ, "LIBFSA": missing, "PYTHONPATH": PACKAGE}
        command = [sys.executable, "-c", code, missing, text, other]
        r = subprocess.run(command, env=env, capture_output=True, text=True)
        lines = r.stdout.splitlines()
        for i, message in enumerate(messages):
            right = r.returncode == 0 and len(lines) == 3 and lines[i].startswith(message)
            check(right, f"library: {r.stdout}{r.stderr}; expected {message!r} in line {i + 1}")


def test_calls():
    """The arguments of the calls of libfsa: torch_calls.py."""
    program = os.path.join(ROOT, "dev/test/torch_calls.py")
    r = subprocess.run([sys.executable, "-W", "ignore", program], capture_output=True, text=True)
    lines = (r.stdout + r.stderr).splitlines()
    check(r.returncode == 0, f"torch_calls.py: {lines[0] if r.stdout.startswith('FAILED') else lines[-1:]}")


def test_host_time():
    """The host time of the calls without those of libfsa. The bars are wide, for machines that are busy; test_torch_gpu.py has
    those that count."""
    program = os.path.join(ROOT, "dev/test/torch_host_time.py")
    r = subprocess.run([sys.executable, "-W", "ignore", program], capture_output=True, text=True)
    found = dict(re.findall(r"^(forward|backward) (\S+) us,", r.stdout, re.M))
    for name, bar in (("forward", 150), ("backward", 500)):
        check(
            float(found.get(name, "inf")) <= bar,
            f"host time, {name}: {found.get(name)} us, bar {bar}: {r.stderr[-300:]}",
        )


def test_example():
    """The example is at most 60 lines long, and its first step runs."""
    with open(os.path.join(PACKAGE, "example.py")) as f:
        source = f.read()
    check(source.count("\n") <= 60, f"example.py: {source.count(chr(10))} lines; must be at most 60")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(source.replace("range(1001)", "range(1)"), {})
    right = re.fullmatch(r"step 0: loss \d\.\d+, \d+% of the answers are right\n", out.getvalue())
    check(right, f"example.py: {out.getvalue()!r}")


if __name__ == "__main__":
    run(*[partial(test_golden, name) for name in ("gqa1", "gqa3", "gqa4", "slice", "edges")])
    run(test_functions, test_dynamic_shapes, test_autocast, test_types, test_views, test_empty, test_second_gradient,
        test_operators, test_examples_of_documents, test_fsa_signature, test_module, test_bad_input, test_strides,
        test_structs, test_library, test_ranks, test_calls, test_host_time)  # fmt: skip
    if torch.cuda.is_available():
        import test_torch_gpu

        seed = next((int(x[5:]) for x in sys.argv[1:] if x.startswith("seed=")), time.time_ns() % 10**6)
        print(f"seed={seed}")
        torch.manual_seed(seed)
        torch.set_num_threads(os.cpu_count() // 2)
        run(*test_torch_gpu.TESTS)
        if "check" not in sys.argv:
            run(*test_torch_gpu.TIMES)
    else:
        skip("the GPU's part: PyTorch sees no GPU")
    run(test_example)  # on a GPU it takes the library that test_torch_gpu names
    finish()
