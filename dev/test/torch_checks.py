"""What the tests of the PyTorch package share: counted checks, comparisons, and a runner that goes on after an error."""

import math
import os
import re
import socket
import subprocess
import sys
import time
import traceback

import torch
from checks import check, finish, set_libfsa, skip  # noqa: F401 (for the tests)
from torch.library import opcheck

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
PACKAGE = os.path.join(ROOT, "fsa/torch")
sys.path.insert(0, PACKAGE)
import flash_sparse_attention as fsa  # noqa: E402
from flash_sparse_attention import ops  # noqa: E402


def run(*tests):
    """Runs the tests. Prints the name and the time of each; an error counts as a failure, and the next test runs."""
    for test in tests:
        begin, name = time.time(), getattr(test, "__name__", None) or f"{test.func.__name__}{test.args}"
        try:
            test()
        except Exception as error:  # an error of one test says nothing about the next one
            lines = str(error).splitlines() or [""]
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            check(False, f"{name}: {type(error).__name__} at {place}: {lines[0]}")
        print(f"{name}: {time.time() - begin:.1f} s", flush=True)


def expect(error, contents, function, *args, **kwargs):
    """Checks that a call raises `error` with `contents` in its one line of text."""
    try:
        function(*args, **kwargs)
    except Exception as e:
        right = type(e) is error and contents in str(e) and "\n" not in str(e)
        check(right, f"{type(e).__name__}: {e}; expected {error.__name__} with {contents!r}")
    else:
        check(False, f"no error; expected {error.__name__} with {contents!r}")


def relative_error(got, want, floor=1e-300):
    """Returns the error (Frobenius) of a tensor relative to `want` or, if that is greater, to a tensor whose elements are
    `floor`. It is infinite for another shape, a NaN, or an infinity in only one of both."""
    got, want = got.detach().double(), want.detach().double()
    finite = torch.isfinite(want)
    if got.shape != want.shape or not torch.equal(finite, torch.isfinite(got)):
        return math.inf
    return float((got - want)[finite].norm() / max(want[finite].norm(), floor * max(want.numel(), 1) ** 0.5))


def close(name, got, want, tolerance=1e-12):
    """Checks the relative error of a tensor."""
    error = relative_error(got, want)
    check(error <= tolerance, f"{name}: error {error:.1e}, shapes {tuple(got.shape)}, {tuple(want.shape)}")


def results(function, leaves, dout):
    """Returns the outputs of a function and the gradients of its leaves, where the first output has the gradient dout.
    A leaf may be None."""
    for x in leaves:
        if x is not None:
            x.grad = None
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    out[0].backward(dout.to(out[0].device, out[0].dtype))
    return [x.detach() for x in out], [None if x is None else x.grad for x in leaves]


def same(name, got, want):
    """Checks that the outputs and gradients of two calls of `results` have the same bits."""
    for kind in range(2):
        for i, (a, b) in enumerate(zip(got[kind], want[kind])):
            check(a is b or torch.equal(a, b), f"{name}: {('output', 'gradient')[kind]} {i} differs")


def check_operators(q, k, v, gate_logits, phi, cu_seqlens, sizes):
    """opcheck of all operators. phi: wk, pe, wv. sizes: of native_sparse_attention, block 16 times cmp_stride or less."""
    d, num_keys = q.shape[2], k.shape[0]
    op, batch = torch.ops.flash_sparse_attention, (cu_seqlens, fsa.whole_sequences(cu_seqlens))
    inv_freq = fsa.rope_frequencies(d, device=q.device)
    names = ("cmp_len", "cmp_stride", "block", "topk", "init_blocks", "local_blocks", "window")
    cmp_len, cmp_stride, block, topk, *always, _ = sizes = [sizes[name] for name in names]
    calls = []
    for weights in (phi, [None] * 3):
        inputs = (q, k, v, gate_logits, *weights, *batch, inv_freq, None, sizes, 0.0, False)
        o, saved = op.nsa_forward(*inputs)
        indices = ops.saved_block_indices(saved, k.shape[1], q.shape[0], topk).clone()
        calls += [
            (op.nsa_forward, inputs),
            (op.nsa_backward, (o, k, v, gate_logits, *weights, *batch, inv_freq, saved, sizes, 0.0, False)),
        ]
    selected = (indices, *batch, [block, *always], 0.0)
    o, lse = op.selected_forward(q, k, v, *selected)
    windows = num_keys // cmp_stride
    calls += [
        (op.selected_forward, (q, k, v, *selected)),
        (op.selected_backward, (o, q, k, v, o, lse, *selected)),
        (op.select_blocks, (q, k[:windows], lse, *batch, num_keys, sizes[:6], 0.0)),
        (op.attention_forward,
         (q, k[:windows], v[:windows], *batch, None, "compressed", num_keys, [cmp_len, cmp_stride, 1], 0.0)),
        (op.attention_backward, (o, q, k, v, o, lse, *batch, inv_freq, "window", num_keys, [16, 16, 5], 0.0)),
    ]  # fmt: skip
    # Then also bytes that no kernel writes are the same in all calls.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for f, arguments in calls:
        for name, result in opcheck(f.default, arguments, raise_exception=False).items():
            check(result == "SUCCESS", f"opcheck on {q.device}: {f}, {name}: {str(result).splitlines()[0]}")
    torch.use_deterministic_algorithms(False)


def check_ranks(device, ranks):
    """DDP and FSDP2 with a process for each rank: their gradients are those of one process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = os.path.join(ROOT, "dev/test/torch_ranks.py")
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    processes = [subprocess.Popen([sys.executable, program, *map(str, (r, ranks, port, device))], **pipes)
                 for r in range(ranks)]  # fmt: skip
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=150)[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0] + "\nno end after 150 s")
    errors = dict(re.findall(r"^(DDP|FSDP2\S*) (\S+)$", outputs[0], re.M))
    wanted = {"DDP": 1e-5, "FSDP2": 1e-5, "FSDP2-bf16": 3e-2}
    if device == "cpu":
        del wanted["FSDP2-bf16"]
        if torch.__version__.startswith("2.5"):
            del wanted["FSDP2"]
            skip("FSDP2 on the CPU: PyTorch 2.5 has it for GPUs only")
    for name, tolerance in wanted.items():
        error = float(errors.get(name, "nan"))
        check(error <= tolerance, f"{name}, {ranks} ranks, {device}: error {error:.1e}")
    for rank, process in enumerate(processes):
        last = (outputs[rank].strip().splitlines() or [""])[-1]
        check(
            process.returncode == 0,
            f"rank {rank} of {ranks}, {device}: exit code {process.returncode}: {last}",
        )
