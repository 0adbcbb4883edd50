"""The rows of curves_GPU.jsonl, which curves.py writes, and the tables of learning.md that performance.py makes of them."""

import glob
import json
import os
import re
import statistics

FOLDER = os.path.dirname(os.path.abspath(__file__))
# Student's t: so many standard errors are 95%, for 1, 2, ... degrees of freedom.
STUDENT_T = [12.71, 4.30, 3.18, 2.78]

# The runs of each table of losses, in its order: name in scripts/learning.sh (those with -kv: of separate_kv.py), and the
# run that it is compared with.
LOSSES = {
    "learning_200m": [
        ("nsa-1", None),
        ("nsa-2", None),
        ("nsa-3", None),
        ("full-x2-1", "nsa-1"),
        ("full-x2-2", "nsa-2"),
        ("full-1", "nsa-1"),
        ("full-2", "nsa-2"),
        ("full-3", "nsa-3"),
        ("window-1", "nsa-1"),
        ("window-1-d73accb", "nsa-1"),
        ("window-2", "nsa-2"),
        ("window-3", "nsa-3"),
    ],
    "learning_gate_bias_200m": [
        ("nsa-1", None),
        ("graded-1", "nsa-1"),
        ("graded-1-bf0dded", "nsa-1"),
        ("graded-mean-1", "graded-1"),
        ("zero-1", "nsa-1"),
        ("nsa-2", None),
        ("graded-2", "nsa-2"),
        ("zero-2", "nsa-2"),
        ("nsa-3", None),
        ("graded-3", "nsa-3"),
    ],
    "learning_gate_bias": [
        ("50m-zero-1", None),
        ("50m-nsa-1-0603293", "50m-zero-1"),
        ("50m-nsa-1", "50m-zero-1"),
        ("50m-graded-1-0603293", "50m-zero-1"),
        ("50m-graded-1", "50m-zero-1"),
        ("50m-zero-2", None),
        ("50m-nsa-2-0603293", "50m-zero-2"),
        ("50m-nsa-2", "50m-zero-2"),
        ("50m-graded-2", "50m-zero-2"),
    ],
    "learning_350m": [
        ("350m-full", None),
        ("350m-nsa", "350m-full"),
        ("350m-graded", "350m-full"),
        ("350m-window", "350m-full"),
        ("350m-nsa-x3", "350m-nsa"),
        ("350m-window-x3", "350m-window"),
    ],
    "learning_fp8": [
        ("50m-full-1", None),
        ("50m-full-fp8-1", "50m-full-1"),
        ("50m-graded-1", None),
        ("50m-graded-fp8-1", "50m-graded-1"),
        ("50m-graded-2", None),
        ("50m-graded-fp8-2", "50m-graded-2"),
        ("graded-1", None),
        ("graded-fp8-1", "graded-1"),
        ("nsa-1", None),
        ("nsa-fp8-1", "nsa-1"),
        ("50m-zero-1", None),
        ("50m-zero-fp8-1", "50m-zero-1"),
        ("50m-zero-2", None),
        ("50m-zero-fp8-2", "50m-zero-2"),
        ("50m-zero-x3-1", None),
        ("50m-zero-x3-fp8-1", "50m-zero-x3-1"),
        ("350m-zero-30m", None),
        ("350m-zero-30m-fp8", "350m-zero-30m"),
    ],
    "learning_variants": [
        ("50m-full-1", None),
        ("50m-full-2", "50m-full-1"),
        ("50m-full-warm-1", "50m-full-1"),
        ("50m-window-1", "50m-full-1"),
        ("50m-graded-1", "50m-full-1"),
        ("50m-graded-1-bf0dded", "50m-full-1"),
        ("50m-graded-2", "50m-full-2"),
        ("50m-graded-hybrid-1", "50m-graded-1"),
        ("50m-graded-mean-1", "50m-graded-1"),
        ("50m-nsa-1", "50m-full-1"),
        ("50m-nsa-hybrid-1", "50m-nsa-1"),
    ],
    "learning_separate_kv": [
        ("50m-graded-1", None),
        ("50m-shared-kv-1", "50m-graded-1"),
        ("50m-separate-kv-1", "50m-shared-kv-1"),
        ("50m-equal-kv-1", "50m-shared-kv-1"),
        ("50m-graded-2", None),
        ("50m-shared-kv-2", "50m-graded-2"),
        ("50m-separate-kv-2", "50m-shared-kv-2"),
        ("50m-equal-kv-2", "50m-shared-kv-2"),
    ],
}
# The rows of each table of runs at their best learning rate: the runs, and the one that goes on at 64K.
BEST = {
    "learning_best": {
        "nsa": (["nsa-1", "nsa-2", "nsa-3"], "nsa-64k"),
        "full": (["full-x2-1", "full-x2-2"], "full-x2-64k"),
        "window": (["window-1", "window-2", "window-3"], "window-64k"),
    },
}
# The rows of each table of final losses at different learning rates, and their runs.
RATES = {
    "learning_rate": {
        "nsa": ["nsa-half-1", "nsa-1", "nsa-2", "nsa-3", "nsa-x2-1", "nsa-x3-1"],
        "full": ["full-1", "full-2", "full-3", "full-x2-1", "full-x2-2", "full-x3-1", "full-x3-2", "full-x6-1"],
        "window": ["window-half-1", "window-1", "window-2", "window-3", "window-x2-1", "window-x3-1"],
        "350m-nsa": ["350m-nsa", "350m-nsa-x3"],
        "350m-full": ["350m-full"],
        "350m-window": ["350m-window", "350m-window-x3"],
        "50m-full": ["50m-full-1", "50m-full-2", "50m-full-x3-1"],
        "50m-zero": ["50m-zero-1", "50m-zero-2", "50m-zero-x3-1"],
    },
}
# Runs NAME-1, NAME-2, ... that differ in the seed, and some in the commit: the names of each table of means. The first is what
# the others are compared with.
SEEDS = {
    "learning_seeds_200m": ["nsa", "graded", "zero", "window", "full-x2", "full-x3", "full"],
    "learning_seeds": ["50m-zero", "50m-nsa", "50m-graded"],
    "learning_seeds_kv": ["50m-shared-kv", "50m-separate-kv", "50m-equal-kv"],
}
# The runs of each table of equal times, and those that they are compared with.
TIMES = {
    "learning_time": [
        ("nsa-1", "full-1"),
        ("nsa-2", "full-2"),
        ("nsa-3", "full-3"),
        ("nsa-1", "full-x2-1"),
        ("nsa-2", "full-x2-2"),
        ("window-1", "full-1"),
        ("window-2", "full-2"),
        ("window-3", "full-3"),
        ("nsa-1", "window-1"),
        ("nsa-2", "window-2"),
        ("nsa-3", "window-3"),
        ("long-nsa", "long-full-x2"),
        ("nsa-64k", "full-64k"),
        ("nsa-64k", "full-x2-64k"),
        ("nsa-64k", "window-64k"),
        ("350m-nsa", "350m-full"),
        ("350m-nsa", "350m-window"),
        ("350m-nsa-x3", "350m-window-x3"),
        ("50m-graded-1", "50m-full-2"),
        ("50m-graded-2", "50m-full-2"),
        ("50m-graded-hybrid-1", "50m-full-2"),
        ("50m-graded-mean-1", "50m-full-2"),
        ("50m-window-1", "50m-full-2"),
        ("smollm2-8k-full", "smollm2-8k-nsa"),
        ("smollm2-8k-full", "smollm2-8k-open32"),
        ("smollm2-8k-full", "smollm2-8k-open64"),
        ("smollm2-16k-full", "smollm2-16k-nsa"),
        ("smollm2-16k-full", "smollm2-16k-open32"),
        ("smollm2-16k-full", "smollm2-16k-open4k"),
    ],
}
# Each table of losses after so many million tokens: these numbers, the runs, and those that they are compared with.
CONTINUED = {
    "learning_trend": (
        [66, 105, 144, 200],
        [
            ("full-x2-1", None),
            ("nsa-1", "full-x2-1"),
            ("nsa-x2-1", "full-x2-1"),
            ("window-1", "full-x2-1"),
            ("full-x2-2", None),
            ("nsa-2", "full-x2-2"),
            ("window-2", "full-x2-2"),
            ("full-x3-1", None),
            ("nsa-x3-1", "full-x3-1"),
            ("window-x3-1", "full-x3-1"),
        ],
    ),
    "learning_trend_long": (
        [105, 210, 315, 400],
        [
            ("long-full-x2", None),
            ("long-nsa", "long-full-x2"),
        ],
    ),
    "learning_64k": (
        [0, 20],
        [
            ("full-x2-64k", None),
            ("full-64k", "full-x2-64k"),
            ("window-64k", "full-x2-64k"),
            ("window-64k-d73accb", "full-x2-64k"),
            ("nsa-64k", "full-x2-64k"),
            ("graded-64k", "full-x2-64k"),
            ("graded-64k-bf0dded", "full-x2-64k"),
            ("zero-64k", "full-x2-64k"),
        ],
    ),
    "learning_smollm2": (
        [0, 1, 10, 50],
        [
            ("smollm2-8k-full", None),
            ("smollm2-8k-nsa", "smollm2-8k-full"),
            ("smollm2-8k-open32", "smollm2-8k-full"),
            ("smollm2-8k-open64", "smollm2-8k-full"),
            ("smollm2-16k-full", None),
            ("smollm2-16k-nsa", "smollm2-16k-full"),
            ("smollm2-16k-open32", "smollm2-16k-full"),
            ("smollm2-16k-open4k", "smollm2-16k-full"),
        ],
    ),
}
# The runs of each table of losses by position, and the pairs whose difference it shows.
POSITIONS = {
    "learning_positions_200m": (
        ["nsa-1", "full-1", "full-x2-1", "window-1"],
        [
            ("nsa-1", "full-1"),
            ("nsa-2", "full-2"),
            ("nsa-3", "full-3"),
            ("nsa-1", "full-x2-1"),
            ("nsa-2", "full-x2-2"),
            ("nsa-1", "window-1"),
            ("nsa-2", "window-2"),
            ("nsa-3", "window-3"),
        ],
    ),
    "learning_positions_long": (
        ["long-nsa", "long-full-x2"],
        [("long-nsa", "long-full-x2")],
    ),
    "learning_positions_64k": (
        ["nsa-64k", "full-64k", "full-x2-64k", "window-64k"],
        [
            ("nsa-64k", "full-64k"),
            ("nsa-64k", "full-x2-64k"),
            ("nsa-64k", "window-64k"),
            ("zero-64k", "full-x2-64k"),
            ("graded-64k", "full-x2-64k"),
        ],
    ),
    "learning_positions_350m": (
        ["350m-nsa", "350m-full", "350m-window", "350m-nsa-x3", "350m-window-x3"],
        [("350m-nsa", "350m-full"), ("350m-nsa", "350m-window"), ("350m-nsa-x3", "350m-window-x3")],
    ),
    "learning_positions_smollm2": (
        ["smollm2-8k-full", "smollm2-16k-full"],
        [
            ("smollm2-8k-nsa", "smollm2-8k-full"),
            ("smollm2-8k-open32", "smollm2-8k-full"),
            ("smollm2-8k-open64", "smollm2-8k-full"),
            ("smollm2-16k-nsa", "smollm2-16k-full"),
            ("smollm2-16k-open32", "smollm2-16k-full"),
            ("smollm2-16k-open4k", "smollm2-16k-full"),
        ],
    ),
}
# The runs of each table of mean gates.
GATES = {
    "learning_gates": ["nsa-1", "nsa-2", "nsa-3", "graded-1", "graded-2", "zero-1", "zero-2"],
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


def kept_gpus():
    """Returns the GPU models that have rows, in upper case."""
    return sorted(os.path.basename(path)[len("curves_") : -len(".jsonl")].upper() for path in glob.glob(rows_file("*")))


def table_gpus():
    """Returns the GPU models that have tables in learning.md."""
    with open(os.path.join(FOLDER, "learning.md"), encoding="utf-8") as file:
        return set(re.findall(r"<!-- table learning_\w+ (\w+) -->", file.read()))


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
    """Returns head and rows of a table of final losses, of the runs that are in `found`; no rows if none can be compared."""
    head = ["run", "attention", "matmuls", "validation loss", "compared with", "difference", "tokens/s", "time (s)", "commit"]
    rows = []
    for name, other in runs:
        if name not in found:
            continue
        row = found[name]
        cells = [name, row["model"]["attn"], row["flags"]["matmul"], f"{val_loss(row):.4f}"]
        cells += [other, f"{val_loss(row) - val_loss(found[other]):+.4f}"] if other in found else ["-", "-"]
        rows.append(cells + [f"{row['tokens_per_second']:,}", f"{row['seconds']:,.0f}", row["commit"]])
    return head, rows if any(name in found and other in found for name, other in runs) else []


def format_rate(rate):
    """Returns a learning rate as 6e-4 or 1.2e-3."""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def best(found, groups):
    """Returns head and rows of a table of runs at their best learning rate: losses of the seeds, their mean, the mean in the first
    and last range of positions, and the run at 64K; no rows if a group lacks a run."""
    head = ["attention", "learning rate", "loss of each run", "mean", "position 0 to 127", "8,192 to 16,383", "tokens/s"]
    rows = []
    for group, (names, longer) in groups.items():
        runs = [found[name] for name in names if name in found]
        if not runs or longer not in found:
            return head, []
        cells = [group, format_rate(runs[0]["flags"]["l"]), ", ".join(f"{val_loss(run):.4f}" for run in runs)]
        means = [statistics.fmean(map(val_loss, runs))]
        means += [statistics.fmean(run["position_loss"][i]["loss"] for run in runs) for i in (0, -1)]
        cells += [*(f"{mean:.4f}" for mean in means), f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}"]
        rows.append([*cells, f"{val_loss(found[longer]):.4f}", f"{found[longer]['tokens_per_second']:,}"])
    return [*head, "loss after 20M more at 64K", "tokens/s at 64K"], rows


def rates(found, groups):
    """Returns head and rows of a table of final losses at each learning rate, in the order of the runs; no rows if no group has
    two rates."""
    cells = {}  # {group: {learning rate: losses}}
    for group, runs in groups.items():
        for row in (found[run] for run in runs if run in found):
            cells.setdefault(group, {}).setdefault(row["flags"]["l"], []).append(f"{val_loss(row):.4f}")
    columns = sorted({rate for row in cells.values() for rate in row})
    rows = [[group, *(", ".join(row.get(rate, ["-"])) for rate in columns)] for group, row in cells.items()]
    return ["runs", *map(format_rate, columns)], rows if any(len(row) > 1 for row in cells.values()) else []


def runs_of(name):
    """Returns the runs NAME-1, NAME-2, ... of the tables of losses."""
    runs = {run for pairs in LOSSES.values() for run, _ in pairs}
    runs |= {run for groups in RATES.values() for group in groups.values() for run in group}
    return sorted(run for run in runs if re.fullmatch(rf"{name}-\d", run))


def seeds(found, names):
    """Returns head and rows of a table of mean final losses of runs that differ in the seed alone, where there are two; no rows
    if only one name has two. Standard errors and intervals are Welch's: each name has its own variance. Their degrees of freedom
    are rounded down."""
    head = ["runs", "seeds", "mean loss", "standard deviation", f"minus {names[0]}", "standard error", "95% interval"]
    values = {name: [val_loss(found[run]) for run in runs_of(name) if run in found] for name in names}
    values = {name: losses for name, losses in values.items() if len(losses) > 1}
    first, rows = values.get(names[0]), []
    for name, losses in values.items():
        cells = [name, str(len(losses)), f"{statistics.fmean(losses):.4f}", f"{statistics.stdev(losses):.4f}"]
        if first and name != names[0]:
            difference = statistics.fmean(losses) - statistics.fmean(first)
            parts = [(statistics.variance(group) / len(group), len(group) - 1) for group in (first, losses)]
            variance = sum(part for part, _ in parts)
            terms = sum(part**2 / freedom for part, freedom in parts)
            freedom = int(variance**2 / terms + 1e-9) if terms else 1  # 1e-9: a whole number may have been rounded below itself
            error = variance**0.5
            limits = [difference + sign * STUDENT_T[min(freedom, len(STUDENT_T)) - 1] * error for sign in (-1, 1)]
            cells += [f"{difference:+.4f}", f"{error:.4f}", f"{limits[0]:+.2f} to {limits[1]:+.2f}"]
        rows.append(cells + ["-"] * (len(head) - len(cells)))
    return head, rows if len(rows) > 1 else []


def overview(found):
    """Returns head, rows and runs of README's table: the attention modes after 200M tokens at 16K, and after 20M more at 64K, all
    runs at the commit of nsa's at 64K; no rows if a mode lacks one."""
    head = ["attention", "loss after 200M tokens at 16K, of each run", "tokens/s at 16K", "loss after 20M more at 64K", "tokens/s at 64K"]
    rows, used, commit = [], [], found.get("nsa-64k", {}).get("commit")
    for mode in ("nsa", "full", "window"):
        runs = [found[name] for name in runs_of(mode) if name in found and found[name]["commit"] == commit]
        longer = found.get(f"{mode}-64k")
        if not runs or not longer or longer["commit"] != commit:
            return head, [], []
        speed = statistics.fmean(run["tokens_per_second"] for run in runs)
        losses = ", ".join(f"{val_loss(run):.3f}" for run in runs)
        rows.append([mode, losses, f"{speed:,.0f}", f"{val_loss(longer):.3f}", f"{longer['tokens_per_second']:,}"])
        used += [*runs, longer]
    return head, rows, used


def loss_at(row, seconds):
    """Returns the validation loss after so many seconds of training: on a line between two validations, and the last one
    after the end."""
    before = [point for point in row["val"] if point[1] <= seconds]
    after = [point for point in row["val"] if point[1] > seconds]
    if not after:
        return val_loss(row)
    (_, t0, loss0), (_, t1, loss1) = before[-1], after[0]
    return loss0 + (loss1 - loss0) * (seconds - t0) / (t1 - t0)


def time_of(row, loss):
    """Returns the seconds after which the validation loss is so low for the first time, on a line between two validations;
    None if it never is."""
    for (_, t0, loss0), (_, t1, loss1) in zip(row["val"], row["val"][1:]):
        if loss0 <= loss:
            return t0
        if loss1 <= loss:
            return t0 + (t1 - t0) * (loss0 - loss) / (loss0 - loss1)
    return None


def times(found, runs):
    """Returns head and rows of a table of losses at equal times, of pairs of runs on equally many GPUs."""
    head = ["run", "compared with", "its time (s)", "its loss", "loss at this time", "difference"]
    head += ["time until its loss (s)", "part of its time"]
    rows = []
    for name, other in runs:
        if name not in found or other not in found or found[name]["gpus"] != found[other]["gpus"]:
            continue
        row, end, target = found[name], found[other]["seconds"], val_loss(found[other])
        loss, reached = loss_at(row, end), time_of(row, target)
        cells = [name, other, f"{end:,.0f}", f"{target:.4f}", f"{loss:.4f}", f"{loss - target:+.4f}"]
        rows.append(cells + (["-", "-"] if reached is None else [f"{reached:,.0f}", f"{reached / end:.2f}"]))
    return head, rows


def continued(found, millions_and_runs):
    """Returns head and rows of a table of validation losses after so many tokens: of the validation nearest to them."""
    millions, runs = millions_and_runs
    head = ["run", "attention", *(f"{n}M tokens" if n else "before" for n in millions), "compared with", "difference"]
    rows = []

    def points(row):
        return [min(row["val"], key=lambda point: abs(point[0] - n * 10**6))[2] for n in millions]

    for name, other in runs:
        if name in found:
            row = found[name]
            cells = [name, row["model"]["attn"], *(f"{loss:.4f}" for loss in points(row))]
            pairs = zip(points(row), points(found[other])) if other in found else []
            differences = " / ".join(f"{a - b:+.4f}" for a, b in pairs)
            speed = [f"{row['tokens_per_second']:,}", f"{row['seconds']:,.0f}", row["commit"]]
            rows.append(cells + ([other, differences] if differences else ["-", "-"]) + speed)
    return [*head, "tokens/s", "time (s)", "commit"], rows


def positions_runs(runs_and_pairs):
    """Returns the runs of a table of losses by position."""
    runs, pairs = runs_and_pairs
    return list(dict.fromkeys([*runs, *(run for pair in pairs for run in pair)]))


def positions(found, runs_and_pairs):
    """Returns head and rows of a table of losses by position."""
    runs, pairs = runs_and_pairs
    cells = {}  # {first position: {run: loss}}
    for name in positions_runs(runs_and_pairs):
        for bucket in found.get(name, {}).get("position_loss", []):
            cells.setdefault(bucket["from"], {})[name] = bucket["loss"]
    rows = []
    for begin, losses in sorted(cells.items()):
        row = [f"{losses[name]:.4f}" if name in losses else "-" for name in runs]
        row += [f"{losses[a] - losses[b]:+.4f}" if a in losses and b in losses else "-" for a, b in pairs]
        rows.append([f"{begin:,} to {max(2 * begin, 128) - 1:,}", *row])
    return ["position", *runs, *(f"{a} - {b}" for a, b in pairs)], rows


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
    result = {}
    groups = ((BEST, best), (LOSSES, losses), (RATES, rates), (TIMES, times), (CONTINUED, continued))
    groups += ((POSITIONS, positions), (GATES, gates), (SEEDS, seeds))
    for group, function in groups:
        for name, runs in group.items():
            if group is SEEDS:
                used = [run for family in runs for run in runs_of(family)]
            elif group is BEST:
                used = [run for names, longer in runs.values() for run in (*names, longer)]
            elif group is RATES:
                used = [run for names in runs.values() for run in names]
            elif group is POSITIONS:
                used = positions_runs(runs)
            elif group is CONTINUED:
                used = [run for run, _ in runs[1]]
            elif isinstance(runs[0], tuple):
                used = list(dict.fromkeys(run for pair in runs for run in pair if run))
            else:
                used = runs
            result[name] = (used, lambda found, runs=runs, function=function: function(found, runs))
    return result
