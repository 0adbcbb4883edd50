"""repeated_text.py: how much of a run's held-out text stands word for word in its training text, and how far back in a
held-out document the same words stand:

    python3 dev/results/repeated_text.py data/linux

Prints the share of held-out tokens that lie in a passage of 32 and of 16 tokens of the training text, and the share of those that
end a passage of 16 tokens that stood before in the same document, by the distance to its nearest earlier copy. Passages
are compared by hashes of 64 bits. Needs NumPy.
"""

import glob
import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path.insert(0, os.path.join(ROOT, "data"))
from shards import FORMATS, HEADER_BYTES, Parser, die, run_main  # noqa: E402

DISTANCES = (1, 513, 6145, 16385, 65537)


def read_tokens(pattern):
    """Returns the tokens of all shards of a pattern."""
    import numpy as np

    files, parts = sorted(glob.glob(pattern)), []
    for file in files:
        magic = np.fromfile(file, "<i4", 2).tolist()
        sizes = [size for size, values in FORMATS.items() if list(values) == magic]
        if not sizes:
            die(f"{file}: not a shard; name the folder of shards that data/bpe made")
        parts.append(np.fromfile(file, f"<u{sizes[0]}", offset=HEADER_BYTES))
    if not files:
        die(f"{pattern}: no such file; name the folder of shards that data/bpe made")
    return np.concatenate(parts)


def hashes(tokens, length):
    """Returns a hash of each passage of `length` tokens, a power of two: [tokens - length + 1]."""
    import numpy as np

    result = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    factor, step = np.uint64(0xD1342543DE82EF95), 1
    with np.errstate(over="ignore"):
        while step < length:
            result = result[:-step] * factor + result[step:]
            result ^= result >> np.uint64(29)
            factor, step = factor * factor, 2 * step
    return result


def share_covered(val, train, length):
    """Returns the share of tokens of val that lie in a passage of train."""
    import numpy as np

    passages = hashes(val, length)
    known = np.unique(passages)
    found = np.zeros(len(known), bool)
    for begin in range(0, len(train), 1 << 24):
        part = hashes(train[begin : begin + (1 << 24) + length - 1], length)
        at = np.minimum(np.searchsorted(known, part), len(known) - 1)
        found[at[known[at] == part]] = True
    begins = np.flatnonzero(found[np.searchsorted(known, passages)])
    edges = np.zeros(len(val) + 1, np.int64)
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + length, -1)
    return np.count_nonzero(np.cumsum(edges)[:-1]) / len(val)


def copy_distances(val, eot, length):
    """Returns the distance from each passage of val to its nearest earlier copy in its document, where there is one."""
    import numpy as np

    document = np.cumsum(val == eot)
    passages = hashes(val, length)
    order = np.argsort(passages, kind="stable")  # copies side by side, in the order of the text
    a, b = order[:-1], order[1:]
    same = (passages[a] == passages[b]) & (document[a] == document[b])
    return (b - a)[same]


def main():
    parser = Parser(description="How much of a run's held-out text stands word for word in its training text.")
    parser.add_argument("folder", help="data/linux or another folder of shards")
    args = parser.parse_args()
    import numpy as np

    val = read_tokens(os.path.join(args.folder, "*_val_*.bin"))
    train = read_tokens(os.path.join(args.folder, "*_train_*.bin"))
    eot = int(np.fromfile(os.path.join(args.folder, "tokenizer.bin"), "<i4", 4)[3])
    print(f"held-out tokens: {len(val):,}, training tokens: {len(train):,}")
    for length in (32, 16):
        print(f"in a passage of {length} tokens of the training text: {100 * share_covered(val, train, length):.1f}%")
    distances = copy_distances(val, eot, 16)
    for begin, end in zip(DISTANCES, DISTANCES[1:]):
        count = np.count_nonzero((distances >= begin) & (distances < end))
        print(f"end a passage of 16 tokens that stands {begin:,} to {end - 1:,} tokens before: {100 * count / len(val):.1f}%")


if __name__ == "__main__":
    run_main(main, interrupted="start again")
