"""Writes the tables of performance.md and README.md, and the chart attention.svg, from the .jsonl files here.

    python3 dev/results/performance.py            # rewrites what lies between the markers, and the chart
    python3 dev/results/performance.py --check    # changes nothing; exits 1 and names what does not agree

A table lies between <!-- table NAME --> and <!-- end -->; NAME is a function of TABLES below. A number is the
median of the rows with the same shape. After new measurements, change MEASURED and run the program.
"""

import argparse
import json
import os
import re
import statistics
import sys

import chart

# The measurements that the tables show: for each GPU a file and a commit. H200 is also in the chart.
MEASURED = {"H200": ("h200_68a9f7d_a01a9ab.jsonl", "a01a9ab"), "H100": ("h100.jsonl", "b7e2b0a")}
PEERS = {"H200": "peers_h200.jsonl"}  # other systems on the same GPU model
PAGES = ["dev/results/performance.md", "README.md"]
CHART = "dev/results/attention.svg"

LENGTHS = [8192, 16384, 32768, 65536, 131072]
HEADS = [(32, 8), (32, 32), (40, 8), (64, 4)]  # query heads, KV heads
SHAPES = [(n, (32, 8)) for n in LENGTHS] + [(65536, heads) for heads in HEADS[1:]]
# FSA publishes no function for the whole attention: its time is the sum of these parts. "cmp+topk" includes
# the compressed branch. The compression of V and the gate are left out.
FSA_PARTS = {"fwd": ["compress_k", "cmp+topk", "sel", "swa"], "bwd": ["compress_k", "cmp", "sel", "swa"]}

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")


def die(message):
    sys.exit("error: " + message)


def read_rows(file):
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
    return rows


class Times:
    """The measurements on one GPU model. ms: {(system, part, tokens, heads, direction): [milliseconds]}; the
    training steps are in `steps`: {(system, tokens): [row]}."""

    def __init__(self, gpu):
        self.gpu, (file, self.commit) = gpu, MEASURED[gpu]
        self.ms, self.steps, self.dates = {}, {}, set()
        rows = [row for row in read_rows(file) if row["commit"] == self.commit]
        if not rows:
            die(f"dev/results/{file} has no row of commit {self.commit}; see MEASURED in performance.py")
        for row in rows:
            self.add_ours(row)
        for row in read_rows(PEERS[gpu]) if gpu in PEERS else []:
            self.add_peer(row)

    def add(self, system, part, row, direction, ms):
        key = system, part, row["n"], (row["hq"], row["hkv"]), direction
        self.ms.setdefault(key, []).append(ms)

    def add_ours(self, row):
        """Adds a row of build/core, or of the trainer's -profile."""
        if row["program"] == "train_gpt_nsa" and row["dir"] == "step" and row["gpus"] == 1:
            self.steps.setdefault((row["attn"], row["n"]), []).append(row)
        default = (row.get("d"), row.get("block"), row.get("topk"), row.get("dtype")) == (128, 64, 16, "bf16")
        if row["program"] == "core" and default:
            self.dates.add(row["date"])
            part = "recompute" if row["version"] == "recompute" else row["part"]
            self.add("ours", part, row, row["dir"], row["ms"])

    def add_peer(self, row):
        if "att" in row:
            self.steps.setdefault(("PyTorch " + row["att"], row["n"]), []).append(row)
        elif "ms" in row:
            self.add(row["peer"], row["part"], row, row["dir"], row["ms"])
        else:
            for direction in ("fwd", "bwd"):
                self.add(row["peer"], row["part"], row, direction, row[direction])

    def time(self, system, part, n, heads, direction):
        """Returns the median in milliseconds, or None if it was not measured."""
        if (system, part) == ("fsa", "core"):
            parts = [self.time("fsa", p, n, heads, direction) for p in FSA_PARTS[direction]]
            return None if None in parts else sum(parts)
        values = self.ms.get((system, part, n, heads, direction))
        return statistics.median(values) if values else None

    def total(self, system, part, n, heads):
        """Returns milliseconds of forward plus backward, or None."""
        pair = [self.time(system, part, n, heads, direction) for direction in ("fwd", "bwd")]
        return None if None in pair else sum(pair)

    def step(self, system, n, field):
        """Returns the median of a field of the training steps, or None."""
        values = [row[field] for row in self.steps.get((system, n), [])]
        return statistics.median(values) if values else None


# ---- Markdown --------------------------------------------------------------------------------------------
def number(ms):
    """Milliseconds with three digits."""
    if ms is None:
        return "-"
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def pair(times, system, part, n, heads):
    """Forward / backward; a part without a backward pass has one number."""
    forward, backward = (times.time(system, part, n, heads, direction) for direction in ("fwd", "bwd"))
    if backward is None:
        return number(forward)
    return f"{number(forward)} / {number(backward)}"


def tokens(n):
    return f"{n // 1024}K"


def markdown(head, rows):
    """Returns a table without the columns and rows that hold nothing but "-". The cells under "tokens" and
    "heads" name a row."""
    labels = sum(1 for title in head if title in ("tokens", "heads"))
    keep = [i for i in range(len(head)) if i < labels or any(row[i] != "-" for row in rows)]
    rows = [row for row in rows if any(cell != "-" for cell in row[labels:])]
    lines = [head, ["---"] * len(head)] + rows
    return "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in lines)


NSA = [("ours", "core", "NSA, ours"), ("flash_nsa", "core", "NSA, flash_nsa"), ("fsa", "core", "NSA, FSA")]
FULL = [
    ("ours", "full", "full, ours"),
    ("fa4", "full", "full, FlashAttention-4"),
    ("cudnn", "full", "full, cuDNN"),
]


def table_summary(times):
    """README: forward plus backward of NSA and full attention, (32, 8) heads."""
    head = ["tokens"] + [title + " (ms)" for _, _, title in NSA + FULL]
    rows = [[tokens(n)] + [number(times.total(s, p, n, (32, 8))) for s, p, _ in NSA + FULL] for n in LENGTHS]
    return markdown(head, rows)


def table_attention(times):
    """Forward / backward of NSA and full attention, all shapes."""
    head = ["tokens", "heads"] + [title + " (ms)" for _, _, title in NSA + FULL]
    rows = [
        [tokens(n), str(heads)] + [pair(times, s, p, n, heads) for s, p, _ in NSA + FULL]
        for n, heads in SHAPES
    ]
    return markdown(head, rows).replace("- / -", "-")


def table_selected(times):
    """Forward / backward of the selected branch."""
    systems = [("ours", "ours"), ("flash_nsa", "flash_nsa"), ("fsa", "FSA"), ("nsa", "NSA (Triton)")]
    head = ["tokens", "heads"] + [title + " (ms)" for _, title in systems]
    return markdown(
        head,
        [
            [tokens(n), str(heads)] + [pair(times, s, "sel", n, heads) for s, _ in systems]
            for n, heads in SHAPES
        ],
    )


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
    return markdown(
        head,
        [
            [tokens(n), str(heads)] + [pair(times, "ours", p, n, heads) for p, _ in parts]
            for n, heads in SHAPES
        ],
    )


def table_step(times):
    """A training step."""
    systems = [
        ("nsa", "NSA, ours"),
        ("PyTorch flash_nsa", "NSA, PyTorch with flash_nsa"),
        ("PyTorch fsa", "NSA, PyTorch with FSA"),
        ("full", "full, ours"),
        ("PyTorch full", "full, PyTorch with cuDNN"),
    ]
    rows = []
    for n in LENGTHS:
        values = [times.step(s, n, "step_ms" if s.startswith("PyTorch") else "ms") for s, _ in systems]
        rows.append([tokens(n)] + [number(value) for value in values])
    return markdown(["tokens"] + [title + " (ms)" for _, title in systems], rows)


def table_step_parts(times):
    """Where the time of our training step goes, and what it needs."""
    split = [
        ("products", "matmuls (ms)"),
        ("attention_forward", "attention, forward (ms)"),
        ("attention_backward", "attention, backward (ms)"),
        ("classifier", "classifier (ms)"),
        ("norms", "norms, SwiGLU (ms)"),
        ("optimizer", "optimizer (ms)"),
    ]
    rows = []
    for n in LENGTHS:
        steps = times.steps.get(("nsa", n))
        if not steps:
            continue
        row = [number(statistics.median(r["split"][name] for r in steps)) for name, _ in split]
        speed, mfu, memory = (times.step("nsa", n, f) for f in ("tokens_per_second", "mfu", "memory_bytes"))
        rows.append([tokens(n)] + row + [f"{speed:,.0f}", f"{100 * mfu:.1f}", f"{memory / 2**30:.1f}"])
    return markdown(
        ["tokens"] + [title for _, title in split] + ["tokens/s", "MFU (%)", "memory (GiB)"], rows
    )


def table_headline(times):
    """README: one sentence."""
    n, heads = 65536, (32, 8)
    ours = times.total("ours", "core", n, heads)
    flash_nsa, fa4 = times.total("flash_nsa", "core", n, heads), times.total("fa4", "full", n, heads)
    if None in (ours, flash_nsa, fa4):
        die(
            f"{times.gpu}, commit {times.commit}: the headline needs NSA, flash_nsa and FlashAttention-4 at "
            f"{tokens(n)} tokens"
        )
    return (
        f"At {tokens(n)} tokens, NSA takes {number(ours)} ms forward and backward on one {times.gpu}. "
        f"That is\n{flash_nsa / ours:.1f} times as fast as flash_nsa (NSA in Triton), and {fa4 / ours:.1f} "
        "times as fast as full attention\nwith FlashAttention-4."
    )


def table_measured(times):
    """The GPU, commit and date of the tables that follow."""
    return f"One {times.gpu}, commit {times.commit}, {' and '.join(sorted(times.dates))}."


TABLES = {name[6:]: function for name, function in globals().items() if name.startswith("table_")}


# ---- pages and chart -------------------------------------------------------------------------------------
def render(page, text, all_times):
    """Returns the text of a page with new tables, and the names of the tables that changed."""
    changed = []

    def replace(match):
        name, gpu = match[2], match[3] or "H200"
        if name not in TABLES or gpu not in all_times:
            die(f"{page}: no table {match[0].splitlines()[0]}; there are {', '.join(TABLES)}")
        block = f"{match[1]}\n{TABLES[name](all_times[gpu])}\n<!-- end -->"
        if block != match[0]:
            changed.append(f"{page}: table {name} {gpu}")
        return block

    if text.count("<!-- table ") != text.count("<!-- end -->"):
        die(f"{page}: every <!-- table NAME --> needs an <!-- end -->")
    pattern = r"(<!-- table (\w+)(?: (\w+))? -->)\n.*?<!-- end -->"
    return re.sub(pattern, replace, text, flags=re.DOTALL), changed


def draw(times):
    """The chart: forward plus backward of the attention over the number of tokens."""
    lines = {}
    for system, part, _ in [*NSA, FULL[1]]:
        points = [(n, times.total(system, part, n, (32, 8))) for n in LENGTHS]
        lines[system] = [(n, ms) for n, ms in points if ms is not None]
    return chart.draw(times.gpu, times.commit, lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if something does not agree"
    )
    check = parser.parse_args().check
    all_times = {gpu: Times(gpu) for gpu in MEASURED}
    changed, outputs = [], {}
    for page in PAGES:
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


if __name__ == "__main__":
    main()
