"""Plots recall accuracy by distance. Each context has a panel; each attention mode has a line.

    python3 scripts/plot_recall.py log/recall_*_nsa log/recall_*_full log/recall_*_window -o recall.png

The accuracy is that of the last validation in the log.jsonl of each run. Folder names must end in
_CONTEXT_MODE, like those of scripts/recall.sh. Needs Matplotlib.
"""
import argparse
import math
import re

from plot_log import die, read_run


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER")
    parser.add_argument("-o", default="recall.png", metavar="FILE",
                        help="output picture (default: recall.png)")
    args = parser.parse_args()
    panels = {}
    for folder in args.runs:
        name, _, _, recall = read_run(folder)
        found = re.search(r"_(\d+)_(nsa|full|window)$", name)
        if not found:
            die(f"{folder}: must end in _CONTEXT_MODE, such as recall_1024_nsa")
        if not recall:
            die(f"{folder}: its log has no recall; validate on recall shards (-j)")
        panels.setdefault(int(found[1]), {})[found[2]] = recall
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("Matplotlib is missing; run pip install matplotlib")

    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, context in zip(axes.flat, sorted(panels)):
        for mode, color in (("nsa", "C0"), ("full", "C1"), ("window", "C2")):
            if mode not in panels[context]:
                continue
            recall = panels[context][mode]
            buckets = [b for b in recall["recall"] if b["asked"]]
            axis.plot([b["from"] * math.sqrt(2) for b in buckets],
                      [100 * b["right"] / b["asked"] for b in buckets], color=color, marker="o", markersize=3,
                      label=mode)
        axis.axhline(100 * recall["chance"], color="grey", linestyle=":", label="chance")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(title=f"context {context:,}", xlabel="distance, tokens", ylim=(0, 102))
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("recalled, %")
    axes[0][0].legend(loc="center right")
    figure.tight_layout()
    try:
        figure.savefig(args.o, dpi=150)
    except (OSError, ValueError) as e:
        die(f"-o {args.o}: {getattr(e, 'strerror', None) or e}")
    print(f"wrote {args.o}")


if __name__ == "__main__":
    main()
