"""Plots training runs from their log.jsonl: training and validation loss, and recall by distance if logged.

    python3 scripts/plot_log.py log/nsa log/full log/window -o runs.png     (needs Matplotlib)

A run is an output folder of the trainer (-o) or its log.jsonl. The legend shows the name of the folder, or
NAME for an argument NAME=FOLDER. --tokens plots over tokens instead of steps. --smooth N averages the
training loss over N steps.
"""
import argparse
import json
import math
import os
import sys


def die(message):
    sys.exit("error: " + message)


def read_run(argument):
    """Returns (name, training rows, validation rows, last recall row or None). A row is a dict."""
    name, _, path = argument.rpartition("=")
    file = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
    name = name or os.path.basename(os.path.dirname(os.path.abspath(file)))
    train, val, recall = [], [], None
    try:
        with open(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    die(f"{file}: line {number} is not JSON; remove it")
                if row.get("loss") is not None:
                    train.append(row)
                elif row.get("val_loss") is not None:
                    val.append(row)
                elif "recall" in row:
                    recall = row
    except OSError as e:
        die(f"{file}: {e.strerror}")
    if not train and not val:
        die(f"{file}: has no losses; name the folder of a run that has trained")
    return name, train, val, recall


def tokens_at(train):
    """Returns {step: tokens trained on so far}. The tokens of a step are its tokens/s times its time."""
    total, tokens = 0.0, {0: 0.0}
    for row in train:
        total += row["tokens_per_second"] * row["ms"] / 1000
        tokens[row["step"]] = total
    return tokens


def smoothed(values, width):
    """Returns the moving average over the last `width` values."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0)
        out.append(total / min(i + 1, width))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("-o", default="runs.png", metavar="FILE", help="output picture (default: runs.png)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="average the loss over N steps")
    parser.add_argument("--tokens", action="store_true", help="plot over tokens instead of steps")
    args = parser.parse_args()
    if args.smooth < 1:
        die(f"--smooth {args.smooth}: must be at least 1")
    runs = [read_run(argument) for argument in args.runs]
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("Matplotlib is missing; run pip install matplotlib")

    has_recall = any(recall for _, _, _, recall in runs)
    figure, axes = plt.subplots(1, 1 + has_recall, figsize=(6.5 * (1 + has_recall), 4.5), squeeze=False)
    loss_axis = axes[0][0]
    for i, (name, train, val, recall) in enumerate(runs):
        color = f"C{i % 10}"
        x = tokens_at(train) if args.tokens else None
        if train:
            loss_axis.plot([x[r["step"]] if x else r["step"] for r in train],
                           smoothed([r["loss"] for r in train], args.smooth), color=color, alpha=0.35,
                           linewidth=1, label=None if val else name)
        if val:
            rows = [r for r in val if not x or r["step"] in x]
            loss_axis.plot([x[r["step"]] if x else r["step"] for r in rows], [r["val_loss"] for r in rows],
                           color=color, marker="o", markersize=3, label=name)
        if recall:
            buckets = [b for b in recall["recall"] if b["asked"]]
            axes[0][1].plot([b["from"] * math.sqrt(2) for b in buckets],
                            [100 * b["right"] / b["asked"] for b in buckets], color=color, marker="o",
                            label=name)
    loss_axis.set(xlabel="tokens" if args.tokens else "step", ylabel="loss, nats per token",
                  title="training (pale) and validation (dots)")
    if has_recall:
        chance = max(100 * recall["chance"] for _, _, _, recall in runs if recall)
        axes[0][1].axhline(chance, color="grey", linestyle=":", label="chance")
        axes[0][1].set_xscale("log", base=2)
        axes[0][1].xaxis.set_major_formatter("{x:,.0f}")
        axes[0][1].set(xlabel="distance, tokens", ylabel="recalled, %", ylim=(0, 102),
                       title="recall at the last validation")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(args.o, dpi=150)
    except (OSError, ValueError) as e:
        die(f"-o {args.o}: {getattr(e, 'strerror', None) or e}")
    print(f"wrote {args.o}")


if __name__ == "__main__":
    main()
