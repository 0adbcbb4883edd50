#!/usr/bin/env python3
"""times.py: writes the tables of measured times into the pages of this folder, from the rows of dev/results/*.jsonl.

    python3 fsa/docs/times.py           rewrites the tables
    python3 fsa/docs/times.py --check   fails if a page's table differs from the rows

A page has the table between <!-- times --> and <!-- /times -->. TABLES states its columns and rows. A cell is the
median of all rows of bf16 inputs and random block indices that match the column and the shape.
"""

import json
import os
import re
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "..", "..", "dev", "results")

sys.path.insert(0, RESULTS)
import performance

# A source of rows: file and commit. The programs of single kernels were run less often than `core`.
H100, H200 = "h100.jsonl b7e2b0a", "h200.jsonl d0f31a2"
H200_CORE = " ".join(performance.MEASURED["H200"])
# Shapes: (tokens, query heads, KV heads, d, B, T).
DENSE = [(8192, 32, 8, 128, 64, 16), (32768, 32, 8, 128, 64, 16), (65536, 32, 8, 128, 64, 16),
         (65536, 32, 32, 128, 64, 16), (65536, 64, 4, 128, 64, 16), (65536, 32, 8, 64, 64, 16)]
SELECTED = [(8192, 32, 8, 128, 64, 16), (65536, 32, 8, 128, 64, 16), (65536, 32, 32, 128, 64, 16),
            (65536, 64, 4, 128, 64, 16), (65536, 32, 8, 128, 128, 8), (65536, 32, 32, 128, 128, 8)]
TOPK = [(8192, 32, 8, 128, 64, 16), (32768, 32, 8, 128, 64, 16), (65536, 32, 8, 128, 64, 16),
        (65536, 32, 32, 128, 64, 16), (65536, 64, 4, 128, 64, 16)]
LISTS = [(8192, 32, 8, 128, 64, 16), (32768, 32, 8, 128, 64, 16), (65536, 32, 8, 128, 64, 16),
         (65536, 32, 32, 128, 64, 16)]
COMPRESS = LISTS + [(65536, 64, 4, 128, 64, 16)]

# Page -> shapes, columns. A column: source, program, part, direction, version of the kernel, heading.
TABLES = {
    "dense_fwd.md": (DENSE, [(source, "dense_forward", part, "fwd", "library", heading)
                             for source in (H100, H200)
                             for part, heading in (("full", "causal"), ("cmp", "compressed"), ("win", "window 512"))]),
    "dense_bwd.md": (DENSE, [(source, "dense_backward", part, "bwd", "library", heading)
                             for source in (H100, H200)
                             for part, heading in (("full", "causal"), ("cmp", "compressed"), ("win", "window 512"))]),
    "selected_fwd.md": (SELECTED, [(H100, "selected", "sel", "fwd", "library", "selected branch"),
                                   (H200_CORE, "core", "sel", "fwd", "library", "selected branch")]),
    "selected_bwd.md": (SELECTED, [(H100, "selected", "sel", "bwd", "library", "selected branch"),
                                   (H200_CORE, "core", "sel", "bwd", "library", "selected branch")]),
    "topk.md": (TOPK, [(H100, "topk", "topk", "fwd", "library", "block selection"),
                       (H200_CORE, "core", "topk", "fwd", "library", "block selection")]),
    "sm80.md": (TOPK, [(source, "topk", "topk", "fwd", "portable", "block selection") for source in (H100, H200)]),
    "query_lists.md": (LISTS, [(source, "lists", "lists", "fwd", "library", "query lists")
                               for source in (H100, H200)]),
    "compress.md": (COMPRESS, [(source, program, "compress", direction, "library", heading + ", " + name)
                               for source in (H100, H200)
                               for program, heading in (("compress", "linear"), ("compress mean", "mean"))
                               for direction, name in (("fwd", "forward"), ("bwd", "backward"))]),
    "gate.md": ([LISTS[0], LISTS[2]], [(source, "gate", "gate", "bwd", "library", "gate backward")
                                       for source in (H100, H200)]),
}


def read_rows(name, cache={}):
    if name not in cache:
        with open(os.path.join(RESULTS, name)) as f:
            cache[name] = [json.loads(line) for line in f if line.strip()]
    return cache[name]


def milliseconds(column, shape):
    source, program, part, direction, version, _ = column
    name, commit = source.split()
    values = [r["ms"] for r in read_rows(name)
              if (r["commit"], r["program"], r["part"], r["dir"], r.get("version")) ==
              (commit, program, part, direction, version)
              and (r["n"], r["hq"], r["hkv"], r["d"], r["block"], r["topk"]) == shape
              and r["dtype"] == "bf16" and r.get("indices", "random") == "random"]
    return statistics.median(values) if values else None


def format_ms(ms):
    return "" if ms is None else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def table(page):
    shapes, columns = TABLES[page]
    def heading(column):
        name, commit = column[0].split()
        return f"{column[5]} ({name.split('.')[0].split('_')[0].upper()}, {commit})"
    lines = ["| tokens, (Hq, Hkv), d, (B, T) | " + " | ".join(map(heading, columns)) + " |",
             "| --- |" + " --- |" * len(columns)]
    for shape in shapes:
        n, hq, hkv, d, block, topk = shape
        cells = [format_ms(milliseconds(c, shape)) for c in columns]
        if any(cells):
            lines.append(f"| {n // 1024}K, ({hq}, {hkv}), {d}, ({block}, {topk}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    check, stale = "--check" in sys.argv[1:], 0
    for page in TABLES:
        path = os.path.join(HERE, page)
        with open(path) as f:
            old = f.read()
        new, count = re.subn(r"(<!-- times -->\n).*?(<!-- /times -->)",
                             lambda m: m[1] + table(page) + "\n" + m[2], old, flags=re.S)
        if count != 1:
            sys.exit(f"error: {path}: has {count} tables of times; must have one, between <!-- times --> and <!-- /times -->")
        if new != old and check:
            print(f"{path}: the table of times differs from dev/results; run python3 fsa/docs/times.py")
            stale = 1
        if new != old and not check:
            with open(path, "w") as f:
                f.write(new)
    return stale


if __name__ == "__main__":
    sys.exit(main())
