"""Plots the loss by position in the document, of several runs beside each other.

    python3 scripts/plot_position.py log/nsa log/full log/window -o position.png     (needs Matplotlib)

The losses are those of the last validation in the log.jsonl of each run; the trainers log them in contexts above
128 tokens. With several runs, a second panel shows the differences to the first run. The legend shows the name of
the folder, or NAME for an argument NAME=FOLDER, with the data and the attention mode. The loss is in bits per byte
if the runs have different tokenizers.
"""
import argparse
import math

from train_log import Parser, die, import_pyplot, loss_scales, read_run, run_main, save_figure


def losses_by_position(run):
    """Returns {first position of a bucket: loss} of the last validation, without NaN and Inf."""
    return {b["from"]: b["loss"] for b in run.positions[-1]["position_loss"] if b["loss"] is not None}


def bucket_middle(start):
    """Returns where a bucket is drawn: the middle, on a logarithmic axis, of `start` to twice that. The first
    bucket is positions 0 to 127."""
    return start * math.sqrt(2) if start else 64


def draw(plt, runs):
    """Returns the figure."""
    scales, unit = loss_scales(runs)
    losses = {run: {start: loss * scales[run] for start, loss in losses_by_position(run).items()} for run in runs}
    columns = 2 if len(runs) > 1 else 1
    figure, axes = plt.subplots(1, columns, figsize=(6 * columns, 4.5), squeeze=False, layout="constrained")
    for i, run in enumerate(runs):
        style = {"color": f"C{i % 10}", "linestyle": ["-", "--", ":"][i // 10 % 3], "marker": "o", "markersize": 4}
        starts = sorted(losses[run])
        axes[0, 0].plot([bucket_middle(s) for s in starts], [losses[run][s] for s in starts], label=run.label, **style)
        if columns == 2:
            both = [s for s in starts if s in losses[runs[0]]]
            differences = [losses[run][s] - losses[runs[0]][s] for s in both]
            axes[0, 1].plot([bucket_middle(s) for s in both], differences, **style)
    axes[0, 0].set(ylabel=f"loss, {unit}", title="validation loss by position")
    if columns == 2:
        axes[0, 1].set(ylabel=unit, title=f"difference to {runs[0].name}")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("position in the document, tokens")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(3, len(runs)))
    return figure


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("-o", default="position.png", metavar="FILE", help="output picture (default: position.png)")
    args = parser.parse_args()
    runs = [read_run(argument) for argument in args.runs]
    for run in runs:
        if not run.positions:
            die(f"{run.file}: has no loss by position; validate (-j) with a context above 128 tokens")
        if not losses_by_position(run):
            die(f"{run.file}: all losses by position are NaN or Inf; drop this run")
    save_figure(draw(import_pyplot(), runs), args.o)


if __name__ == "__main__":
    run_main(main, "nothing was written")
