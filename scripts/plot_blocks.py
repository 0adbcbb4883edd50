"""Plots which blocks the layers of a model select: how far they are, how many different ones neighbouring queries
select, and how often block 0 is among them; with several files, over training.

    for step in 00000500 00001000; do
        ./train_gpt_nsa -e log/run/ckpt_$step.bin -val 1 -m 1 -j 'data/mine/mine_val_*.bin' -block-indices blocks_$step.bin
    done
    python3 scripts/plot_blocks.py blocks_*.bin -o blocks.png       (needs NumPy and Matplotlib)

A file is written by -block-indices; its step is the last number in its name. Only queries with more blocks before them
than they select are counted. A free block is one that is not selected in any case: the first --init-blocks and the nearest
--local-blocks, which the trainer's flags of the same names set. The distance is from the query's block to the free one.
Layers of full attention (-full-every) select no blocks; they stay empty. Dashed lines, and the lines "random blocks", are
what the same queries would have if their free blocks were random, each with the same probability.
"""
import argparse
import os
import re
import struct

from train_log import Parser, die, import_pyplot, run_main, save_figure

MAGIC = b"nsachose"  # llmc/block_indices.h
GROUPS = (8, 16, 32, 64)  # neighbouring queries


class Selection:
    """What one file has.

    Attributes:
        step: of the file's name.
        free: free blocks of a query.
        selects: [layers] whether the layer selects blocks; in the arrays below, the other layers are NaN.
        distances: [layers, number of distances] free blocks at 1, 2 to 3, 4 to 7, ... blocks before the query's.
        distinct: [layers, len(GROUPS)] different free blocks of so many neighbouring queries, on average.
        block0: [layers] share of the queries that select block 0.
        median: [layers] distance of the free blocks in tokens.
        random_median, random_distinct: the expected median, and [len(GROUPS)] distinct, of random free blocks.
    """

    def __init__(self, path, init_blocks, local_blocks):
        import numpy as np

        numbers = re.findall(r"\d+", os.path.basename(path))
        if not numbers:
            die(f"{path}: the name has no step number; name it after its step, such as blocks_00001000.bin")
        self.path, self.step = path, int(numbers[-1])
        self._read(np)
        if init_blocks + local_blocks >= self.topk:
            die(f"--init-blocks {init_blocks} --local-blocks {local_blocks}: {path} has {self.topk} blocks of a query, so "
                f"none is free; give the model's flags")
        self.free = self.topk - init_blocks - local_blocks
        self._count(np, init_blocks, local_blocks)

    def _read(self, np):
        try:
            with open(self.path, "rb") as f:
                header = f.read(64)
                if len(header) < 64 or header[:8] != MAGIC:
                    die(f"{self.path}: not a file of block indices; write one with train_gpt_nsa -val 1 -block-indices FILE")
                self.layers, _, self.heads, n, self.topk, self.block, seqs = struct.unpack("<7q", header[8:])
                size = 64 + 8 * seqs + 4 * self.layers * self.heads * n * self.topk
                if min(self.layers, self.heads, n, self.topk, self.block, seqs) < 1 or os.fstat(f.fileno()).st_size != size:
                    die(f"{self.path}: its size is not that of its header; write it again")
                self.lengths = np.frombuffer(f.read(8 * seqs), "<i8")
                self.indices = np.memmap(self.path, "<i4", "r", 64 + 8 * seqs, (self.layers, self.heads, n, self.topk))
        except OSError as e:
            die(f"{self.path}: {e.strerror}; check the path")
        if self.lengths.min() < 1 or self.lengths.sum() != n:
            die(f"{self.path}: its sequences do not have as many tokens as its header says; write it again")
        self.positions = np.concatenate([np.arange(length) for length in self.lengths])

    def _groups(self, np, size):
        """Returns the first queries of the groups of neighbours in a sequence that have a choice."""
        starts, begin = [], 0
        for length in self.lengths:
            first = -(-self.topk * self.block // size) * size  # a position
            starts.append(begin + np.arange(first, length - size + 1, size))
            begin += length
        return np.concatenate(starts)

    def _count(self, np, init_blocks, local_blocks):
        own = self.positions // self.block
        chosen = self.positions >= self.topk * self.block
        if not chosen.any():
            die(f"{self.path}: its sequences have at most {self.lengths.max()} tokens, so that all queries select all blocks; "
                f"validate with more than {self.topk * self.block} tokens (-t)")
        columns = int(own.max()).bit_length() + 1
        self.distances, self.distinct = np.zeros((self.layers, columns)), np.zeros((self.layers, len(GROUPS)))
        self.block0, self.median = np.zeros(self.layers), np.zeros(self.layers)
        self.selects = self.indices[:, 0, 0, 0] >= 0  # the first query selects its own block
        if not self.selects.any():
            die(f"{self.path}: no layer selects blocks; write it again")
        for values in (self.distances, self.distinct, self.block0, self.median):
            values[~self.selects] = np.nan
        groups = [self._groups(np, size) for size in GROUPS]
        for layer in np.flatnonzero(self.selects):
            found = np.zeros(int(own.max()) + 1, np.int64)  # by distance in blocks
            for head in range(self.heads):
                selected = np.array(self.indices[layer, head])
                self.block0[layer] += (selected[chosen] == 0).any(axis=1).mean() / self.heads
                not_free = (selected < init_blocks) | (selected > own[:, None] - local_blocks)
                selected[not_free] = -1
                distances = (own[:, None] - selected)[chosen[:, None] & (selected >= 0)]
                found += np.bincount(distances, minlength=len(found))
                for i, (size, starts) in enumerate(zip(GROUPS, groups)):
                    if len(starts) == 0:
                        self.distinct[layer, i] = np.nan
                        continue
                    rows = selected[starts[:, None] + np.arange(size)].reshape(len(starts), -1)
                    rows.sort(axis=1)
                    new = (rows >= 0) & (np.diff(rows, axis=1, prepend=-1) != 0)
                    self.distinct[layer, i] += new.sum(axis=1).mean() / self.heads
            for blocks, count in enumerate(found):
                self.distances[layer, max(0, blocks.bit_length() - 1)] += count
            self.median[layer] = self._median(np, found)
        self._count_random(np, own - init_blocks - local_blocks + 1, chosen, groups, local_blocks)

    def _median(self, np, found):
        """Returns the median distance in tokens of found [distance in blocks]."""
        return self.block * np.searchsorted(np.cumsum(found), found.sum() / 2)

    def _count_random(self, np, candidates, chosen, groups, local_blocks):
        """Computes what random free blocks would give, where a query [n] has so many candidates for them."""
        found = np.zeros(int(candidates.max()) + local_blocks)
        for count, queries in zip(*np.unique(candidates[chosen], return_counts=True)):
            found[local_blocks : local_blocks + count] += queries / count
        self.random_median = self._median(np, found)
        self.random_distinct = np.full(len(GROUPS), np.nan)
        for i, (size, starts) in enumerate(zip(GROUPS, groups)):
            if len(starts) > 0:
                # candidates of query j of a group that are none of the queries before it, and the probability that neither
                # j nor a later query selects such a block
                counts = candidates[starts[:, None] + np.arange(size)]
                new = np.diff(counts, axis=1, prepend=0)
                missed = np.cumprod((1 - self.free / counts)[:, ::-1], axis=1)[:, ::-1]
                self.random_distinct[i] = (new * (1 - missed)).sum(axis=1).mean()

    def mean(self, values):
        """Returns the mean of values [layers, ...] over the layers that select blocks."""
        return values[self.selects].mean(axis=0)


def describe_free(median, distinct):
    """Returns a text with the numbers of free blocks."""
    return (f"median distance {median:,.0f} tokens; distinct free blocks of {', '.join(map(str, GROUPS))} queries: "
            f"{', '.join(f'{value:.1f}' for value in distinct)}")


def describe(s):
    """Returns two lines about a file: averages over its layers, and the numbers of random blocks."""
    return (f"step {s.step}: {describe_free(s.mean(s.median), s.mean(s.distinct))} ({s.free} a query); "
            f"block 0: {s.mean(s.block0):.1%} of the queries\n"
            f"  random blocks: {describe_free(s.random_median, s.random_distinct)}")


def draw_last(axes, s):
    """Draws the layers of the last file."""
    from matplotlib.ticker import MaxNLocator

    share = 100 * s.distances / s.distances.sum(axis=1, keepdims=True)
    image = axes[0].imshow(share, aspect="auto", cmap="viridis", vmin=0)
    axes[0].figure.colorbar(image, ax=axes[0], label="free blocks of the layer, %")
    axes[0].set_xticks(range(share.shape[1]), [f"{s.block << i:,}" for i in range(share.shape[1])], rotation=45, fontsize=8)
    axes[0].set(xlabel="distance from, tokens", ylabel="layer", title=f"distances, step {s.step}")
    layers = range(s.layers)
    for i, size in enumerate(GROUPS):
        axes[1].plot(layers, s.distinct[:, i], marker="o", markersize=3, label=f"{size} queries")
        axes[1].axhline(s.random_distinct[i], color=f"C{i}", linestyle="--", linewidth=0.8)
    axes[1].axhline(s.free, color="grey", linestyle=":", label="one query")
    axes[1].plot([], [], color="grey", linestyle="--", linewidth=0.8, label="random blocks")
    axes[1].set(xlabel="layer", ylabel="distinct free blocks", title=f"overlap of neighbours, step {s.step}", ylim=(0, None))
    axes[1].legend(fontsize=8)
    axes[2].plot(layers, 100 * s.block0, marker="o", markersize=3)
    axes[2].set(xlabel="layer", ylabel="queries that select it, %", title=f"block 0, step {s.step}", ylim=(-2, 102))
    for axis in (axes[0].yaxis, axes[1].xaxis, axes[2].xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def draw_training(axes, selections):
    """Draws the averages of the layers over the steps; thin lines are the layers, dashed ones random blocks."""
    steps = [s.step for s in selections]
    for layer in range(selections[0].layers):
        axes[0].plot(steps, [s.median[layer] for s in selections], color="C0", alpha=0.3, linewidth=0.8)
        axes[2].plot(steps, [100 * s.block0[layer] for s in selections], color="C0", alpha=0.3, linewidth=0.8)
    axes[0].plot(steps, [s.mean(s.median) for s in selections], color="C0", marker="o")
    axes[0].plot(steps, [s.random_median for s in selections], color="C0", linestyle="--", linewidth=0.8)
    axes[0].set(xlabel="step", ylabel="median distance, tokens", title="distance over training")
    for i, size in enumerate(GROUPS):
        axes[1].plot(steps, [s.mean(s.distinct)[i] for s in selections], marker="o", markersize=3, label=f"{size} queries")
        axes[1].plot(steps, [s.random_distinct[i] for s in selections], color=f"C{i}", linestyle="--", linewidth=0.8)
    axes[1].set(xlabel="step", ylabel="distinct free blocks", title="overlap over training", ylim=(0, None))
    axes[2].plot(steps, [100 * s.mean(s.block0) for s in selections], color="C0", marker="o")
    axes[2].set(xlabel="step", ylabel="queries that select it, %", title="block 0 over training", ylim=(-2, 102))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", default="blocks.png", metavar="FILE", help="output picture (default: blocks.png)")
    parser.add_argument("--init-blocks", type=int, default=1, metavar="N", help="-init-blocks of the model (default: 1)")
    parser.add_argument("--local-blocks", type=int, default=2, metavar="N", help="-local-blocks of the model (default: 2)")
    args = parser.parse_args()
    if args.init_blocks < 0 or args.local_blocks < 0:
        die(f"--init-blocks {args.init_blocks} --local-blocks {args.local_blocks}: must not be negative")
    plt = import_pyplot()
    selections = sorted((Selection(path, args.init_blocks, args.local_blocks) for path in args.files), key=lambda s: s.step)
    for s in selections[1:]:
        if s.layers != selections[0].layers:
            die(f"{s.path}: has {s.layers} layers, {selections[0].path} {selections[0].layers}; give files of one run")
    for s in selections:
        print(describe(s))
    rows = 2 if len(selections) > 1 else 1
    figure, axes = plt.subplots(rows, 3, figsize=(15, 4.2 * rows), squeeze=False, layout="constrained")
    draw_last(axes[0], selections[-1])
    if rows == 2:
        draw_training(axes[1], selections)
    for axis in axes.flat[1:]:
        axis.grid(alpha=0.3)
    save_figure(figure, args.o)


if __name__ == "__main__":
    run_main(main, "nothing was written")
