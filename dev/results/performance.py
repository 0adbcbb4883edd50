"""Writes the tables of README.md, dev/results/*.md and fsa/docs/*.md, and the chart attention.svg.

    python3 dev/results/performance.py            # rewrites what lies between the markers, and the chart
    python3 dev/results/performance.py --check    # changes nothing; exits 1 and names what does not agree

The numbers come from the .jsonl files of this folder. A table lies between <!-- table NAME GPU --> and <!-- end -->;
NAME is a function of TABLES below. Each table names its GPU model, commit and date. A number is the median of the
rows with the same shape. After new measurements, change MEASURED and run the program. The tables of learning.md come from
curves_GPU.jsonl (learning.py). A table that has no rows yet keeps its text.
dev/peers/run.py prints the tables of its own run.
"""

import argparse
import glob
import json
import os
import re
import statistics
import sys

import chart
import learning

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path.insert(0, os.path.join(ROOT, "data"))
from shards import Parser, die  # noqa: E402

# The rows that the tables show: file and commit, for each GPU model and kind of measurement. H200 is also in the chart.
#   attention  build/core: the whole attention and its parts
#   kernels    the programs of single kernels (make bench)
#   step       scripts/llama3_8b_step.sh: a training step on one GPU
#   scaling    scripts/gpus_scaling.sh: one GPU and several, each GPU with the same micro-batches. Without this
#              entry the tables of it keep the text that they have.
#   llama3_8b  scripts/llama3_8b.sh: all layers of Llama 3 8B on all GPUs of a host. The same.
MEASURED = {
    "H200": {
        "attention": ("h200_68a9f7d_f7f9856.jsonl", "f7f9856"),
        "kernels": ("h200.jsonl", "7cecab2"),
        "step": ("h200.jsonl", "0603293"),
        "scaling": ("h200.jsonl", "010f8d1"),
        "llama3_8b": ("h200.jsonl", "51a42fb"),
    },
    "H100": {
        "attention": ("h100.jsonl", "b7e2b0a"),
        "kernels": ("h100.jsonl", "b7e2b0a"),
        "step": ("h100.jsonl", "b7e2b0a"),
    },
}
PREDICTIONS = {"H200": "predictions_h200.jsonl"}  # tokens/s of llama3_8b, written before the runs
# torchtitan's published tokens/s a GPU of Llama 3 8B on 8 H100s, full attention with fp8 matmuls and full recomputation:
# benchmarks/llama3_h100_202412 in its repository.
TORCHTITAN = {32768: 3890, 65536: 2540, 131072: 1071}
PEERS = {"H200": "peers_h200.jsonl"}  # make peers: other systems on the same GPU model, and ours called from PyTorch
# The systems and parts of PEERS that the headline compares. A table shows the newest run that measured all of them, a table of
# training steps the newest run with a step of each of these systems. If no run is complete, the newest one is shown.
HEADLINE = {("ours", "core"), ("ours", "core_mean"), ("flash_nsa", "core_mean"), ("fa4", "full")}
HEADLINE_SHAPE = (65536, (32, 8))
PAGES = ["README.md", "dev/results/performance.md", "dev/results/learning.md"]
CHART = "dev/results/attention.svg"

LENGTHS = [8192, 16384, 32768, 65536, 131072]
HEADS = [(32, 8), (32, 32), (40, 8), (64, 4)]  # query heads, KV heads
SHAPES = [(n, (32, 8)) for n in LENGTHS] + [(65536, heads) for heads in HEADS[1:]]
# The tables of fsa/docs. A shape: tokens, query heads, KV heads, d, B, T.
DENSE = [
    (8192, 32, 8, 128, 64, 16),
    (32768, 32, 8, 128, 64, 16),
    (65536, 32, 8, 128, 64, 16),
    (65536, 32, 32, 128, 64, 16),
    (65536, 64, 4, 128, 64, 16),
    (65536, 32, 8, 64, 64, 16),
]
COMPRESS = DENSE[:5]
SELECTED = [DENSE[0], *DENSE[2:5], (65536, 32, 8, 128, 128, 8), (65536, 32, 32, 128, 128, 8)]
MASKS = [("full", "causal"), ("cmp", "compressed"), ("win", "window 512")]
# For each page: kind of measurement, shapes, columns. A column: program, part, direction, version, heading.
KERNEL_PAGES = {
    "dense_fwd": ("kernels", DENSE, [("dense_forward", part, "fwd", "library", name) for part, name in MASKS]),
    "dense_bwd": ("kernels", DENSE, [("dense_backward", part, "bwd", "library", name) for part, name in MASKS]),
    "selected_fwd": ("attention", SELECTED, [("core", "sel", "fwd", "library", "selected branch")]),
    "selected_bwd": ("attention", SELECTED, [("core", "sel", "bwd", "library", "selected branch")]),
    "topk": ("attention", COMPRESS, [("core", "topk", "fwd", "library", "block selection")]),
    "sm80": ("kernels", COMPRESS, [("topk", "topk", "fwd", "portable", "block selection, portable")]),
    "query_lists": ("kernels", DENSE[:4], [("lists", "lists", "fwd", "library", "query lists")]),
    "compress": (
        "kernels",
        COMPRESS,
        [
            (program, "compress", direction, "library", f"{kind}, {name}")
            for program, kind in (("compress", "linear"), ("compress mean", "mean"))
            for direction, name in (("fwd", "forward"), ("bwd", "backward"))
        ],
    ),
    "gate": ("kernels", [DENSE[0], DENSE[2]], [("gate", "gate", "bwd", "library", "gate backward")]),
}


def read_rows(file, gpu):
    """Returns the rows of a file in this folder, all of which must be of this GPU model."""
    path = os.path.join(ROOT, "dev/results", file)
    rows = []
    try:
        with open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    die(f"dev/results/{file}: line {number} is not JSON; remove it")
    except OSError as e:
        die(f"dev/results/{file}: {e.strerror}; see MEASURED and PEERS in dev/results/performance.py")
    for number, row in enumerate(rows, 1):
        if gpu not in row["gpu"]:
            die(f"dev/results/{file}: line {number} is of an {row['gpu']}, not of an {gpu}; move it to another file")
    return rows


def shape_of(row):
    return row["n"], (row["hq"], row["hkv"])


def newest_run(rows, needed):
    """Returns the rows of the newest run of make peers that measured all (system, part) of needed at the headline's shape,
    or those of the newest run if none did."""
    runs = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    measured = {run: {(row["peer"], row["part"]) for row in runs[run] if shape_of(row) == HEADLINE_SHAPE} for run in runs}
    complete = [run for run in runs if needed <= measured[run]]
    return runs[max(complete or runs)] if runs else []


class Times:
    """The measurements on one GPU model. rows: {kind: [row]} of `measured`, an entry of MEASURED or {}. peers, peer_steps: the
    rows of make peers that the tables show, of the attention and of training steps, each of one run. ms: {(system, part,
    tokens, heads, direction): [milliseconds]}, marks: {the same key: "wrong" or "other blocks"} (dev/peers/README.md).
    shapes: (tokens, heads) of the attention. steps: {(system, tokens): [row]}. A system of dev/peers is named "PyTorch NAME".
    curves: {name: row} of training runs."""

    def __init__(self, gpu, measured, peers):
        self.gpu, self.rows, self.ms, self.marks, self.steps = gpu, {}, {}, {}, {}
        self.curves = learning.read_rows(gpu)
        for kind, (file, commit) in measured.items():
            self.rows[kind] = [row for row in read_rows(file, gpu) if row["commit"] == commit]
            if not self.rows[kind]:
                die(f"dev/results/{file} has no row of commit {commit}; see MEASURED in performance.py")
        self.peers = newest_run([row for row in peers if row["part"] != "step"], HEADLINE)
        self.peer_steps = newest_run([row for row in peers if row["part"] == "step"], {(peer, "step") for peer, _ in HEADLINE})
        self.shapes = sorted({shape_of(row) for row in self.peers}, key=lambda shape: shape[::-1]) or SHAPES
        self.predictions = read_rows(PREDICTIONS[gpu], gpu) if gpu in PREDICTIONS else []
        for row in self.rows.get("attention", []):
            self.add_attention(row)
        for row in self.rows.get("step", []):
            if is_step(row) and row.get("gpus", 1) == 1 and row["layers"] == 4:
                system = row["attn"] + (" fp8" if row.get("matmul") == "fp8" else "")
                self.steps.setdefault((system, row["n"]), []).append(row)
        for row in self.peers + self.peer_steps:
            self.add_peer(row)

    def add(self, system, part, row, direction, ms):
        self.ms.setdefault((system, part, *shape_of(row), direction), []).append(ms)

    def add_attention(self, row):
        default = (row.get("d"), row.get("block"), row.get("topk"), row.get("dtype")) == (128, 64, 16, "bf16")
        if row["program"] == "core" and default:
            part = "recompute" if row["version"] == "recompute" else row["part"]
            self.add("ours", part, row, row["dir"], row["ms"])

    def add_peer(self, row):
        system = "PyTorch " + row["peer"]
        if row["part"] == "step":
            self.steps.setdefault((system, row["n"]), []).append(row)
            return
        self.add(system, row["part"], row, row["dir"], row["ms"])
        mark = "wrong" if row.get("wrong") else "other blocks" if row.get("other_blocks") else None
        if mark:
            self.marks[(system, row["part"], *shape_of(row), row["dir"])] = mark

    def key(self, system, *result):
        """Returns the key of a result in ms and marks. "ours beside" is ours in the run of the other systems, or that of
        build/core if there is no such run."""
        if system == "ours beside":
            system = "PyTorch ours" if self.peers else "ours"
        return system, *result

    def time(self, *result):
        """Returns the median in milliseconds, or None if it was not measured."""
        values = self.ms.get(self.key(*result))
        return statistics.median(values) if values else None

    def total(self, system, part, n, heads):
        """Returns milliseconds of forward plus backward, or None."""
        pair = [self.time(system, part, n, heads, direction) for direction in ("fwd", "bwd")]
        return None if None in pair else sum(pair)

    def step(self, system, n, field):
        """Returns the median of a field of the training steps, or None."""
        values = [row[field] for row in self.steps.get((system, n), [])]
        return statistics.median(values) if values else None

    def kernel(self, kind, column, shape):
        """Returns the median of a program's rows with this shape, or None."""
        values = [
            row["ms"]
            for row in self.rows[kind]
            if (row["program"], row["part"], row["dir"], row.get("version")) == column
            and (row["n"], row["hq"], row["hkv"], row["d"], row["block"], row["topk"]) == shape
            and row["dtype"] == "bf16"
            and row.get("indices", "random") == "random"
        ]
        return statistics.median(values) if values else None

    def caption(self, kind, gpus="One {}"):
        """The GPU, commit and date of a table."""
        dates = sorted({row["date"] for row in self.rows[kind]})
        return f"{gpus.format(self.gpu)}, commit {MEASURED[self.gpu][kind][1]}, {' and '.join(dates)}"

    def newer_runs(self, peers):
        """Returns (run, kind) of the runs in these rows of make peers that are newer than the one shown."""
        shown = {"attention": self.peers, "training steps": self.peer_steps}
        runs = {(row["run"], "training steps" if row["part"] == "step" else "attention") for row in peers}
        return sorted((run, kind) for run, kind in runs if run > shown[kind][0]["run"])

    def caption_of_run(self, rows):
        return f"{self.gpu}, commit {rows[0]['commit']}, {rows[0]['date']}, all systems in one run of `make peers`."

    def caption_with_peers(self):
        return self.caption_of_run(self.peers) if self.peers else self.caption("attention") + "."

    def caption_of_steps(self):
        if "step" not in self.rows:
            return self.caption_of_run(self.peer_steps)
        caption, run = self.caption("step"), [f"commit {row['commit']}, {row['date']}" for row in self.peer_steps[:1]]
        return f"{caption}." + "".join(f" PyTorch: another {self.gpu}, {text}." for text in run if not caption.endswith(text))


def is_step(row):
    """Returns whether a row is a training step with one attention mode."""
    return row["program"] == "train_gpt_nsa" and row["dir"] == "step" and "full_every" not in row


def is_16_bit_step(row):
    return is_step(row) and "matmul" not in row


# ---- Markdown --------------------------------------------------------------------------------------------
def number(ms):
    """Milliseconds with three digits."""
    if ms is None:
        return "-"
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def marked(times, text, system, part, n, heads, directions):
    """Returns the text, and the marks of these results: wrong, or of other blocks."""
    marks = [times.marks.get(times.key(system, part, n, heads, direction)) for direction in directions]
    return text + "".join(f" ({mark})" for mark in ("wrong", "other blocks") if mark in marks)


def pair(times, system, part, n, heads):
    """Forward / backward; a part without a backward pass has one number."""
    cells = []
    for direction in ("fwd", "bwd"):
        ms = times.time(system, part, n, heads, direction)
        if ms is not None:
            cells.append(marked(times, number(ms), system, part, n, heads, [direction]))
    return " / ".join(cells) or "-"


def total(times, system, part, n, heads):
    """Forward plus backward."""
    ms = times.total(system, part, n, heads)
    return "-" if ms is None else marked(times, number(ms), system, part, n, heads, ("fwd", "bwd"))


def step_time(times, system, n):
    """A training step, with the marks of the system's attention at this length."""
    rows = times.steps.get((system, n))
    if not rows:
        return "-"
    part = rows[0].get("attention")  # of PyTorch's steps
    return marked(times, number(times.step(system, n, "ms")), system, part, n, (32, 8), ("fwd", "bwd"))


def tokens(n):
    return f"{n:,}" if n % 1024 else f"{n // 1024}K" if n % 2**20 else f"{n // 2**20}M"


LABELS = ("tokens", "heads", "heads, d, (B, T)", "attention", "model", "micro-batches x sequences", "GPUs", "flags")
LABELS += ("run", "matmuls", "position", "layer")


def markdown(head, rows):
    """Returns a table without the columns and rows that hold nothing but "-", "" if no row remains. The columns of LABELS
    name a row."""
    labels = sum(1 for title in head if title in LABELS)
    keep = [i for i in range(len(head)) if i < labels or any(row[i] != "-" for row in rows)]
    rows = [row for row in rows if any(cell != "-" for cell in row[labels:])]
    lines = [head, ["---"] * len(head)] + rows if rows else []
    return "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in lines)


# The systems in the tables: system, part, heading.
NSA = [
    ("ours beside", "core", "NSA, ours"),
    ("ours beside", "core_mean", "NSA, ours, mean"),
    ("PyTorch flash_nsa", "core_mean", "NSA, flash_nsa, mean"),
    ("PyTorch fsa", "core", "NSA, FSA"),
    ("PyTorch nsa", "core", "NSA, Triton"),
]
FULL = [
    ("ours beside", "full", "full, ours"),
    ("PyTorch fa4", "full", "full, FlashAttention-4"),
    ("PyTorch cudnn", "full", "full, cuDNN"),
]
SELECTED_BRANCH = [
    ("ours beside", "sel", "ours"),
    ("PyTorch flash_nsa", "sel", "flash_nsa"),
    ("PyTorch fsa", "sel", "FSA"),
    ("PyTorch nsa", "sel", "NSA, Triton"),
    ("PyTorch fla", "sel", "fla-core"),
    ("PyTorch cudnn_nsa", "sel", "cuDNN frontend"),
]
SLIDING_BRANCH = [
    ("ours beside", "win", "ours"),
    ("PyTorch fa4", "win", "FlashAttention-4"),
    ("PyTorch cudnn_nsa", "win", "cuDNN frontend"),
]


def captioned(caption, table):
    return caption + "\n\n" + table


def table_summary(times):
    """README: forward plus backward of NSA and full attention, (32, 8) heads."""
    head = ["tokens"] + [title + " (ms)" for _, _, title in NSA + FULL]
    lengths = [n for n, heads in times.shapes if heads == (32, 8)]
    table = markdown(head, [[tokens(n)] + [total(times, s, p, n, (32, 8)) for s, p, _ in NSA + FULL] for n in lengths])
    return table and captioned(times.caption_with_peers(), table)


def compare(times, columns):
    """Forward / backward of systems, all shapes."""
    head = ["tokens", "heads"] + [title + " (ms)" for _, _, title in columns]
    rows = [[tokens(n), str(heads)] + [pair(times, s, p, n, heads) for s, p, _ in columns] for n, heads in times.shapes]
    table = markdown(head, rows)
    return table and captioned(times.caption_with_peers(), table)


def table_attention(times):
    return compare(times, NSA + FULL)


def table_selected(times):
    return compare(times, SELECTED_BRANCH)


def table_sliding(times):
    return compare(times, SLIDING_BRANCH)


def table_parts(times):
    """Forward / backward of each part of ours."""
    parts = [
        ("cmp", "compressed branch"),
        ("topk", "block selection"),
        ("sel", "selected branch"),
        ("win", "sliding branch"),
        ("core", "whole NSA"),
        ("recompute", "whole NSA, `recompute`"),
    ]
    head = ["tokens", "heads"] + [title + " (ms)" for _, title in parts]
    rows = [
        [tokens(n), str(heads)] + [pair(times, "ours", p, n, heads) for p, _ in parts] for n, heads in SHAPES
    ]
    return captioned(times.caption("attention") + ".", markdown(head, rows))


def table_step(times):
    """A training step."""
    systems = [
        ("nsa", "NSA, ours"),
        ("nsa fp8", "NSA, ours, fp8"),
        ("PyTorch ours", "NSA, PyTorch with ours"),
        ("PyTorch flash_nsa", "NSA, PyTorch with flash_nsa"),
        ("PyTorch fsa", "NSA, PyTorch with FSA"),
        ("full", "full, ours"),
        ("full fp8", "full, ours, fp8"),
        ("PyTorch fa4", "full, PyTorch with FlashAttention-4"),
        ("PyTorch cudnn", "full, PyTorch with cuDNN"),
    ]
    lengths = sorted({n for _, n in times.steps})
    rows = [[tokens(n)] + [step_time(times, s, n) for s, _ in systems] for n in lengths]
    table = markdown(["tokens"] + [title + " (ms)" for _, title in systems], rows)
    return table and captioned(times.caption_of_steps(), table)


def run_tables(rows):
    """Returns the tables of one run of make peers, on any GPU and of any systems, in Markdown. Those without rows are left
    out."""
    times = Times(rows[0]["gpu"], {}, rows)
    tables = [
        ("Attention, forward plus backward, (32, 8) heads", table_summary(times)),
        ("Attention, forward / backward", table_attention(times)),
        ("Selected branch, forward / backward", table_selected(times)),
        ("Sliding branch, forward / backward", table_sliding(times)),
        ("Training step", table_step(times)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in tables if table)


# Parts of a step: key in `split`, heading. Rows from before 2026-11-28 name the matmuls products.
STEP_SPLIT = [
    ("matmul", "matmuls (ms)"),
    ("quantize", "to 8 bits (ms)"),
    ("attention_forward", "attention, forward (ms)"),
    ("attention_backward", "attention, backward (ms)"),
    ("classifier", "classifier (ms)"),
    ("norms", "norms, SwiGLU (ms)"),
    ("optimizer", "optimizer (ms)"),
]


def part_ms(rows, name):
    """Returns the median milliseconds of a part of these steps, or None if they have no such part."""
    names = ("matmul", "products") if name == "matmul" else (name,)
    values = [row["split"][n] for row in rows for n in names if row["split"].get(n)]
    return statistics.median(values) if values else None


def table_step_parts(times):
    """Where the time of our training steps goes, and what they need."""
    rows = []
    for mode in ("nsa", "nsa fp8", "full", "full fp8"):
        for n in LENGTHS:
            steps = times.steps.get((mode, n))
            if not steps:
                continue
            row = [number(part_ms(steps, name)) for name, _ in STEP_SPLIT]
            speed, mfu, memory = (times.step(mode, n, f) for f in ("tokens_per_second", "mfu", "memory_bytes"))
            row += [f"{speed:,.0f}", f"{100 * mfu:.1f}", f"{memory / 2**30:.1f}"]
            rows.append([tokens(n), mode] + row)
    head = ["tokens", "attention"] + [title for _, title in STEP_SPLIT] + ["tokens/s", "MFU (%)", "memory (GiB)"]
    return captioned(times.caption("step") + ".", markdown(head, rows))


def table_loss(times):
    """README: what learning.md shows, in three lines."""
    head, rows, runs = learning.overview(times.curves)
    return captioned(learning.caption(times.gpu, runs), markdown(head, rows)) if rows else None


def table_fp8_sentence(times):
    """The ratios of a step with fp8 to one with 16-bit matmuls, in one sentence."""

    def ratios(mode):
        pairs = [(n, times.step(mode + " fp8", n, "ms"), times.step(mode, n, "ms")) for n in LENGTHS]
        return [(n, f"{fp8 / ms:.2f}") for n, fp8, ms in pairs if fp8 and ms]

    nsa, full = ratios("nsa"), ratios("full")
    if not nsa or [n for n, _ in nsa] != [n for n, _ in full]:
        return None
    first, *others = (f"{ratio} {{}}at {tokens(n)}" for n, ratio in nsa)
    words = ", ".join([first.format("of its time "), *(other.format("") for other in others)])
    return f"With `-matmul fp8` this step takes {words}; with full attention {', '.join(ratio for _, ratio in full)}."


def scaling_runs(times):
    """Returns the runs of `scaling`, sorted: (shape, GPUs, ZeRO stage, cp) and, from medians, step, tokens/s, MFU, memory
    of a GPU and the ratio to one GPU. A shape: attention, tokens, layers, channels, vocabulary, sequences,
    micro-batches, -r."""
    runs = {}
    for row in filter(is_16_bit_step, times.rows["scaling"]):
        names = ("attn", "n", "layers", "channels", "vocab")
        shape = (*(row[name] for name in names), row.get("sequences", 1), row["micro_batches"], row["recompute"])
        key = shape, row.get("gpus", 1), row.get("zero", 0), row.get("cp", 1)
        runs.setdefault(key, []).append(row)
    fields = ("ms", "tokens_per_second", "mfu", "memory_bytes")
    medians = {key: [statistics.median(row[f] for row in rows) for f in fields] for key, rows in runs.items()}
    result = []
    for key in sorted(runs):
        one = medians.get((key[0], 1, 0, 1))
        result.append((key, *medians[key], medians[key][1] / one[1] if one else None))
    return result


def table_scaling(times):
    """Training steps on one GPU and on several."""
    if "scaling" not in times.rows:
        return None
    rows = []
    for (shape, gpus, zero, cp), ms, speed, mfu, memory, ratio in scaling_runs(times):
        attention, n, layers, channels, vocab, sequences, micro_batches, recompute = shape
        flags = [f"-z {zero}"] * (gpus > 1) + [f"-cp {cp}"] * (cp > 1) + [f"-r {recompute}"] * (recompute > 0)
        model = f"{attention}, {layers} layer{'s' * (layers > 1)}, {channels:,} channels, vocabulary {vocab:,}"
        row = [tokens(n), model, f"{micro_batches} x {sequences}", str(gpus), f"`{' '.join(flags)}`" if flags else ""]
        row += [number(ms), f"{speed:,.0f}", f"{ratio:.2f}" if ratio else "-"]
        rows.append(row + [f"{100 * mfu:.1f}", f"{memory / 2**30:.1f}"])
    head = ["tokens", "model", "micro-batches x sequences", "GPUs", "flags", "step (ms)", "tokens/s", "times one GPU"]
    head += ["MFU (%)", "memory of a GPU (GiB)"]
    return captioned(times.caption("scaling", "{}s of one host") + ".", markdown(head, rows))


def table_scaling_sentence(times):
    """README: one sentence. It takes the most GPUs with NSA and -z 1, and the shortest context."""
    if "scaling" not in times.rows:
        return None
    runs = [
        (-gpus, shape[1], ratio)
        for (shape, gpus, zero, cp), *_, ratio in scaling_runs(times)
        if shape[0] == "nsa" and (zero, cp) == (1, 1) and gpus > 1 and ratio
    ]
    if not runs:
        die(f"{times.gpu}, commit {MEASURED[times.gpu]['scaling'][1]}: no step of NSA with -z 1 on one and on more GPUs")
    gpus, n, ratio = min(runs)
    caption = times.caption("scaling", f"{-gpus} {{}}s of one host")
    return f"With `-z 1`, {-gpus} GPUs train {ratio:.2f} times as fast as one ({caption}, {tokens(n)} tokens)."


def llama3_8b_steps(times):
    """Returns {(tokens, attention): the row of a training step} of `llama3_8b`. There must be one number of GPUs."""
    rows = {(row["n"], row["attn"]): row for row in times.rows["llama3_8b"] if is_16_bit_step(row)}
    if len({row["gpus"] for row in rows.values()}) != 1:
        die(f"{times.gpu}, commit {MEASURED[times.gpu]['llama3_8b'][1]}: llama3_8b needs rows of one number of GPUs")
    return rows


def predicted(times, row):
    """Returns the predicted tokens/s of a row, or None."""
    names = ("attn", "n", "layers", "channels", "vocab", "gpus", "zero", "cp", "recompute")
    for other in times.predictions:
        if all(other[name] == row[name] for name in names):
            return other["tokens_per_second"]
    return None


def table_llama3_8b(times):
    """Llama 3 8B: tokens/s a GPU, measured, predicted and torchtitan's."""
    if "llama3_8b" not in times.rows:
        return None
    steps = llama3_8b_steps(times)
    gpus = next(iter(steps.values()))["gpus"]
    rows = []
    for n in sorted({n for n, _ in steps}):
        cells = []
        for mode in ("nsa", "full"):
            row = steps.get((n, mode))
            for speed in (row and row["tokens_per_second"], row and predicted(times, row)):
                cells.append(f"{speed / gpus:,.0f}" if speed else "-")
        both = [steps[n, mode]["tokens_per_second"] for mode in ("nsa", "full") if (n, mode) in steps]
        cells.append(f"{both[0] / both[1]:.2f}" if len(both) == 2 else "-")
        rows.append([tokens(n), *cells, f"{TORCHTITAN[n]:,}" if n in TORCHTITAN else "-"])
    head = ["tokens", "NSA", "predicted", "full", "predicted", "NSA / full", "torchtitan, full, fp8"]
    return captioned(times.caption("llama3_8b", f"{gpus} {{}}s of one host") + ", bf16. torchtitan: 8 H100s.", markdown(head, rows))


def table_llama3_8b_parts(times):
    """Llama 3 8B: flags, the parts of a step, memory."""
    if "llama3_8b" not in times.rows:
        return None
    steps, rows = llama3_8b_steps(times), []
    for n, mode in sorted(steps, key=lambda key: (key[1], key[0])):
        row = steps[n, mode]
        flags = f"`-z {row['zero']} -cp {row['cp']} -r {row['recompute']}`"
        parts = [number(part_ms([row], name)) for name, _ in STEP_SPLIT]
        rows.append([tokens(n), mode, flags, number(row["ms"]), *parts, f"{100 * row['mfu']:.1f}", f"{row['memory_bytes'] / 2**30:.1f}"])
    head = ["tokens", "attention", "flags", "step (ms)"] + [title for _, title in STEP_SPLIT] + ["MFU (%)", "memory of a GPU (GiB)"]
    gpus = next(iter(steps.values()))["gpus"]
    return captioned(times.caption("llama3_8b", f"{gpus} {{}}s of one host") + ".", markdown(head, rows))


def table_headline(times):
    """README: one sentence."""
    n, heads = HEADLINE_SHAPE
    ours, mean, flash_nsa, fa4 = (times.total(*column[:2], n, heads) for column in (*NSA[:3], FULL[1]))
    if None in (ours, mean, flash_nsa, fa4):
        return None
    return (
        f"At {tokens(n)} tokens, NSA takes {number(ours)} ms forward and backward on one {times.gpu}, {fa4 / ours:.1f} times as fast as "
        f"full attention with FlashAttention-4.\nWith windows compressed to their mean it takes {number(mean)} ms, {flash_nsa / mean:.1f} times as fast "
        f"as flash_nsa, which is NSA in Triton ({times.caption_with_peers()[:-1]})."
    )


def kernel_table(times, page):
    """fsa/docs: a kernel alone."""
    kind, shapes, columns = KERNEL_PAGES[page]
    programs = {column[0].split()[0] for column in columns}
    program = {"lists": "query_lists"}.get(*programs, *programs)
    rows = []
    for shape in shapes:
        n, hq, hkv, d, block, topk = shape
        cells = [number(times.kernel(kind, column[:4], shape)) for column in columns]
        rows.append([tokens(n), f"({hq}, {hkv}), {d}, ({block}, {topk})"] + cells)
    head = ["tokens", "heads, d, (B, T)"] + [column[4] + " (ms)" for column in columns]
    return captioned(f"{times.caption(kind)}, `build/{program}`:", markdown(head, rows))


def learning_table(runs, function):
    """Returns the function of a table of learning.md."""

    def table(times):
        measured = [times.curves[name] for name in runs if name in times.curves]
        head, rows = function(times.curves)
        return captioned(learning.caption(times.gpu, measured), markdown(head, rows)) if rows else None

    return table


TABLES = {name[6:]: function for name, function in globals().items() if name.startswith("table_")}
TABLES |= {name: learning_table(*table) for name, table in learning.tables().items()}


# ---- pages and chart -------------------------------------------------------------------------------------
def render(page, text, all_times):
    """Returns the text of a page with new tables, and the names of the tables that changed."""
    changed = []

    def replace(match):
        name, gpu = match[2], match[3]
        if gpu not in all_times or not (name in TABLES or name == "kernel" and kernel in KERNEL_PAGES):
            die(f"{page}: no table {match[0].splitlines()[0]}; there are kernel (in fsa/docs), {', '.join(TABLES)}")
        table = kernel_table(all_times[gpu], kernel) if name == "kernel" else TABLES[name](all_times[gpu])
        if not table:
            return match[0]
        block = f"{match[1]}\n{table}\n<!-- end -->"
        if block != match[0]:
            changed.append(f"{page}: table {name} {gpu}")
        return block

    kernel = os.path.basename(page)[:-3]
    if text.count("<!-- table ") != text.count("<!-- end -->"):
        die(f"{page}: every <!-- table NAME --> needs an <!-- end -->")
    pattern = r"(<!-- table (\w+) (\w+) -->)\n.*?<!-- end -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL), changed


def draw(times):
    """The chart: forward plus backward of the attention over the number of tokens."""
    lines, others = {}, {}
    for name, (system, part, _) in zip(chart.STYLES, (FULL[1], NSA[3], NSA[2], NSA[0])):
        points = [(n, times.total(system, part, n, (32, 8))) for n in LENGTHS]
        if any(ms is not None for _, ms in points):
            lines[name] = [(n, ms) for n, ms in points if ms is not None]
        marked = {key[2] for key, mark in times.marks.items() if key[:2] == (system, part) and key[3] == (32, 8) and mark == "other blocks"}
        if marked:
            others[name] = marked
    commit = times.peers[0]["commit"] if times.peers else MEASURED[times.gpu]["attention"][1]
    return chart.draw(times.gpu, commit, lines, others)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if something does not agree"
    )
    check = parser.parse_args().check
    peers = {gpu: read_rows(file, gpu) for gpu, file in PEERS.items()}
    all_times = {gpu: Times(gpu, MEASURED[gpu], peers.get(gpu, [])) for gpu in MEASURED}
    changed, outputs = [], {}
    for page in [*PAGES, *(f"fsa/docs/{name}.md" for name in KERNEL_PAGES)]:
        with open(os.path.join(ROOT, page), encoding="utf-8") as file:
            outputs[page], names = render(page, file.read(), all_times)
        changed += names
    outputs[CHART] = draw(all_times["H200"])
    path = os.path.join(ROOT, CHART)
    old = open(path, encoding="utf-8").read() if os.path.exists(path) else None
    if old != outputs[CHART]:
        changed.append(CHART)
    if check and changed:
        for name in changed:
            print(f"{name} does not agree with dev/results/*.jsonl", file=sys.stderr)
        die("run python3 dev/results/performance.py")
    for name, text in outputs.items():
        if not check:
            with open(os.path.join(ROOT, name), "w", encoding="utf-8") as file:
                file.write(text)
    for name in changed:
        print("wrote " + name)
    if check:
        return
    for gpu, rows in peers.items():
        for run, kind in all_times[gpu].newer_runs(rows):
            print(f"note: no table shows the {kind} of the run {run} in dev/results/{PEERS[gpu]}; an older run has ours, flash_nsa and FlashAttention-4 at 64K tokens")
    for path in sorted(glob.glob(os.path.join(ROOT, "dev/results/peers_*.jsonl"))):
        if os.path.basename(path) not in PEERS.values():
            print(f"note: no page has tables of the rows in {os.path.relpath(path)}; make peers prints the tables of a run at its end")
    for gpu in sorted(set(learning.kept_gpus()) - learning.table_gpus()):
        print(f"note: no page has tables of the runs in {os.path.relpath(learning.rows_file(gpu))}; python3 dev/results/curves.py draw NAME... --gpu {gpu} -o FILE draws them")


if __name__ == "__main__":
    main()
