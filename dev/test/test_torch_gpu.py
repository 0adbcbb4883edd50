"""The part of test_torch.py that needs a GPU: all functions against the reference at random shapes and strides, opcheck,
torch.compile, CUDA graphs, streams, autocast, checkpointing, bad input, 1M tokens, DDP and FSDP2, and the time that the
package adds to the calls of libfsa."""

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time

import torch
import torch.utils.flop_counter
from torch_checks import (
    PACKAGE,
    ROOT,
    check,
    check_operators,
    check_ranks,
    close,
    expect,
    fsa,
    relative_error,
    results,
    same,
    set_libfsa,
    skip,
)

from flash_sparse_attention import cuda, library, reference

set_libfsa()
SIZES = dict(cmp_len=32, cmp_stride=16, block=64, topk=16, init_blocks=1, local_blocks=2, window=512)


# ---- results against the reference -----------------------------------------------------------------------------------


def random_case(dtype, device):
    """Returns a random case: leaves, cu_seqlens, segments, inv_freq, and sizes of native_sparse_attention."""
    pick = lambda *x: x[int(torch.randint(len(x), ()))]  # noqa: E731
    Hkv, g, d = pick(1, 2, 3), pick(1, 2, 4, 5), pick(64, 128)
    Hq, l = Hkv * g, 32
    lengths = [pick(1, 31, 63, 130, 300) for _ in range(3)]
    N = sum(lengths)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    random = lambda *s: torch.randn(s, device=device)  # noqa: E731
    rows = random(N, (Hq + 2 * Hkv) * d + 8).to(dtype)[:, 8:].unflatten(1, (-1, d))
    q, k, v = rows.split([Hq, Hkv, Hkv], dim=1)
    gate = random(N, 3 * Hq + pick(0, 1, 5)).to(dtype)
    gate = gate[:, : 3 * Hq].unflatten(1, (Hq, 3)) if pick(0, 1) else gate[:, :3]
    phi = [None] * 3
    if pick(0, 1):
        wk, wv = ((l * d) ** -0.5 * random(Hkv, l * d, d).to(dtype) for _ in range(2))
        phi = [wk, 0.5 * random(Hkv, l, d).to(dtype) if pick(0, 1) else None, wv]
    segments = None
    if pick(0, 1):  # the second half of each sequence
        halves = [(i, n // 2, n - n // 2) for i, n in enumerate(lengths)]
        segments = torch.tensor(halves, device=device)
        rows = torch.cat([torch.arange(c + p, c + p + n) for c, (_, p, n) in zip(cu.tolist(), halves)])
        q, gate = q[rows.to(device)], gate[rows.to(device)]
    inv_freq = fsa.rope_frequencies(d, device=device) if pick(0, 1) else None
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, gate, *phi)]
    sizes = dict(topk=pick(3, 4, 16), window=pick(1, 50, 512), recompute=bool(pick(0, 1)))
    return leaves, cu, segments, inv_freq, sizes


@contextlib.contextmanager
def reference_in(dtype):
    """Makes the reference compute in a type."""
    before, reference.compute_dtype = reference.compute_dtype, lambda _: dtype
    try:
        yield
    finally:
        reference.compute_dtype = before


def on_cpu(x, dtype=None):
    """Returns a tensor on the CPU, and with dtype as a leaf of that type; other things as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.cpu() if dtype is None else x.detach().cpu().to(dtype).requires_grad_()


def compare(name, function, leaves, dout, *rest):
    """Checks function(*rest, *leaves) on the GPU against the reference in float64, by FlashAttention's rule: an error may
    be at most twice that of PyTorch's own computation in 16 bits, plus half an ulp: PyTorch's error can be 0, as where a
    query sees one key. Returns the outputs."""
    dtype = leaves[0].dtype
    got = results(lambda *x: function(*rest, *x), leaves, dout)
    rest = [on_cpu(x) for x in rest]
    computed = []
    for type_ in (torch.float64, dtype):
        with reference_in(type_):
            inputs = [on_cpu(x, type_) for x in leaves]
            computed.append(results(lambda *x: function(*rest, *x), inputs, dout.cpu()))
    for kind in range(2):
        for i, x in enumerate(got[kind]):
            if x is not None:
                want, own = (y[kind][i] for y in computed)
                error, limit = relative_error(x.cpu(), want, 0.05), relative_error(own, want, 0.05)
                check(error <= 2 * limit + torch.finfo(dtype).eps / 2,
                      f"{name}: {('output', 'gradient')[kind]} {i}: error {error:.1e}, PyTorch's {limit:.1e}")  # fmt: skip
    return got[0]


def test_shapes(cases=12, device="cuda"):
    """All functions, forward and backward, at random shapes and strides."""
    for case in range(cases):
        dtype = (torch.bfloat16, torch.float16)[case % 2]
        leaves, cu, segments, inv_freq, sizes = random_case(dtype, device)
        q, k, v = leaves[:3]
        N, dout = k.shape[0], torch.randn(q.shape, device=device)
        name = f"case {case}, {dtype}, {tuple(q.shape)}, {tuple(k.shape)}, {cu.tolist()}, {sizes}"

        def whole(cu, segments, inv_freq, indices, *x):
            return fsa.native_sparse_attention(*x, cu, inv_freq=inv_freq, block_indices=indices, segments=segments,
                                               check=True, **sizes)  # fmt: skip

        # The reference gets the GPU's indices: rounding may change them.
        _, indices = fsa.native_sparse_attention(*leaves, cu, inv_freq=inv_freq, segments=segments,
                                                 return_block_indices=True, **sizes)  # fmt: skip
        compare(f"native_sparse_attention, {name}", whole, leaves, dout, cu, segments, inv_freq, indices)
        a, b = (
            results(lambda *x: whole(cu, segments, inv_freq, i, *x), leaves, dout) for i in (None, indices)
        )
        same(f"given indices, {name}", a, b)
        for always in (dict(init_blocks=1, local_blocks=2), {}):
            compare(f"selected_attention {always}, {name}", lambda cu, segments, indices, *x: fsa.selected_attention(
                *x, indices, cu, segments=segments, return_lse=True, check=True, **always), leaves[:3], dout, cu, segments,
                indices)  # fmt: skip
        for rule in (dict(rule="causal"), dict(rule="window", window=sizes["window"])):
            compare(f"{rule}, {name}", lambda cu, segments, inv_freq, *x: fsa.attention(
                *x, cu, inv_freq=inv_freq, segments=segments, return_lse=True, check=True, **rule), leaves[:3], dout, cu,
                segments, inv_freq)  # fmt: skip
        layout = reference.BatchLayout(cu, fsa.whole_sequences(cu), N, N, 32, 16)
        kc, vc = (x.to(dtype) for x in reference.compress(layout, k.float(), v.float(), 32))
        kc, vc = kc.detach(), vc.detach()
        kc[~layout.is_window], vc[~layout.is_window] = math.nan, math.nan  # rows that nobody reads
        kc, vc = (
            torch.cat([x, torch.full_like(k[:2], math.nan)]).detach().requires_grad_() for x in (kc, vc)
        )
        _, lse = compare(f"compressed, {name}", lambda cu, segments, *x: fsa.attention(
            *x, cu, rule="compressed", num_keys=N, segments=segments, return_lse=True, check=True), [q, kc, vc], dout,
            cu, segments)  # fmt: skip
        options = dict(num_keys=N, topk=4, check=True)
        i = fsa.select_blocks(q, kc, lse, cu, segments=segments, **options)
        j = fsa.select_blocks(q.cpu().double(), kc.cpu().double(), lse.cpu().double(), cu.cpu(),
                              segments=on_cpu(segments), **options)  # fmt: skip
        wrong = (i.cpu() != j).double().mean()
        check(wrong < 0.02, f"select_blocks, {name}: {wrong:.1%} of the block indices differ")


def test_empty(device="cuda"):
    """No tokens, no queries, no windows."""
    for N, Nq in ((0, 0), (40, 0), (5, 5)):
        shapes = [
            (Nq, 4, 64),
            (N, 2, 64),
            (N, 2, 64),
            (Nq, 4, 3),
            (2, 64 * 32, 64),
            (2, 32, 64),
            (2, 64 * 32, 64),
        ]
        leaves = [torch.randn(s, device=device).bfloat16().requires_grad_() for s in shapes]
        none = torch.zeros(2, Nq, 3, dtype=torch.int32, device=device) - 1
        cu = torch.tensor([0, N], device=device)
        segments = torch.tensor([[0, 0, Nq]], device=device)
        for name, function, inputs in (
            ("native_sparse_attention", lambda *x: fsa.native_sparse_attention(*x, cu, segments=segments), leaves),
            ("mean", lambda *x: fsa.native_sparse_attention(*x, cu_seqlens=cu, segments=segments), leaves[:4]),
            ("causal", lambda *x: fsa.attention(*x, cu, segments=segments), leaves[:3]),
            ("selected", lambda *x: fsa.selected_attention(*x, none, cu, segments=segments), leaves[:3]),
            ("compressed",
             lambda q, k, v: fsa.attention(q, k[:0], v[:0], cu, rule="compressed", segments=segments, num_keys=min(N, 5)),
             leaves[:3]),
        ):  # fmt: skip
            if name == "compressed" and N == 40:
                continue  # has windows
            o = function(*inputs)
            o.sum().backward()
            finite = all(x.isfinite().all() for x in (o, *(t.grad for t in inputs)))
            check(o.shape == (Nq, 4, 64) and finite, f"empty: {name}, {N} keys, {Nq} queries")
            none_seen = name in ("selected", "compressed")
            check(not none_seen or not o.any(), f"empty: {name}: o of queries that see no key")
        if N < 40:
            lse = torch.full((Nq, 4), -math.inf, device=device)
            blocks = fsa.select_blocks(leaves[0], leaves[1][:0], lse, cu, segments=segments, topk=3)
            own = torch.tensor([0, -1, -1], device=device, dtype=torch.int32).expand(2, Nq, 3)
            check(torch.equal(blocks, own), f"empty: select_blocks, {N} keys: {blocks[0, :1].tolist()}")


def test_million_tokens(N=1_000_000, Hq=4, d=64):
    """Forward and backward of a sequence of 1M tokens. dout is 0 but for some queries, so that the reference needs these
    queries only."""
    k, v = (torch.randn(N, 1, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    q = torch.randn(N, Hq, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    gate = torch.randn(N, Hq, 3, device="cuda", dtype=torch.bfloat16).requires_grad_()
    wk, wv = ((32 * d) ** -0.5 * torch.randn(1, 32 * d, d, device="cuda") for _ in range(2))
    pe = 0.5 * torch.randn(1, 32, d, device="cuda")
    phi = [x.bfloat16().requires_grad_() for x in (wk, pe, wv)]
    rows = torch.tensor([0, 31, 4097, N // 2 + 7, N - 1], device="cuda")
    dout = torch.zeros_like(q)
    dout[rows] = torch.randn(len(rows), Hq, d, device="cuda", dtype=torch.bfloat16)
    cu, inv_freq = torch.tensor([0, N], device="cuda"), fsa.rope_frequencies(d, device="cuda")
    segments = torch.stack([torch.zeros_like(rows), rows, torch.ones_like(rows)], 1)

    def compare_rows(name, function, by_reference, leaves):
        (o, *rest), gradients = results(function, leaves, dout)
        inputs = [x.detach().double() for x in leaves]
        inputs = [x[rows] if len(x) == N and x.shape[1] == Hq else x for x in inputs]  # q and the gate
        want, want_gradients = results(lambda *x: by_reference(*rest, *x), [x.requires_grad_() for x in inputs],
                                       dout[rows])  # fmt: skip
        close(f"{name}: output", o[rows], want[0], 5e-3)
        for i, (a, b) in enumerate(zip(gradients, want_gradients)):
            close(f"{name}: gradient {i}", a[rows] if len(a) == N and a.shape[1] == Hq else a, b, 2e-2)

    compare_rows(
        "1M tokens, native_sparse_attention",
        lambda *x: fsa.native_sparse_attention(*x, cu, inv_freq=inv_freq, return_block_indices=True),
        lambda indices, q, k, v, gate, *phi: reference.native_sparse_attention(
            q, k, v, gate, *phi, cu, segments, inv_freq, indices[:, rows], *SIZES.values(), d**-0.5),
        [q, k, v, gate, *phi])  # fmt: skip
    compare_rows(
        "1M tokens, causal",
        lambda *x: fsa.attention(*x, cu, inv_freq=inv_freq),
        lambda q, k, v: reference.attention(q, k, v, cu, segments, inv_freq, "causal", N, 16, 16, 1, d**-0.5),
        [q, k, v])  # fmt: skip


# ---- use in PyTorch --------------------------------------------------------------------------------------------------


def fixed_case(N=700, Hq=4, Hkv=2, d=64, dtype=torch.bfloat16):
    """Returns leaves, dout and a function of the leaves."""
    weight = (Hkv, 32 * d, d)
    shapes = [(N, Hq, d), (N, Hkv, d), (N, Hkv, d), (N, Hq, 3), weight, (Hkv, 32, d), weight]
    factors = [1, 1, 1, 1, (32 * d) ** -0.5, 0.5, (32 * d) ** -0.5]
    leaves = [(f * torch.randn(s, device="cuda")).to(dtype) for f, s in zip(factors, shapes)]
    rows = torch.randn(N, Hq + 2 * Hkv, d, device="cuda").to(dtype)
    leaves[:3] = rows.split([Hq, Hkv, Hkv], dim=1)  # views
    leaves = [x.detach().requires_grad_() for x in leaves]
    cu = torch.tensor([0, N // 3, N], device="cuda")
    segments, inv_freq = fsa.whole_sequences(cu), fsa.rope_frequencies(d, device="cuda")

    def function(*x):
        return fsa.native_sparse_attention(*x, cu, segments=segments, inv_freq=inv_freq)

    return leaves, torch.randn(N, Hq, d, device="cuda"), function


def test_reproducible():
    """The same input gives the same bits, by the operators, with checkpointing, with offloading, and under torch.compile in
    one graph."""
    leaves, dout, function = fixed_case()
    want = results(function, leaves, dout)
    same("second call", results(function, leaves, dout), want)
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # a mode of the dispatcher
        same("operators", results(function, leaves, dout), want)
    o = function(*leaves)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        gradients = torch.autograd.grad(o, leaves, dout.to(o.dtype))
    same("the backward operator alone", ([o], gradients), want)
    checkpoint = lambda *x: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=False)  # noqa: E731
    same("checkpoint", results(checkpoint, leaves, dout), want)
    with torch.autograd.graph.save_on_cpu():  # what comes back has other strides than the views that were saved
        same("save_on_cpu", results(function, leaves, dout), want)
    torch._dynamo.reset()
    same("compile", results(torch.compile(function, fullgraph=True), leaves, dout), want)


def test_streams():
    """Two streams, each with calls of its own inputs, and from two threads."""
    cases = [fixed_case(N) for N in (700, 900)]
    want = [results(f, leaves, dout) for leaves, dout, f in cases]
    got = [[], []]

    def work(i):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        leaves, dout, function = cases[i]
        with torch.cuda.stream(stream):
            for _ in range(8):
                got[i].append(results(function, leaves, dout))
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        check(len(got[i]) == 8, f"streams: thread {i} made {len(got[i])} of 8 calls")
        for x in got[i]:
            same(f"stream {i}", x, want[i])


def test_graph():
    """A captured graph of forward and backward gives the bits of direct calls, also for new inputs."""
    leaves, dout, function = fixed_case()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(function, leaves, dout)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(function, leaves, dout)
    for call in range(2):
        with torch.no_grad():
            for x in leaves:
                x.mul_(0.9)
        graph.replay()
        torch.cuda.synchronize()
        got = [[x.clone() for x in y] for y in captured]
        same(f"graph, replay {call}", got, results(function, leaves, dout))


def test_operators():
    leaves, _, _ = fixed_case(N=200)
    x = [t.detach() for t in leaves]
    check_operators(*x[:4], x[4:], torch.tensor([0, 60, 200], device="cuda"), {**SIZES, "topk": 3})


def test_module():
    """The module in bf16, in float32 under autocast, and compiled; the example learns."""
    x = torch.randn(2, 300, 256, device="cuda")
    layer = fsa.NativeSparseAttention(256, 4, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)(x)
    check(y.dtype == torch.bfloat16, f"module, autocast: {y.dtype}")
    close("module, compiled", compiled, y, 1e-2)
    y.float().sum().backward()
    check(all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters()),
          "module, autocast: gradients")  # fmt: skip
    double = fsa.NativeSparseAttention(256, 4, 2).double()
    double.load_state_dict({n: t.cpu() for n, t in layer.state_dict().items()})
    close("module, autocast", y.cpu(), double(x.cpu().double()), 3e-2)
    close("module, bf16", layer.bfloat16()(x.bfloat16()).cpu(), double(x.cpu().double()), 3e-2)
    out = subprocess.run([sys.executable, os.path.join(PACKAGE, "example.py")], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": PACKAGE})  # fmt: skip
    right = [int(x) for x in re.findall(r"(\d+)% of the answers", out.stdout)[-10:]]
    check(  # of 512 answers each; 86 to 92% on an H200. Guessing gets 12%
        len(right) == 10 and statistics.fmean(right) >= 80,
        f"example.py: {right}% of the answers are right {out.stderr.strip().splitlines()[-1:]}",
    )


def test_bad_input():
    leaves, _, function = fixed_case()
    q, k, v = (x.detach() for x in leaves[:3])
    attention = fsa.attention
    expect(TypeError, "q of type torch.float32: must be torch.bfloat16 or torch.float16 on a GPU; try q.bfloat16()",
           attention, q.float(), k.float(), v.float())  # fmt: skip
    expect(ValueError, "k on cpu: must be on cuda:0, the device of q", attention, q, k.cpu(), v)
    expect(ValueError, "cu_seqlens on cpu: must be on cuda:0", attention, q, k, v, torch.tensor([0, 700]))
    x = torch.zeros(9, 2, 96, device="cuda", dtype=torch.bfloat16)
    expect(ValueError, "head_dim 96: must be 64 or 128 on the GPU", attention, x, x, x)
    bytes_ = torch.zeros(9 * 128 + 8, device="cuda", dtype=torch.bfloat16)
    x = bytes_[:-8].view(9, 2, 64)
    expect(ValueError, "aligned to 16 bytes", attention, bytes_[1:-7].view(9, 2, 64), x, x)
    expect(ValueError, "q of strides (64, 576, 1): a token's row must be contiguous; try q.contiguous()", attention,
           x.view(2, 9, 64).transpose(0, 1), x, x)  # fmt: skip
    expect(ValueError, "cu_seqlens[1] 600: must be 700, the number of keys", attention, q, k, v,
           torch.tensor([0, 600], device="cuda"), check=True)  # fmt: skip
    if torch.cuda.device_count() > 1:
        expect(ValueError, "k on cuda:1: must be on cuda:0, the device of q", attention, q, k.to("cuda:1"), v)
        on_1 = [x.detach().to("cuda:1") for x in (q, k, v)]  # the current GPU is 0
        close("second GPU", attention(*on_1).to("cuda:0"), attention(q, k, v), 0)
    else:
        skip("a second GPU's tensors: there is one GPU")


def test_processes():
    """A process that forks after using the GPU, one that sees no GPU, one whose GPU is too old: errors, no crash."""
    use = "q = torch.zeros(9, 2, 64, dtype=torch.bfloat16, device='cuda')\nprint(fsa.attention(q, q, q).sum().item())\n"
    fork = (
        "if os.fork() == 0:\n    try: fsa.attention(q, q, q)\n    except RuntimeError as e: os.write(1, b'caught')\n"
        "    os._exit(0)\nos.wait()\nprint(fsa.attention(q, q, q).sum().item())\n"
    )
    old = "torch.cuda.get_device_capability = lambda *_: (7, 5)\n"
    head = "import os, torch\nimport flash_sparse_attention as fsa\n"
    for name, code, extra, want in (
        ("fork", use + fork, {}, "caught"),
        ("no GPU", "x = torch.ones(9, 2, 64)\nprint(fsa.attention(x, x, x).sum().item())\n", {"CUDA_VISIBLE_DEVICES": ""},
         "1152.0"),
        ("old GPU", old + use, {}, "of compute capability 7.5: must be at least 8.0 (Ampere)"),
    ):  # fmt: skip
        env = {**os.environ, "PYTHONPATH": PACKAGE, **extra}
        r = subprocess.run([sys.executable, "-c", head + code], env=env, capture_output=True, text=True)
        last = ((r.stdout + r.stderr).strip().splitlines() or [""])[-1]
        check(
            want in r.stdout + r.stderr and r.returncode in (0, 1),
            f"{name}: exit code {r.returncode}: {last}",
        )


def test_ranks():
    """DDP and FSDP2 with NCCL."""
    if torch.cuda.device_count() > 1:
        check_ranks("cuda", 2)
    else:
        skip("DDP and FSDP2 with NCCL: there is one GPU")


# ---- times -----------------------------------------------------------------------------------------------------------


class Calls:
    """The calls of libfsa that the package makes for a sequence of N tokens, with all arguments and memory made before:
    what a C program does."""

    def __init__(self, leaves, dout, inv_freq, segments, cu):
        q, k, v, gate, wk, pe, wv = (x.detach() for x in leaves)
        (N, Hq, d), Hkv = q.shape, k.shape[1]
        self.lib, p = library.load(), torch.Tensor.data_ptr
        self.config = library.FsaConfig(q_heads=Hq, kv_heads=Hkv, head_dim=d, phi=library.PHI_LINEAR, **SIZES)
        self.batch = library.FsaDeviceBatch(num_queries=N, num_keys=N, num_seqs=len(cu) - 1, num_segments=len(segments),
                                            cu_seqlens=p(cu), segments=p(segments))  # fmt: skip
        common = (self.config, library.BF16, self.batch)
        num_bytes = max(
            self.lib.fsa_workspace_size(*common, op) for op in (library.FORWARD, library.BACKWARD)
        )
        new = lambda n: torch.empty(n, dtype=torch.uint8, device="cuda")  # noqa: E731
        workspace, saved, o = new(num_bytes), new(self.lib.fsa_saved_size(*common)), torch.empty_like(q)
        gradients = [torch.empty_like(x) for x in (q, k, v, gate)]
        weights = [torch.zeros_like(x, dtype=torch.float32) for x in (wk, pe, wv)]
        phi = library.FsaPhiWeights(*map(p, (wk, pe, wv)))
        shared = dict(k=p(k), v=p(v), gate_logits=p(gate), phi=phi, inv_freq=p(inv_freq), saved=p(saved),
                      workspace=p(workspace), workspace_bytes=num_bytes)  # fmt: skip
        dq, dk, dv, dgate = map(p, gradients)
        self.forward_arguments = library.FsaForward(q=p(q), o=p(o), **shared)
        self.backward_arguments = library.FsaBackward(
            dout=p(dout), dq=dq, dk=dk, dv=dv, dgate_logits=dgate,
            dphi=library.FsaPhiGradients(*map(p, weights)), **shared)  # fmt: skip
        self.memory = (leaves, dout, inv_freq, segments, cu, workspace, saved, o, gradients, weights)

    def forward(self):
        stream = torch.cuda.current_stream().cuda_stream
        status = self.lib.fsa_forward(self.config, library.BF16, self.batch, self.forward_arguments, stream)
        assert status == 0, self.lib.fsa_last_error()

    def backward(self):
        stream = torch.cuda.current_stream().cuda_stream
        status = self.lib.fsa_backward(self.config, library.BF16, self.batch, self.backward_arguments, stream)
        assert status == 0, self.lib.fsa_last_error()


class Nothing(torch.autograd.Function):
    """Has the inputs, outputs and gradients of native sparse attention, and computes nothing: PyTorch's own host time."""

    @staticmethod
    def forward(ctx, q, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.empty_like(q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        inputs = ctx.saved_tensors
        return torch.empty_like(dout), *map(torch.empty_like, inputs[:6]), None, None, None


def timed_functions(N, Hq, Hkv, d=128):
    """Returns for forward and backward: the call of the package, the call of libfsa, and a function that does nothing."""
    leaves, dout, _ = fixed_case(N, Hq, Hkv, d)
    leaves, dout = [x.detach().contiguous().requires_grad_() for x in leaves], dout.bfloat16()
    cu, inv_freq = torch.tensor([0, N], device="cuda"), fsa.rope_frequencies(d, device="cuda")
    segments = fsa.whole_sequences(cu)

    def forward():
        return fsa.native_sparse_attention(*leaves, cu, segments=segments, inv_freq=inv_freq)

    o = forward()
    calls = Calls(leaves, dout, inv_freq, segments, cu)
    nothing = lambda: Nothing.apply(*leaves, cu, segments, inv_freq)  # noqa: E731
    p = nothing()
    return {
        "fwd": (forward, calls.forward, nothing),
        "bwd": (lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True), calls.backward,
                lambda: torch.autograd.grad(p, leaves, dout, retain_graph=True)),
    }  # fmt: skip


def record(part, direction, N, Hq, Hkv, **fields):
    """Prints a measurement, and appends it to dev/results/GPU.jsonl as results_open of llmc/results.h does."""
    name = torch.cuda.get_device_name()
    known = [x for x in ("GB200", "B200", "H200", "H100", "A100") if x in name]
    path = os.environ.get("RESULTS", os.path.join(ROOT, f"dev/results/{(known or ['gpu'])[0].lower()}.jsonl"))
    describe = ["git", "-C", ROOT, "--git-dir=.git", "describe", "--always", "--dirty"]
    commit = (
        os.environ.get("COMMIT") or subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    )
    row = dict(commit=commit or "unknown", date=time.strftime("%Y-%m-%d", time.gmtime()), gpu=name, gpus=1,
               program="test_torch", part=part, attn="nsa", dir=direction, n=N, hq=Hq, hkv=Hkv, d=128, block=64, topk=16,
               dtype="bf16", **fields, torch=torch.__version__)  # fmt: skip
    line = json.dumps(row, separators=(",", ":"))
    print(line, flush=True)
    if path:
        with open(path, "a") as f:
            f.write(line + "\n")


def time_host():
    """Microseconds of host time that the package needs beyond libfsa's, and beyond those of a function that makes the same
    outputs and computes nothing."""
    in_libfsa = []

    def timed(function):
        def call(*arguments):
            begin = time.perf_counter()
            status = function(*arguments)
            in_libfsa.append(1e6 * (time.perf_counter() - begin))
            return status

        return call

    cuda._PLANS.clear()
    functions = timed_functions(256, 32, 8)
    (plan,) = cuda._PLANS.values()
    plan.function, plan.backward.function = timed(plan.function), timed(plan.backward.function)
    for direction, (package, _, nothing) in functions.items():
        in_libfsa.clear()
        us = []
        for function in (package, nothing):
            times = []
            for _ in range(40):
                torch.cuda.synchronize()
                for _ in range(5):  # few, since a full queue of launches would make the host wait
                    begin = time.perf_counter()
                    function()
                    times.append(1e6 * (time.perf_counter() - begin))
            us.append(statistics.median(times))
        us, c_us, nothing_us = us[0], statistics.median(in_libfsa), us[1]
        bar, more = dict(fwd=40, bwd=80)[direction], us - c_us - nothing_us
        check(more <= bar, f"host time, {direction}: {us:.1f} us; without libfsa's {c_us:.1f} and PyTorch's {nothing_us:.1f} "
              f"{more:.1f} us; bar {bar} us")  # fmt: skip
        times = dict(us=round(us, 1), c_us=round(c_us, 1), nothing_us=round(nothing_us, 1))
        record("host", direction, 256, 32, 8, **times)


def time_gpu():
    """GPU time of the package and of the calls of libfsa, one after the other. The L2 is flushed before each."""
    flush = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")  # 0.6 ms: the host is ahead of the GPU
    for N in (16384, 65536):
        for direction, functions in timed_functions(N, 32, 8).items():
            times = [[], []]
            for i in range(22):
                function = functions[i % 2]
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                flush.fill_(i)
                events[0].record()
                function()
                events[1].record()
                torch.cuda.synchronize()
                if i >= 2:
                    times[i % 2].append(events[0].elapsed_time(events[1]))
            ms, c_ms = (statistics.median(x) for x in times)
            check(
                ms <= 1.02 * c_ms,
                f"GPU time, {N} tokens, {direction}: {ms:.3f} ms; the C calls take {c_ms:.3f} ms",
            )
            record("core", direction, N, 32, 8, ms=round(ms, 4), c_ms=round(c_ms, 4))


TESTS = [test_shapes, test_empty, test_reproducible, test_streams, test_graph, test_operators, test_module, test_bad_input,
         test_processes, test_million_tokens, test_ranks]  # fmt: skip
TIMES = [time_host, time_gpu]
