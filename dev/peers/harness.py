"""Checks and times one system. run.py starts this program once for each system, with the jobs on its input.

    harness.py SYSTEM DEVICE < jobs.json

A job is a dict: part, n, hq, hkv. A line that begins with @@ reports to run.py: @@begin, @@start, @@row, @@skip, @@fail,
@@done or @@unavailable, and JSON. All other lines are the system's own output.
"""

import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
import traceback
import types

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.join(ROOT, "fsa/torch")]
os.environ.setdefault("LIBFSA", os.path.join(ROOT, "libfsa.so"))

import torch  # noqa: E402
from flash_sparse_attention import reference  # noqa: E402
from sizes import BLOCKS, CMP, HEAD_DIM, WINDOW  # noqa: E402

# Largest relative errors against float32 of a result that is right. bf16 kernels have 0.002 to 0.006.
OUT_TOLERANCE, GRAD_TOLERANCE = 0.01, 0.02
LEAST_AGREEMENT = 0.9  # of the selected blocks with those of float32: scores rounded to bf16 keep more
SEED = 1
GPU_WAIT = 4_000_000  # cycles before each call, 2 ms: more than Python needs to launch all kernels of a call
INPUTS = {"core": "q k v gate wk wv", "core_mean": "q k v gate", "core_mean64": "q k v gate"}


def report(kind, **fields):
    print(f"@@{kind} {json.dumps(fields)}", flush=True)


# ---- tensors ---------------------------------------------------------------------------------------------
class Tensors(types.SimpleNamespace):
    """The inputs of all parts: q, dout [n, Hq, d]; k, v [n, Hkv, d]; gate [n, Hq, 3], logits; wk, wv [Hkv, cmp_len*d, d];
    block_indices int32 [Hkv, n, topk], ascending, then -1; cu_seqlens int64 and cu_seqlens32 [2] of one sequence."""


def make_tensors(n, hq, hkv, device):
    """Returns the same random bf16 tensors for each system."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device=device)).bfloat16()

    x = Tensors(q=normal(n, hq, HEAD_DIM), k=normal(n, hkv, HEAD_DIM), v=normal(n, hkv, HEAD_DIM))
    x.dout, x.gate = normal(n, hq, HEAD_DIM), normal(n, hq, 3)
    x.wk, x.wv = (normal(hkv, CMP["cmp_len"] * HEAD_DIM, HEAD_DIM, scale=1 / 64) for _ in range(2))
    x.block_indices = random_blocks(n, hkv, generator)
    x.cu_seqlens = torch.tensor([0, n], device=device)
    x.cu_seqlens32 = x.cu_seqlens.int()
    for name in INPUTS["core"].split():
        getattr(x, name).requires_grad_()
    return x


def random_blocks(n, hkv, generator):
    """Returns block indices: the initial and local blocks, and distinct random ones."""
    device, count = generator.device, -(-n // BLOCKS["block"])
    block = torch.arange(count, device=device)
    result = torch.full((hkv, n, BLOCKS["topk"]), -1, dtype=torch.int32, device=device)
    for h in range(hkv):
        for queries in torch.arange(n, device=device).split(16384):
            own = (queries // BLOCKS["block"])[:, None]
            order = torch.rand(len(queries), count, generator=generator, device=device)
            order[(block < BLOCKS["init_blocks"]) | (block > own - BLOCKS["local_blocks"])] = 2
            order[block > own] = -1
            best = order.topk(min(BLOCKS["topk"], count)).indices
            best = torch.where(best <= own, best, count).sort().values
            result[h, queries, : best.shape[1]] = torch.where(best < count, best, -1).int()
    return result


# ---- the check -------------------------------------------------------------------------------------------
def sample_rows(n, device):
    """Returns some 100 queries: the first and last ones, those beside the edges of blocks, and random ones."""
    edges = [0, 1, 31, 32, 62, 63, 64, 127, 128, 1023, 1024, n // 2 - 1, n // 2, n - 65, n - 2, n - 1]
    some = torch.randint(n, (84,), generator=torch.Generator().manual_seed(SEED)).tolist()
    return torch.tensor(sorted({row for row in edges + some if 0 <= row < n}), device=device)


def reference_part(part, x, rows, block_indices):
    """Computes rows of a part in plain PyTorch. Returns o [rows, Hq, d]; for whole NSA also the block indices."""
    n = x.k.shape[0]
    segments = torch.stack([torch.zeros_like(rows), rows, torch.ones_like(rows)], 1)
    if part in ("full", "win"):
        rule = "causal" if part == "full" else "window"
        return reference.attention(x.q[rows], x.k, x.v, x.cu_seqlens, segments, None, rule, n, 16, 16, WINDOW,
                                   HEAD_DIM**-0.5)[0], None  # fmt: skip
    if part == "sel":
        return reference.selected_attention(x.q[rows], x.k, x.v, block_indices[:, rows], x.cu_seqlens, segments,
                                            BLOCKS["block"], HEAD_DIM**-0.5)[0], None  # fmt: skip
    wk, wv = (x.wk, x.wv) if part == "core" else (None, None)
    cmp = dict(cmp_len=64, cmp_stride=64) if part == "core_mean64" else CMP
    if block_indices is not None:
        block_indices = block_indices[:, rows]
    return reference.native_sparse_attention(
        x.q[rows], x.k, x.v, x.gate[rows], wk, None, wv, x.cu_seqlens, segments, None, block_indices, window=WINDOW,
        scale=HEAD_DIM**-0.5, **cmp, **BLOCKS,
    )  # fmt: skip


def reference_rows(part, x, rows, block_indices, dout):
    """Returns o [rows, Hq, d] in float32, the gradients of the inputs if dout is not None, and for whole NSA the share of
    the blocks that float32 selects by their scores that are among the given ones, None if all blocks are selected. Takes
    as many rows at a time as need 256 MiB of scores."""
    names = INPUTS.get(part, "q k v").split()
    leaves = Tensors(cu_seqlens=x.cu_seqlens, **{name: getattr(x, name).detach().float() for name in names})
    if dout is not None:
        for name in names:
            getattr(leaves, name).requires_grad_()
    outputs, same, total = [], 0, 0
    for some in rows.split(max(1, 2**26 // (x.q.shape[1] * x.q.shape[0]))):
        o, _ = reference_part(part, leaves, some, block_indices)
        if dout is not None:
            o.backward(dout[some].float())
        outputs.append(o.detach())
        if part in INPUTS:
            with torch.no_grad():
                mine, theirs = reference_part(part, leaves, some, None)[1], block_indices[:, some]
            own = some[:, None] // BLOCKS["block"]
            by_score = (mine >= BLOCKS["init_blocks"]) & (mine <= own - BLOCKS["local_blocks"]) & (own >= BLOCKS["topk"])
            same += ((theirs[..., None, :] == mine[..., None]).any(-1) & by_score).sum().item()
            total += by_score.sum().item()
    gradients = {name: getattr(leaves, name).grad for name in names}
    return torch.cat(outputs), gradients, same / total if total else None


def relative_error(x, ref):
    """Returns |x - ref| / |ref| in the Frobenius norm; infinity if x is not finite."""
    if not torch.isfinite(x).all():
        return float("inf")
    difference = (x.float() - ref).norm(dtype=torch.float64).item()
    return difference / max(ref.norm(dtype=torch.float64).item(), 1e-30)


def check(system, part, x, backward):
    """Compares sampled rows of the output, and the gradients of a loss of these rows alone, with float32. Returns fields
    of the rows: for forward and for backward."""
    rows = sample_rows(x.q.shape[0], x.q.device)
    block_indices = system.BLOCKS[part](x) if part in system.BLOCKS else x.block_indices
    dout = torch.zeros_like(x.dout).index_copy(0, rows, x.dout[rows]) if backward else None
    names = INPUTS.get(part, "q k v").split()
    o = system.PARTS[part](x)
    gradients = torch.autograd.grad(o, [getattr(x, name) for name in names], dout) if backward else ()
    o, gradients = o.detach()[rows], dict(zip(names, gradients))
    ref, ref_gradients, agreement = reference_rows(part, x, rows, block_indices, dout)
    forward = {"error": relative_error(o, ref)}
    forward["wrong"] = not forward["error"] <= OUT_TOLERANCE
    if agreement is not None:
        forward["blocks"] = agreement
        forward["other_blocks"] = agreement < LEAST_AGREEMENT
    errors = {name: relative_error(gradient, ref_gradients[name]) for name, gradient in gradients.items()}
    if not errors:
        return forward, None
    name = max(errors, key=errors.get)
    return forward, {"error": errors[name], "worst": "d" + name, "wrong": not errors[name] <= GRAD_TOLERANCE}


# ---- timing ----------------------------------------------------------------------------------------------
class Timer:
    """Times a function as dev/cuda does: CUDA events around each call, the median of 10 after 2 for warm-up. Below 32K
    tokens each call starts with a cold L2. The GPU waits before each call, so that it runs without gaps that Python's
    launches would leave."""

    def __init__(self, device):
        self.device = device
        self.flush_buffer = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def once(self, function, flush):
        if self.device == "cpu":
            begin = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - begin)
        if flush:
            self.flush_buffer.zero_()
        torch.cuda._sleep(GPU_WAIT)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def ms(self, function, flush):
        return statistics.median([self.once(function, flush) for _ in range(12 if self.device == "cuda" else 3)][2:])


def run_part(system, part, job, x, timer):
    backward = part not in getattr(system, "FORWARD_ONLY", ())
    errors = dict(zip(("fwd", "bwd"), check(system, part, x, backward)))
    flush = job["n"] < 32768
    times = {"fwd": timer.ms(lambda: system.PARTS[part](x), flush)}
    if backward:
        inputs = [getattr(x, name) for name in INPUTS.get(part, "q k v").split()]
        o = system.PARTS[part](x)
        times["bwd"] = timer.ms(lambda: torch.autograd.grad(o, inputs, x.dout, retain_graph=True), flush)
    for direction, ms in times.items():
        report("row", **job, d=HEAD_DIM, dtype="bf16", block=BLOCKS["block"], topk=BLOCKS["topk"], dir=direction,
               ms=round(ms, 4), **errors[direction])  # fmt: skip


# ---- the program -----------------------------------------------------------------------------------------
def load(name):
    """Returns the module of a system: one of systems/, or a Python file of the same interface."""
    if not name.endswith(".py"):
        return importlib.import_module("systems." + name)
    spec = importlib.util.spec_from_file_location("system", name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(error):
    """Returns the type of an error and the first and last line of its message."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, " ... ".join(dict.fromkeys(text[:1] + text[-1:]))])


def main(name, device):
    try:
        system = load(name)
        version = system.version()
    except (ImportError, OSError, RuntimeError) as error:
        report("unavailable", reason=summary(error))
        return
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report("begin", version=version, gpu=gpu, torch=torch.__version__)
    timer, x, shape = Timer(device), None, None
    for job in json.load(sys.stdin):
        part, now = job["part"], (job["n"], job["hq"], job["hkv"])
        if part != "step" and part not in system.PARTS or part == "step" and not getattr(system, "STEP", None):
            continue
        report("start", **job)
        reason = system.refuses(part, *now) if hasattr(system, "refuses") else None
        if reason:
            report("skip", reason=reason, **job)
            continue
        try:
            if part == "step":
                x = shape = None
                from steps import run_step

                report("row", **job, **run_step(system, job))
                continue
            if shape != now:
                x, shape = None, None
                x, shape = make_tensors(*now, device), now
            run_part(system, part, job, x, timer)
        except Exception as error:  # of the system: reported, and the next job goes on
            details = [line for line in traceback.format_exc().splitlines() if line.strip()][-16:]
            report("fail", reason=summary(error), details=details, **job)
            if device == "cuda":
                torch.cuda.synchronize()  # ends this process if the GPU's context is lost
                torch.cuda.empty_cache()
    report("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
