"""Plots how often a model finds a needle, by the length of the context and the depth of the needle: a heat map for
each run and each file of -needle.

    python3 scripts/plot_needle.py log/nsa log/full log/window -o needle.png     (needs Matplotlib)

The numbers are those of the last validation in the log.jsonl of each run. Depth 0 is the beginning of the context.
NAME=FOLDER sets the name of a run. -val 1 -needle FILE -o FOLDER writes such a log for a checkpoint.
"""
import argparse

from train_log import Parser, die, import_pyplot, read_run, run_main, save_figure


def last_needles(run):
    """Returns {name of a file: its last row}."""
    return {row["needle"]: row for row in run.needles}


def draw(plt, runs):
    """Returns the figure: a row of heat maps for each file, a column for each run."""
    needles = [last_needles(run) for run in runs]
    files = sorted({name for of_run in needles for name in of_run})
    size = (max(3.2 * len(runs), 4.5) + 0.8, 2.9 * len(files) + 0.4)
    figure, axes = plt.subplots(len(files), len(runs), figsize=size, squeeze=False, layout="constrained")
    for y, name in enumerate(files):
        for x, run in enumerate(runs):
            axis, row = axes[y, x], needles[x].get(name)
            if row is None:
                axis.set_visible(False)
                continue
            cells = {(c["depth"], c["length"]): 100 * c["right"] / c["asked"] for c in row["cells"]}
            depths, lengths = (sorted({cell[i] for cell in cells}) for i in (0, 1))
            values = [[cells.get((d, n), float("nan")) for n in lengths] for d in depths]
            image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
            axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
            axis.set_title(f"{run.label}, step {row['step']}\n{name}, keys: {row['keys']}", fontsize=9)
            axis.set(xlabel="length, tokens", ylabel="depth" if x == 0 else "")
            if len(lengths) * len(depths) <= 120:
                for i, line in enumerate(values):
                    for j, value in enumerate(line):
                        if value == value:  # not NaN
                            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, label="found, %")
    return figure


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("-o", default="needle.png", metavar="FILE", help="output picture (default: needle.png)")
    args = parser.parse_args()
    runs = [read_run(argument) for argument in args.runs]
    for run in runs:
        if not run.needles:
            die(f"{run.file}: has no needles; validate with -needle")
    save_figure(draw(import_pyplot(), runs), args.o)


if __name__ == "__main__":
    run_main(main, "nothing was written")
