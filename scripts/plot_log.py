"""Plots training runs from their log.jsonl: loss, learning rate, gradient norm, tokens/s, and recall by
distance if logged.

    python3 scripts/plot_log.py log/nsa log/full log/window -o runs.png     (needs Matplotlib)

A run is an output folder of the trainer (-o) or its log.jsonl. The legend shows the name of the folder, or
NAME for an argument NAME=FOLDER, with the data and the attention mode. The loss is in bits per byte if the runs
have different tokenizers. The axes show the part after the warm-up; outliers may lie outside.
"""
import argparse
import math

from train_log import Parser, die, format_recall_axis, import_pyplot, loss_scales, plot_recall, read_run, run_main, save_figure


def smoothed(values, width):
    """Returns the moving average over the last `width` values."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0)
        out.append(total / min(i + 1, width))
    return out


def percentile(values, fraction):
    values = sorted(values)
    return values[round(fraction * (len(values) - 1))]


def settled(run, rows, values):
    """Returns the values of the rows after the warm-up and the first tenth of the run; all if there are none."""
    steps = [row["step"] for row in run.train or run.val]
    begin = max(steps[0] + (steps[-1] - steps[0]) / 10, run.start.get("flags", {}).get("u") or 0)
    return [value for row, value in zip(rows, values) if row["step"] >= begin] or values


def plot_loss(axis, runs, styles, x, smooth):
    scales, unit = loss_scales(runs)
    lows, highs = [], []
    for run in runs:
        val = [row["val_loss"] * scales[run] for row in run.val]
        train = [row["loss"] * scales[run] for row in run.train]
        width = smooth or max(1, len(train) // 50)
        steps = [row[x] for row in run.train]
        if width > 1 and len(runs) <= 2:
            axis.plot(steps, train, **styles[run], alpha=0.15, linewidth=0.8)
        train = smoothed(train, width)
        axis.plot(steps, train, **styles[run], alpha=0.6, linewidth=1)
        axis.plot([row[x] for row in run.val], val, **styles[run], marker="o", markersize=4, linewidth=1.8)
        for rows, values in ((run.train, train), (run.val, val)):
            if values:
                lows.append(percentile(settled(run, rows, values), 0.01))
                highs.append(percentile(settled(run, rows, values), 0.98))
    margin = 0.07 * (max(highs) - min(lows)) or 0.07 * max(highs) or 1
    axis.set(ylabel=f"loss, {unit}", title="loss: training (thin) and validation (dots)",
             ylim=(min(lows) - margin, max(highs) + margin))


def plot_panel(axis, runs, styles, x, field, title, smooth):
    """Plots a field of the training rows over steps or tokens, from 0 on."""
    tops = []
    for run in runs:
        rows = [row for row in run.train if row.get(field) is not None]
        if not rows:
            continue
        values = [row[field] for row in rows]
        if field == "lr":
            tops.append(max(values))
        else:
            values = smoothed(values, smooth or max(1, len(values) // 50))
            tops.append(percentile(settled(run, rows, values), 0.99))
        axis.plot([row[x] for row in rows], values, **styles[run], linewidth=1)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, 1.1 * (max(tops, default=0) or 1))
    axis.tick_params(labelsize=8)


def draw(plt, runs, x, smooth):
    """Returns the figure. x: "step" or "tokens". smooth: steps to average, 0: 2% of each run."""
    from matplotlib.ticker import EngFormatter

    has_recall = any(run.recall for run in runs)
    figure = plt.figure(figsize=(15.5 if has_recall else 11, 5.5), layout="constrained")
    grid = figure.add_gridspec(3, 3 if has_recall else 2, width_ratios=([5.5, 4.5] if has_recall else [6.5]) + [4])
    loss_axis = figure.add_subplot(grid[:, 0])
    styles = {run: {"color": f"C{i % 10}", "linestyle": ["-", "--", ":"][i // 10 % 3]} for i, run in enumerate(runs)}
    plot_loss(loss_axis, runs, styles, x, smooth)
    panels = [("lr", "learning rate"), ("norm", "gradient norm"), ("tokens_per_second", "tokens per second")]
    axes = [loss_axis]
    for row, (field, title) in enumerate(panels):
        axis = figure.add_subplot(grid[row, -1], sharex=loss_axis)
        plot_panel(axis, runs, styles, x, field, title, smooth)
        axis.tick_params(labelbottom=row == len(panels) - 1)
        axes.append(axis)
    axes[1].yaxis.set_major_formatter("{x:.2g}")
    axes[3].yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (axes[0], axes[-1]):
        axis.set_xlabel("tokens trained on" if x == "tokens" else "step")
    if x == "tokens":
        loss_axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if has_recall:
        axis = figure.add_subplot(grid[:, 1])
        for run in runs:
            if run.recall:
                plot_recall(axis, run.recall[-1], **styles[run], marker="o", markersize=4)
        format_recall_axis(axis, max(run.recall[-1]["chance"] for run in runs if run.recall))
        axis.set_title("recall at the last validation")
        axes.append(axis)
    for axis in axes:
        axis.grid(alpha=0.3)
    lines = [plt.Line2D([], [], linewidth=2, **styles[run]) for run in runs]
    figure.legend(lines, [run.label for run in runs], loc="outside lower center", ncols=min(3, len(runs)))
    return figure


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("-o", default="runs.png", metavar="FILE", help="output picture (default: runs.png)")
    parser.add_argument("--smooth", type=int, default=0, metavar="N",
                        help="average training curves over N steps (default: 0, 2%% of each run)")
    parser.add_argument("--tokens", action="store_true", help="plot over tokens instead of steps")
    args = parser.parse_args()
    if args.smooth < 0:
        die(f"--smooth {args.smooth}: must be at least 1, or 0 for 2% of each run")
    runs = [read_run(argument) for argument in args.runs]
    for run in runs:  # NaN and Inf are null in the log
        if run.start.get("flags", {}).get("val"):
            die(f"{run.file}: is the log of -val 1, which has no training curve; drop this run")
        run.train = [row for row in run.train if row["loss"] is not None and math.isfinite(row["loss"])]
        run.val = [row for row in run.val if row["val_loss"] is not None]
        if not run.train and not run.val:
            die(f"{run.file}: all losses are NaN or Inf; drop this run")
    save_figure(draw(import_pyplot(), runs, "tokens" if args.tokens else "step", args.smooth), args.o)


if __name__ == "__main__":
    run_main(main, "nothing was written")
