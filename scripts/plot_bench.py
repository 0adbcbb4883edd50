"""Plots the time of the attention against the sequence length, from the results of the programs in dev/cuda.

    python3 scripts/plot_bench.py dev/results/h200.jsonl -o bench.png     (needs Matplotlib)

Forward and backward have a panel each: milliseconds over tokens for (32, 8) heads of 128, bf16, one sequence,
blocks of 64, topk 16, window 512. Lines show the whole native sparse attention, full attention and the
selected branch, from the newest results. Dashed lines show published kernels on an H200.
"""
import argparse
import json
import sys

# {tokens: (forward ms, backward ms)} on one H200, PyTorch 2.11, Triton 3.6. flash_nsa is
# mdy666/Scalable-Flash-Native-Sparse-Attention with mean compression. cuDNN is called through PyTorch.
PUBLISHED = {
    "flash_nsa, whole NSA": {8192: (4.34, 6.37), 16384: (8.70, 13.1), 32768: (20.3, 29.0),
                             65536: (48.7, 67.9), 131072: (132, 173)},
    "cuDNN, full": {8192: (0.97, 2.99), 16384: (3.43, 10.3), 32768: (14.8, 40.9), 65536: (58.6, 163),
                    131072: (248, 656)},
    "FSA's Triton code, selected branch alone": {8192: (11.9, 12.0), 32768: (19.9, 22.6),
                                                 65536: (37.8, 36.6)},
}
OURS = {"core": "ours, whole NSA", "full": "ours, full", "sel": "ours, selected branch alone"}
SHAPE = {"hq": 32, "hkv": 8, "d": 128, "block": 64, "topk": 16, "dtype": "bf16"}
# Rows omit fields with these values.
DEFAULTS = {"l": 32, "s": 16, "W": 512, "sequences": 1, "indices": "random", "version": "library"}


def die(message):
    sys.exit("error: " + message)


def read(path):
    """Returns {part: {n: {direction: ms}}} with the newest result of each."""
    times = {}
    try:
        with open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    die(f"{path}: line {number} is not JSON; remove it")
                matches = all(row.get(key) == value for key, value in SHAPE.items())
                default = all(row.get(key, value) == value for key, value in DEFAULTS.items())
                if row.get("part") in OURS and row.get("dir") in ("fwd", "bwd") and matches and default:
                    times.setdefault(row["part"], {}).setdefault(row["n"], {})[row["dir"]] = row["ms"]
    except OSError as e:
        die(f"{path}: {e.strerror}")
    if not times:
        die(f"{path}: no result of {', '.join(OURS)} for (32, 8) heads; run make bench on a GPU")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="GPU.jsonl")
    parser.add_argument("-o", default="bench.png", metavar="FILE", help="output picture (default: bench.png)")
    args = parser.parse_args()
    times = read(args.results)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("Matplotlib is missing; run pip install matplotlib")

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    lengths = sorted({n for part in times.values() for n in part}
                     | {n for part in PUBLISHED.values() for n in part})
    for axis, direction, title in zip(axes, ("fwd", "bwd"), ("forward", "backward")):
        for i, (part, label) in enumerate(OURS.items()):
            points = sorted((n, ms[direction]) for n, ms in times.get(part, {}).items() if direction in ms)
            if points:
                axis.plot(*zip(*points), marker="o", color=colors[i], label=label)
        for i, (label, points) in enumerate(PUBLISHED.items()):
            ms = [pair[direction == "bwd"] for pair in points.values()]
            axis.plot(list(points), ms, "--", marker=".", linewidth=1, color=colors[len(OURS) + i],
                      label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        axis.set_title(title)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.o, dpi=120)
    print(args.o)


if __name__ == "__main__":
    main()
