"""Reads the trainer's log.jsonl for the programs in this folder. README.md describes the file."""

import contextlib
import datetime
import json
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../data"))
from shards import Parser, die, run_main  # noqa: E402, F401


class Run:
    """A training run. `start` is the object of the last "start" line, {} in old logs. The rows of `train`,
    `val`, `positions`, `gates`, `recall`, `choices` (multiple choice) and `needles` are lines of the log, in the
    order of their steps, with these fields besides: "tokens" (old logs lack it) and "time" (seconds since 1970)."""

    def __init__(self, name, file):
        self.name, self.file = name, file
        self.start, self.first_date = {}, None
        self.train, self.val = [], []
        self.positions, self.recall = [], []  # by the position in the document, by distance
        self.choices, self.needles = [], []  # of one or several files
        self.gates = []  # mean gates [layer][compressed, selected, sliding]

    def drop(self, step, keep_equal):
        """Drops rows of a part of the run that was trained again, from `step` on."""
        for rows in (self.train, self.val, self.positions, self.recall, self.gates, self.choices, self.needles):
            while rows and (rows[-1]["step"] > step or (rows[-1]["step"] == step and not keep_equal)):
                rows.pop()

    def add(self, row):
        step = row["step"]
        if "start" in row:
            self.drop(step, keep_equal=True)
            self.start = row["start"]
            self.first_date = self.first_date or self.start["date"]
            row["time"] = datetime.datetime.fromisoformat(self.start["date"].replace("Z", "+00:00")).timestamp()
            return
        if "loss" in row:
            self.drop(step, keep_equal=False)  # a validation belongs after the step of its number
            self.train.append(row)
        for key, rows in (("val_loss", self.val), ("position_loss", self.positions), ("gates", self.gates), ("recall", self.recall)):
            if key in row:
                while rows and rows[-1]["step"] >= step:
                    rows.pop()
                rows.append(row)
        for key, rows in (("multiple_choice", self.choices), ("needle", self.needles)):
            if key in row:  # each file has one row of a step, the last one
                rows[:] = [r for r in rows if r["step"] < step or (r["step"] == step and r[key] != row[key])]
                rows.append(row)

    @property
    def label(self):
        """The name, and the data and the attention mode if the log tells."""
        pattern, attn = self.start.get("flags", {}).get("i"), self.start.get("model", {}).get("attn")
        shards = os.path.basename(pattern or "")
        data = re.match(r"(.+?)_train", shards) or re.match(r"(\w+)", os.path.basename(os.path.dirname(pattern or "")))
        return ": ".join(t for t in (self.name, ", ".join(t for t in (data and data[1], attn) if t)) if t)

    @property
    def bits_per_byte(self):
        """What a loss in nats per token is multiplied by to be in bits per byte, or None. It is that of the
        last validation."""
        for row in reversed(self.val):
            if row.get("val_bits_per_byte") and row["val_loss"]:
                return row["val_bits_per_byte"] / row["val_loss"]
        return None


def fill_tokens_and_times(run, rows):
    """Adds "tokens" and "time". A step's time is the log's; validations and checkpoints take none."""
    tokens = elapsed = 0
    begin = None
    for row in rows:
        if "start" in row:
            begin, elapsed = row["time"], 0
        elif "loss" in row:
            elapsed += row["ms"] / 1000
            tokens += row["tokens_per_second"] * row["ms"] / 1000
        row["elapsed"], row["begin"] = elapsed, begin
        tokens = row.setdefault("tokens", round(tokens))
    written = os.path.getmtime(run.file)
    for row in rows:
        begin = row.pop("begin")
        row["time"] = (written - elapsed if begin is None else begin) + row.pop("elapsed")


def read_rows(file):
    """Returns the lines of a log. The last one is left out if it is incomplete: the run is being written, or
    was killed."""
    rows = []
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            text = lines.read()
    except OSError as e:
        die(f"{file}: {e.strerror}; give an output folder (-o) of the trainer or its log.jsonl")
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            break  # empty, or without its end
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError
        except ValueError:
            die(f"{file}: line {number} is not a line of a training log; remove it")
        rows.append(row)
    return rows


def read_run(argument):
    """Returns the Run of an argument FOLDER, FOLDER/log.jsonl or NAME=FOLDER."""
    name, _, path = ("", "", argument) if os.path.exists(argument) else argument.rpartition("=")
    file = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
    run = Run(name or os.path.basename(os.path.dirname(os.path.abspath(file))), file)
    rows = read_rows(file)
    for row in rows:
        run.add(row)
    fill_tokens_and_times(run, rows)
    if not any((run.train, run.val, run.choices, run.needles)):
        die(f"{file}: has no losses and no answers; name the folder of a run that has trained or validated")
    return run


def loss_scales(runs):
    """Returns ({run: factor}, unit) of the losses: bits per byte if the tokenizers differ."""
    tokenizers = {run.start.get("tokenizer") for run in runs} - {None}
    vocabularies = {run.start.get("model", {}).get("vocab") for run in runs} - {None}
    if len(tokenizers) > 1 or len(vocabularies) > 1:
        without = [run.name for run in runs if not run.bits_per_byte]
        if not without:
            return {run: run.bits_per_byte for run in runs}, "bits per byte"
        print(f"note: the runs have different tokenizers, but {', '.join(without)} logged no bits per byte: "
              "the losses cannot be compared", file=sys.stderr)
    return {run: 1 for run in runs}, "nats per token"


def save_figure(figure, file):
    suffix = os.path.splitext(file)[1][1:]
    if not suffix or os.path.isdir(file):
        die(f"-o {file}: must be a file with a suffix, such as plot.png or plot.svg")
    metadata = {"Date": None} if suffix == "svg" else None  # the same bytes each time
    try:
        figure.savefig(file + ".tmp", format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
        os.replace(file + ".tmp", file)
    except (OSError, ValueError) as e:
        with contextlib.suppress(OSError):
            os.unlink(file + ".tmp")
        die(f"-o {file}: {getattr(e, 'strerror', None) or e}; check the path and the free disk space")
    print(f"wrote {file}")


def import_pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("Matplotlib is missing; run pip install matplotlib")
    matplotlib.rcParams["agg.path.chunksize"] = 10000
    return plt


def plot_recall(axis, row, **style):
    """Plots a row of `recall`, at the middle of each range of distances."""
    buckets = [b for b in row["recall"] if b["asked"]]
    axis.plot([b["from"] * 2**0.5 for b in buckets], [100 * b["right"] / b["asked"] for b in buckets], **style)


def format_recall_axis(axis, chance):
    axis.axhline(100 * chance, color="grey", linestyle=":")
    axis.annotate("chance", (0, 100 * chance), xycoords=("axes fraction", "data"), xytext=(4, 3),
                  textcoords="offset points", color="grey", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set(xlabel="distance, tokens", ylabel="recalled, %", ylim=(-2, 102))
