"""The rows of curves_GPU.jsonl, which curves.py writes, and the tables of learning.md that performance.py makes of them."""

import json
import os

FOLDER = os.path.dirname(os.path.abspath(__file__))

# The runs of each table of losses, in its order: name in scripts/learning.sh, and the run that it is compared with.
LOSSES = {
    "learning_200m": [
        ("full-1", None),
        ("nsa-1", "full-1"),
        ("window-1", "full-1"),
        ("nsa-2", "nsa-1"),
        ("window-2", "window-1"),
        ("nsa-fp8-1", "nsa-1"),
    ],
    "learning_64k": [("full-64k", None), ("nsa-64k", "full-64k"), ("window-64k", "full-64k")],
    "learning_350m": [("350m-full", None), ("350m-nsa", "350m-full"), ("350m-window", "350m-full")],
    "learning_fp8": [
        ("50m-full-1", None),
        ("50m-full-fp8-1", "50m-full-1"),
        ("50m-nsa-1", "50m-full-1"),
        ("50m-nsa-fp8-1", "50m-nsa-1"),
        ("50m-nsa-2", "50m-nsa-1"),
        ("50m-nsa-fp8-2", "50m-nsa-2"),
        ("50m-rate-1", "50m-nsa-1"),
        ("50m-rate-fp8-1", "50m-rate-1"),
        ("350m-nsa-30m", None),
        ("350m-nsa-30m-fp8", "350m-nsa-30m"),
    ],
    "learning_gate_bias": [
        ("50m-nsa-1", None),
        ("50m-gate-sliding-1", "50m-nsa-1"),
        ("50m-gate-graded-1", "50m-nsa-1"),
        ("50m-nsa-2", None),
        ("50m-gate-sliding-2", "50m-nsa-2"),
        ("50m-gate-graded-2", "50m-nsa-2"),
    ],
}
# The runs of each table of losses by position; the second one is subtracted from the first.
POSITIONS = {
    "learning_positions_200m": ["nsa-1", "full-1", "window-1"],
    "learning_positions_64k": ["nsa-64k", "full-64k", "window-64k"],
    "learning_positions_350m": ["350m-nsa", "350m-full", "350m-window"],
}
# The runs of each table of mean gates.
GATES = {
    "learning_gates": ["nsa-1", "nsa-2", "nsa-64k", "350m-nsa"],
    "learning_gates_bias": ["50m-nsa-1", "50m-gate-sliding-1", "50m-gate-graded-1"],
}


def rows_file(gpu):
    """Returns the path of the rows of a GPU model such as H200."""
    return os.path.join(FOLDER, f"curves_{gpu.lower()}.jsonl")


def read_rows(gpu):
    """Returns {name: row} of a GPU model; {} if none was kept."""
    if not os.path.exists(rows_file(gpu)):
        return {}
    with open(rows_file(gpu), encoding="utf-8") as file:
        return {row["name"]: row for row in map(json.loads, file)}


def val_loss(row):
    """Returns the last validation loss."""
    return row["val"][-1][2]


def caption(gpu, rows):
    """Returns a line with the GPUs of a run, the commits and dates of rows."""
    counts = sorted({row["gpus"] for row in rows})
    gpus = " or ".join(map(str, counts)) + f" {gpu}" + "s" * (counts[-1] > 1)
    commits = sorted({row["commit"] for row in rows})
    dates = sorted({row["date"] for row in rows})
    return f"{gpus} a run, commit{'s' * (len(commits) > 1)} {', '.join(commits)}, {' and '.join(dates)}."


def losses(found, runs):
    """Returns head and rows of a table of final losses, of the runs that are in `found`."""
    head = ["run", "attention", "matmuls", "validation loss", "compared with", "difference", "tokens/s", "time (s)", "commit"]
    rows = []
    for name, other in runs:
        if name not in found:
            continue
        row = found[name]
        cells = [name, row["model"]["attn"], row["flags"]["matmul"], f"{val_loss(row):.4f}"]
        cells += [other, f"{val_loss(row) - val_loss(found[other]):+.4f}"] if other in found else ["-", "-"]
        rows.append(cells + [f"{row['tokens_per_second']:,}", f"{row['seconds']:,.0f}", row["commit"]])
    return head, rows


def positions(found, runs):
    """Returns head and rows of a table of losses by position."""
    cells = {}  # {first position: {run: loss}}
    for name in runs:
        for bucket in found.get(name, {}).get("position_loss", []):
            cells.setdefault(bucket["from"], {})[name] = bucket["loss"]
    rows = []
    for begin in sorted(cells):
        values = [cells[begin].get(name) for name in runs]
        row = [f"{max(2 * begin, 128) - 1:,}"] + ["-" if v is None else f"{v:.4f}" for v in values]
        rows.append([f"{begin:,} to {row[0]}", *row[1:], "-" if None in values[:2] else f"{values[0] - values[1]:+.4f}"])
    return ["position", *runs, f"{runs[0]} - {runs[1]}"], rows


def gates(found, runs):
    """Returns head and rows of a table of mean gates: compressed / selected / sliding of each layer."""
    layers = max((len(found[name]["gates"]) for name in runs if name in found), default=0)
    rows = []
    for layer in range(layers):
        means = [found[name]["gates"][layer : layer + 1] if name in found else [] for name in runs]
        rows.append([str(layer)] + [" / ".join(f"{g:.2f}" for g in m[0]) if m else "-" for m in means])
    return ["layer", *runs], rows


def tables():
    """Returns {name: (runs, function)} of all tables."""
    result = {name: ([run for run, _ in runs], lambda found, runs=runs: losses(found, runs)) for name, runs in LOSSES.items()}
    for group, function in ((POSITIONS, positions), (GATES, gates)):
        for name, runs in group.items():
            result[name] = (runs, lambda found, runs=runs, function=function: function(found, runs))
    return result
