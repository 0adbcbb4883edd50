"""Keeps training runs as rows of dev/results/curves_GPU.jsonl, and draws them.

    python3 dev/results/curves.py add log/learning/*                    # appends a row for each run, or replaces that of its name
    python3 dev/results/curves.py draw nsa-1 full-1 -o curves.svg       # losses over tokens; needs Matplotlib
    python3 dev/results/curves.py draw nsa-1 full-1 --time -o time.svg  # over the seconds of the training steps
    python3 dev/results/curves.py draw nsa-1 --gpu A100-SXM4-80GB -o curves.svg    # of runs that were not on an H200
    python3 dev/results/curves.py draw log/learning/nsa-1 nsa-1 -o curves.svg      # one that is not kept, on any GPU or CPU

A row has what log.jsonl says of the run (commit, date, GPU, processes, flags, model), its tokens/s and seconds, at most
100 points of the training loss, each the mean of its steps, all validations, and the last loss by position and mean gates.
A point has tokens, seconds and loss. Validations and checkpoints take none of these seconds. performance.py writes the
tables of learning.md from the rows. A run that has the name of one of scripts/learning.sh must have its flags.
"""

import argparse
import json
import os
import re
import statistics
import sys
from itertools import accumulate

import learning

sys.path.insert(0, os.path.join(learning.FOLDER, "../../scripts"))
from train_log import Parser, die, import_pyplot, read_run, save_figure  # noqa: E402

POINTS = 100


class NotKept(Exception):
    """Why a run gets no row."""


def flags_of(name):
    """Returns the flags that tell the run NAME of scripts/learning.sh from others, {} if it has none of this name."""
    with open(os.path.join(learning.FOLDER, "../../scripts/learning.sh"), encoding="utf-8") as file:
        script = file.read()
    models = dict(re.findall(r'^    \[([\w-]+)\]="(.*)"$', script, re.M))
    for line in script.split("<<'END'\n")[1].split("\nEND\n")[0].splitlines():
        run, model, text, tokens, *flags = line.split()
        if run == name:
            flags = f"-t {models.get(model, models['64k'])}".split() + flags
            steps = (int(tokens.removesuffix("M")) * 10**6 + 65536) // 131072
            found = dict(zip((flag[1:] for flag in flags[::2]), flags[1::2]))
            return {"matmul": "bf16", "gate-bias": None} | found | {"x": str(steps), "i": f"data/{text}/linux_train_*.bin"}
    return {}


def row_of(run):
    """Returns the row of a complete run."""
    start, steps = run.start, run.start["flags"]["x"]
    trained, validated = (rows[-1]["step"] if rows else 0 for rows in (run.train, run.val))
    if min(trained, validated) < steps:
        raise NotKept(
            f"{run.file}: the run stopped at step {trained} of {steps}, its last validation is of step {validated}; "
            "finish it: start scripts/learning.sh again"
        )
    for flag, wanted in flags_of(run.name).items():
        got = start["flags"].get(flag, start["model"].get(flag))
        if not same_value(got, wanted):
            raise NotKept(
                f"{run.file}: -{flag} {got}: {run.name} of scripts/learning.sh has {wanted or 'none'}; give the run another "
                "name: NAME=FOLDER"
            )
    seconds = dict(zip((row["step"] for row in run.train), accumulate(row["ms"] / 1000 for row in run.train)))
    points = min(POINTS, len(run.train))
    bounds = [i * len(run.train) // points for i in range(points + 1)]
    groups = [run.train[begin:end] for begin, end in zip(bounds, bounds[1:])]

    def point(row, loss):
        return [row["tokens"], round(seconds.get(row["step"], 0), 1), round(loss, 5)]

    row = {"name": run.name, "commit": start["commit"], "date": start["date"][:10], "gpu": start["gpu"]}
    row |= {"gpus": start["processes"], "flags": start["flags"], "model": start["model"], "seconds": round(seconds[steps], 1)}
    row |= {"tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in run.train))}
    row |= {"loss": [point(g[-1], statistics.fmean(r["loss"] for r in g)) for g in groups]}
    row |= {"val": [point(r, r["val_loss"]) for r in run.val]}
    for key, rows in (("position_loss", run.positions), ("gates", run.gates)):
        if rows:
            row[key] = rows[-1][key]
    return row


def same_value(got, wanted):
    """Returns whether a flag of a log has the value that the table writes, as 0.0006 and '6e-4'."""
    try:
        return float(got) == float(wanted)
    except (TypeError, ValueError):
        return got == wanted


def gpu_model(row):
    """Returns the model, such as H200: the first word of the GPU's name with a digit."""
    words = [word for word in (row["gpu"] or "").split() if any(c.isdigit() for c in word)]
    if not words:
        raise NotKept(f"{row['name']}: its log names no GPU; rows are kept of runs on a GPU")
    return words[0]


def add(folders):
    runs, reasons = [], []
    for folder in folders:
        try:
            row = row_of(read_run(folder))
            gpu_model(row)
            runs.append(row)
        except NotKept as e:
            reasons.append(str(e))
    if not runs:
        die(reasons[0])
    for reason in reasons:
        print(f"note: not added: {reason}", file=sys.stderr)
    for gpu in sorted({gpu_model(row) for row in runs}):
        new = {row["name"]: row for row in runs if gpu_model(row) == gpu}
        rows = learning.read_rows(gpu) | new
        path = learning.rows_file(gpu)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in rows.values())
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
        print(f"wrote {os.path.relpath(path)}: {len(rows)} runs, {len(new)} of them from these folders")
        if gpu in learning.table_gpus():
            print("next: python3 dev/results/performance.py writes the tables of dev/results/learning.md")
        else:
            print(f"next: python3 dev/results/curves.py draw NAME... --gpu {gpu} -o FILE; no page has tables of the {gpu}")


def draw(plt, rows, by_time):
    """Returns a figure: training losses as thin lines, validation losses as lines with points. A run in fp8 has broken
    lines, in the color of the run that differs from it in this alone."""
    plt.rcParams["svg.hashsalt"] = "curves"  # the same bytes each time
    figure, axis = plt.subplots(figsize=(8, 5))
    column, scale = (1, 1) if by_time else (0, 1e-6)
    pairs = list(dict.fromkeys(row["name"].replace("-fp8", "") for row in rows))
    for row in rows:
        color = {"color": f"C{pairs.index(row['name'].replace('-fp8', ''))}", "linestyle": "--" if "-fp8" in row["name"] else "-"}
        for points, style in ((row["loss"], {"linewidth": 0.8, "alpha": 0.4}), (row["val"], {"marker": "o", "markersize": 4, "label": row["name"]})):
            axis.plot([p[column] * scale for p in points], [p[2] for p in points], **color, **style)
    losses = [learning.val_loss(row) for row in rows]
    limits = (min(losses) - 0.05, max(losses) + 1)
    axis.set(xlabel="training, seconds" if by_time else "million tokens", ylabel="loss, nats per token (points: validation)", ylim=limits)
    axis.legend()
    return figure


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adds = commands.add_parser("add", help="keep runs")
    adds.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder of the trainer, or NAME=FOLDER")
    draws = commands.add_parser("draw", help="draw the losses of kept runs")
    draws.add_argument("names", nargs="+", metavar="NAME", help="of a kept run, or a trainer's output folder with a / in it")
    draws.add_argument("-o", required=True, metavar="FILE", help="the picture")
    draws.add_argument("--time", action="store_true", help="over seconds instead of tokens")
    draws.add_argument("--gpu", default="H200", metavar="MODEL", help="GPU model of the runs (H200)")
    args = parser.parse_args()
    if args.command == "add":
        add(args.folders)
        return
    rows = learning.read_rows(args.gpu)
    for name in args.names:
        if "/" in name:
            try:
                rows[name] = row_of(read_run(name))
            except NotKept as e:
                die(e)
        elif name not in rows:
            others = [gpu for gpu in learning.kept_gpus() if gpu != args.gpu.upper()]
            hint = f"; --gpu takes another GPU's: {', '.join(others)}" if others else "" if rows else "; add some with curves.py add"
            die(f"{name}: no such run on {args.gpu}; there are {', '.join(rows) or 'none'}{hint}")
    save_figure(draw(import_pyplot(), [rows[name] for name in args.names], args.time), args.o)


if __name__ == "__main__":
    main()
