"""Plots recall accuracy by distance. Each context has a panel; each attention mode has a line.

    python3 scripts/plot_recall.py log/recall_*_nsa log/recall_*_full log/recall_*_window -o recall.png

The accuracy is that of the last validation in the log.jsonl of each run. The context and the mode are those of
the log; for an old log those of the folder's name, _CONTEXT_MODE at its end. Needs Matplotlib.
"""
import argparse
import math
import re

from train_log import Parser, die, format_recall_axis, import_pyplot, plot_recall, read_run, run_main, save_figure

COLORS = {"nsa": "C0", "full": "C1", "window": "C2"}


def context_and_mode(folder, run):
    if run.start:
        return run.start["flags"]["t"], run.start["model"]["attn"]
    found = re.search(r"_(\d+)_(nsa|full|window)$", run.name)
    if not found:
        die(f"{folder}: its log does not tell the context and the attention mode; name the folder "
            "NAME_CONTEXT_MODE, such as recall_1024_nsa")
    return int(found[1]), found[2]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER")
    parser.add_argument("-o", default="recall.png", metavar="FILE", help="output picture (default: recall.png)")
    args = parser.parse_args()
    panels = {}
    for folder in args.runs:
        run = read_run(folder)
        context, mode = context_and_mode(folder, run)
        if not run.recall:
            die(f"{folder}: its log has no recall; validate on recall shards (-j)")
        if mode in panels.setdefault(context, {}):
            die(f"{folder}: a second run with context {context} and mode {mode}; give one of them")
        panels[context][mode] = run.recall[-1]
    plt = import_pyplot()

    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4 * columns, 5), 3.2 * rows + 0.4), squeeze=False,
                                sharey=True, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, context in zip(axes.flat, sorted(panels)):
        for mode, color in COLORS.items():
            if mode in panels[context]:
                plot_recall(axis, panels[context][mode], color=color, marker="o", markersize=3)
        format_recall_axis(axis, max(row["chance"] for row in panels[context].values()))
        axis.set_title(f"context {context:,}")
        axis.grid(alpha=0.3)
        if axis not in axes[:, 0]:
            axis.set_ylabel("")
    modes = [mode for mode in COLORS if any(mode in panel for panel in panels.values())]
    lines = [plt.Line2D([], [], color=COLORS[mode], marker="o", markersize=3) for mode in modes]
    figure.legend(lines, modes, loc="outside lower center", ncols=3)
    save_figure(figure, args.o)


if __name__ == "__main__":
    run_main(main, "nothing was written")
