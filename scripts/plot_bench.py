"""Plots the attention's time against sequence length, from the lines that the programs of dev/cuda record.

    python3 scripts/plot_bench.py dev/results/h200.jsonl -o bench.png     (needs Matplotlib)

One picture a direction: milliseconds over tokens for (32, 8) heads of 128 in bf16, blocks of 64, topk 16, one sequence,
window 512, newest line of each: the whole native sparse attention and full attention, with what published kernels take
on an H200 as dashed lines.
"""
import argparse
import json
import sys

# Measured on one H200, PyTorch 2.11, Triton 3.6: tokens -> ms forward, backward. flash_nsa:
# mdy666/Scalable-Flash-Native-Sparse-Attention, with mean compression. cuDNN: full attention through PyTorch.
PUBLISHED = {
    "flash_nsa, whole NSA": {8192: (4.34, 6.37), 16384: (8.70, 13.1), 32768: (20.3, 29.0), 65536: (48.7, 67.9),
                             131072: (132, 173)},
    "cuDNN, full": {8192: (0.97, 2.99), 16384: (3.43, 10.3), 32768: (14.8, 40.9), 65536: (58.6, 163),
                    131072: (248, 656)},
    "FSA's Triton code, selected branch alone": {8192: (11.9, 12.0), 32768: (19.9, 22.6), 65536: (37.8, 36.6)},
}
OURS = {"core": "ours, whole NSA", "full": "ours, full", "sel": "ours, selected branch alone"}
SHAPE = {"hq": 32, "hkv": 8, "d": 128, "block": 64, "topk": 16, "dtype": "bf16"}
RARE = {"l": 32, "s": 16, "W": 512, "sequences": 1, "indices": "random", "version": "library"}  # written where not these


def die(message):
    sys.exit("error: " + message)


def read(path):
    """{part: {n: {direction: ms}}}, the newest line of each."""
    times = {}
    try:
        with open(path) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    die(f"{path}: line {number} is not JSON")
                wanted = all(row.get(key) == value for key, value in SHAPE.items())
                usual = all(row.get(key, value) == value for key, value in RARE.items())
                if row.get("part") in OURS and row.get("dir") in ("fwd", "bwd") and wanted and usual:
                    times.setdefault(row["part"], {}).setdefault(row["n"], {})[row["dir"]] = row["ms"]
    except OSError as e:
        die(f"{path}: {e.strerror}")
    if not times:
        die(f"{path}: no line of {', '.join(OURS)} for (32, 8) heads; `make bench` on a GPU writes them")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="GPU.jsonl")
    parser.add_argument("-o", default="bench.png", metavar="FILE", help="picture to write (default: bench.png)")
    args = parser.parse_args()
    times = read(args.results)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("Matplotlib is missing: pip install matplotlib")

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    lengths = sorted({n for part in times.values() for n in part} | {n for p in PUBLISHED.values() for n in p})
    for axis, direction, title in zip(axes, ("fwd", "bwd"), ("forward", "backward")):
        for i, (part, label) in enumerate(OURS.items()):
            points = sorted((n, ms[direction]) for n, ms in times.get(part, {}).items() if direction in ms)
            if points:
                axis.plot(*zip(*points), marker="o", color=colors[i], label=label)
        for i, (label, points) in enumerate(PUBLISHED.items()):
            ms = [pair[direction == "bwd"] for pair in points.values()]
            axis.plot(list(points), ms, "--", marker=".", linewidth=1, color=colors[len(OURS) + i], label=label)
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
