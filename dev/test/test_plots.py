"""scripts/train_log.py, plot_log.py, plot_recall.py, log_export.py and dev/results/curves.py, on logs of resumed, killed and
old runs; the training scripts with a fake trainer; and -h of all scripts. make test runs it. The parts that need Matplotlib, tensorboard or wandb are skipped without them."""

import importlib.util
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from checks import check, finish, skip

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
SCRIPTS = os.path.join(ROOT, "scripts")
sys.path.insert(0, SCRIPTS)
from train_log import read_run  # noqa: E402

MODES = ("nsa", "full", "window")


def has(package: str) -> bool:
    if importlib.util.find_spec(package):
        return True
    skip(f"{package} is not installed")
    return False


def run(script: str, *args: str) -> tuple[int, str, str]:
    program = [sys.executable, os.path.join(SCRIPTS, script), *args]
    result = subprocess.run(program, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def expect_error(contents: str, script: str, *args: str) -> None:
    code, out, err = run(script, *args)
    right = code == 1 and err.startswith("error: ") and err.count("\n") == 1 and contents in err and not out
    check(right, f"{script} {args}: {code} {out} {err}; expected one line with {contents!r}")


# ---- logs ------------------------------------------------------------------------------------------------
def start_line(step: int, attn: str = "nsa", tokenizer: str = "aa", date: str = "2026-11-28T10:00:00Z") -> dict:
    flags = {"i": "data/books/books_train_*.bin", "t": 128, "u": 10}
    start = {"date": date, "commit": "abc", "flags": flags, "tokenizer": tokenizer}
    return {"step": step, "tokens": 256 * step, "start": {**start, "model": {"attn": attn, "vocab": 68}}}


def train_line(step: int, extra: float = 0) -> dict:
    loss = extra + 1 + 50 * 0.5**step  # the first losses are far above the rest
    return {"step": step, "loss": loss, "lr": 1e-3, "norm": 0.5, "ms": 1000.0, "tokens_per_second": 256.0,
            "mfu": 0.0, "memory_bytes": 1, "tokens": 256 * step}  # fmt: skip


def val_line(step: int, loss: float) -> dict:
    return {"step": step, "tokens": 256 * step, "val_loss": loss, "val_perplexity": 2.0, "val_bits_per_byte": loss / 2,
            "val_tokens": 10}  # fmt: skip


def recall_line(step: int) -> dict:
    buckets = [{"from": 4, "asked": 10, "right": 5}, {"from": 8, "asked": 30, "right": 30}, {"from": 16, "asked": 0, "right": 0}]
    return {"step": step, "tokens": 256 * step, "chance": 0.1, "recall": buckets}


def position_line(step: int, shift: float) -> dict:
    buckets = [{"from": 0, "tokens": 128, "loss": 3.0}, {"from": 128, "tokens": 128, "loss": 2.0 + shift}, {"from": 256, "tokens": 9, "loss": None}]
    return {"step": step, "tokens": 256 * step, "position_loss": buckets}


def needle_line(step: int, name: str, right: int, lengths: tuple) -> dict:
    cells = [{"length": n, "depth": d, "asked": 4, "right": right} for n in lengths for d in (0.0, 0.5, 1.0)]
    return {"step": step, "tokens": 256 * step, "needle": name, "keys": 2, "cells": cells}


def choice_line(step: int, name: str, right: int) -> dict:
    return {"step": step, "tokens": 256 * step, "multiple_choice": name, "examples": 8, "right": right, "right_normalized": 8, "chance": 0.25}


def gates_line(step: int) -> dict:
    return {"step": step, "tokens": 256 * step, "gates": [[0.25, 0.5, 0.75], [0.5, 0.5, None]]}


def whole_log(**start: str) -> list:
    middle = [line for step in range(1, 41) for line in [train_line(step)] + ([val_line(step, 1.5)] if step % 10 == 0 else [])]
    return [start_line(0, **start), val_line(0, 50.0), *middle, position_line(40, 0), recall_line(40), choice_line(40, "arc", 2), gates_line(40)]


def resumed_log() -> list:
    """Stopped after step 40, resumed after step 25; steps 26 to 40 are there twice."""
    again = [train_line(step, extra=1) for step in range(26, 46)]
    return whole_log() + [start_line(25, date="2026-11-28T12:00:00Z"), *again, val_line(45, 2.5)]


def write_log(tmp: str, name: str, lines: list, end: str = "\n") -> str:
    folder = os.path.join(tmp, name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.jsonl"), "w", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(line) for line in lines) + end)
    return folder


# ---- tests -----------------------------------------------------------------------------------------------
def test_reader(tmp: str) -> None:
    resumed = read_run(write_log(tmp, "resumed", resumed_log()))
    check([row["step"] for row in resumed.train] == list(range(1, 46)), "a resumed run has each step once")
    check(all((row["loss"] > 1.9) == (row["step"] > 25) for row in resumed.train[9:]), "repeated steps are the later ones")
    check([row["step"] for row in resumed.val] == [0, 10, 20, 45] and not resumed.recall, "validations of dropped steps")
    check(resumed.label == "resumed: books, nsa", resumed.label)
    hours = (resumed.train[-1]["time"] - resumed.train[0]["time"]) / 3600
    check(abs(hours - 2 - 19 / 3600) < 1e-6, f"{hours} hours: the second part begins at its own date")
    check(abs((resumed.bits_per_byte or 0) - 0.5) < 1e-12, f"bits per byte {resumed.bits_per_byte}")

    torn = read_run(write_log(tmp, "torn", whole_log(), '\n{"step":41,"los'))
    check(len(torn.train) == 40 and len(torn.recall) == 1, "a log with a torn last line")
    old_lines = [{k: v for k, v in line.items() if k != "tokens"} for line in whole_log()[1:]]
    old = read_run(write_log(tmp, "old", old_lines))
    check([row["tokens"] for row in old.train] == [256 * step for step in range(1, 41)], "tokens of an old log")
    check(old.label == "old" and old.val[-1]["tokens"] == 256 * 40, f"an old log: {old.label}")
    check(old.train[-1]["time"] - old.train[0]["time"] == 39, "times of an old log")
    check(read_run("a=" + os.path.join(tmp, "old", "log.jsonl")).name == "a", "NAME=FOLDER")


def test_errors(tmp: str) -> None:
    bad = write_log(tmp, "bad", whole_log())
    with open(os.path.join(bad, "log.jsonl"), "r+b") as file:
        file.write(b"\xff\x00")
    expect_error("line 1 is not a line of a training log", "plot_log.py", bad)
    expect_error("No such file", "plot_log.py", os.path.join(tmp, "none"))
    for script in ("plot_log.py", "plot_recall.py", "plot_needle.py", "plot_position.py", "plot_blocks.py", "log_export.py"):
        expect_error(f"; {script} -h lists the flags", script)
    expect_error("argument --tensorboard: expected one argument", "log_export.py", bad, "--tensorboard")
    for program in ("curves.py", "performance.py"):
        expect_error(f"{program} -h lists the flags", "../dev/results/" + program, "--foo")
    expect_error("has no losses and no answers", "plot_log.py", write_log(tmp, "empty", [start_line(0)]))
    expect_error("all losses are NaN or Inf", "plot_log.py", write_log(tmp, "nan", [{**train_line(1), "loss": None}]))
    expect_error("nothing to export to", "log_export.py", bad)
    expect_error("two runs have the name torn", "log_export.py", *[os.path.join(tmp, "torn")] * 2, "--tensorboard", tmp)
    for package in ("tensorboard", "wandb"):
        if not importlib.util.find_spec(package):
            expect_error(f"the package {package} is missing", "log_export.py", os.path.join(tmp, "torn"), "--" + package, tmp)
    expect_error("name the folder NAME_CONTEXT_MODE", "plot_recall.py", os.path.join(tmp, "old"))


def test_plots(tmp: str) -> None:
    other = write_log(tmp, "other", whole_log(attn="full", tokenizer="bb"))
    folders = [os.path.join(tmp, name) for name in ("resumed", "torn", "old", "other")]
    for count in (1, 2, 4):
        picture = os.path.join(tmp, f"{count}.png")
        code, out, err = run("plot_log.py", *folders[:count], "-o", picture, *["--tokens"] * (count == 2))
        size = os.path.getsize(picture) if os.path.exists(picture) else 0
        check((code, err) == (0, "") and size > 20000 and out == f"wrote {picture}\n", f"{count} runs: {code} {out} {err}")
    code, _, err = run("plot_recall.py", os.path.join(tmp, "torn"), other, "-o", os.path.join(tmp, "recall.png"))
    check((code, err) == (0, ""), f"plot_recall.py: {code} {err}")
    expect_error("a second run with context 128 and mode nsa", "plot_recall.py", *[os.path.join(tmp, "torn")] * 2)
    expect_error("No such file", "plot_log.py", folders[0], "-o", os.path.join(tmp, "none/a.png"))
    for name in (tmp, "", os.path.join(tmp, "plot")):
        expect_error(f"-o {name}: must be a file with a suffix, such as plot.png", "plot_log.py", folders[0], "-o", name)

    from plot_log import draw
    from train_log import import_pyplot

    plt = import_pyplot()
    figure = draw(plt, [read_run(folders[1])], "step", 0)
    low, high = figure.axes[0].get_ylim()
    check(0.9 < low < 1 and 1.5 < high < 3, f"loss axis from {low} to {high}; the first loss is 26")
    check(len(figure.axes) == 5 and figure.axes[0].get_ylabel() == "loss, nats per token", "five panels")
    figure = draw(plt, [read_run(folders[1]), read_run(other)], "tokens", 0)
    check(figure.axes[0].get_ylabel() == "loss, bits per byte", "runs with different tokenizers")
    check(figure.axes[0].get_ylim()[1] < 1.5, "bits per byte are half of the losses")
    check([t.get_text() for t in figure.legends[0].texts] == ["torn: books, nsa", "other: books, full"], "legend")


def test_position(tmp: str) -> None:
    from plot_position import draw
    from train_log import import_pyplot

    first, old = (os.path.join(tmp, name) for name in ("torn", "old_positions"))
    second = write_log(tmp, "second", [*whole_log(attn="full"), position_line(40, 0.5)])  # the last line of a step counts
    write_log(tmp, "old_positions", [line for line in whole_log() if "position_loss" not in line])
    picture = os.path.join(tmp, "position.png")
    code, out, err = run("plot_position.py", first, second, "-o", picture)
    check((code, err, out) == (0, "", f"wrote {picture}\n") and os.path.getsize(picture) > 20000, f"{code} {out} {err}")
    figure = draw(import_pyplot(), [read_run(first), read_run(second)])
    lines = [[list(line.get_ydata()) for line in axis.lines] for axis in figure.axes]
    check(lines == [[[3, 2], [3, 2.5]], [[0, 0], [0, 0.5]]], f"losses and differences: {lines}")
    check(list(figure.axes[0].lines[0].get_xdata()) == [64, 128 * 2**0.5], "positions")
    check([t.get_text() for t in figure.legends[0].texts] == ["torn: books, nsa", "second: books, full"], "legend")
    check(len(draw(import_pyplot(), [read_run(first)]).axes) == 1, "one run has one panel")
    expect_error("has no loss by position", "plot_position.py", old)
    nothing = {"step": 40, "tokens": 1, "position_loss": [{"from": 0, "tokens": 1, "loss": None}]}
    expect_error("are NaN or Inf", "plot_position.py", write_log(tmp, "nan_positions", [*whole_log(), nothing]))


def test_needle(tmp: str) -> None:
    from plot_needle import draw
    from train_log import import_pyplot

    # two files, and a step that was evaluated again after a resume
    lines = [needle_line(40, "one", 1, (128, 256)), needle_line(40, "two", 2, (128,)), needle_line(20, "one", 4, (64,))]
    first = write_log(tmp, "needles", [*whole_log(), lines[2], *lines[:2], needle_line(40, "one", 3, (128, 256))])
    second = write_log(tmp, "needles2", [*whole_log(attn="full"), needle_line(40, "two", 4, (128, 512))])
    picture = os.path.join(tmp, "needle.png")
    code, out, err = run("plot_needle.py", first, second, "-o", picture)
    check((code, err, out) == (0, "", f"wrote {picture}\n") and os.path.getsize(picture) > 20000, f"{code} {out} {err}")
    figure = draw(import_pyplot(), [read_run(first), read_run(second)])
    maps = [axis.images[0].get_array().tolist() if axis.images else None for axis in figure.axes[:4]]
    check(maps == [[[75, 75]] * 3, None, [[50]] * 3, [[100, 100]] * 3], f"heat maps {maps}")
    check(figure.axes[0].get_title() == "needles: books, nsa, step 40\none, keys: 2", figure.axes[0].get_title())
    expect_error("has no needles", "plot_needle.py", os.path.join(tmp, "torn"))
    # the log of -val 1 -needle -o, which has no losses
    start = start_line(40)
    start["start"]["flags"] |= {"i": None, "val": 1}
    alone = write_log(tmp, "alone", [start, needle_line(40, "one", 3, (128, 256))])
    code, out, err = run("plot_needle.py", alone, "-o", picture)
    check(code == 0, f"plot_needle.py of a log of needles alone: {err}")
    expect_error("is the log of -val 1, which has no training curve", "plot_log.py", alone)


def write_blocks(tmp: str, name: str, seed: int, layers: int = 2, lengths: tuple = (40, 150, 200)) -> str:
    """Writes random block indices of 2 KV heads, blocks of 4 tokens, of which a query selects 5: block 0, the nearest
    two and two free ones."""
    rng, rows = random.Random(seed), []
    for _ in range(layers * 2):
        for length in lengths:
            for position in range(length):
                own = position // 4
                kept = sorted({0, own, max(0, own - 1), *rng.sample(range(own + 1), min(own + 1, 5))}, key=lambda b: (b not in (0, own, own - 1), rng.random()))[:5]
                rows.append(sorted(kept) + [-1] * (5 - len(kept)))
    path = os.path.join(tmp, name)
    with open(path, "wb") as file:
        file.write(b"nsachose" + struct.pack("<7q", layers, 4, 2, sum(lengths), 5, 4, len(lengths)))
        file.write(struct.pack(f"<{len(lengths)}q", *lengths) + struct.pack(f"<{5 * len(rows)}i", *sum(rows, [])))
    return path


def random_blocks(lengths: tuple, init: int) -> tuple[float, list]:
    """Returns the expected median distance in tokens, and the distinct free blocks of groups, of random free blocks of the
    sequences of write_blocks(), block by block."""
    weights, groups = {}, {size: [] for size in (8, 16, 32, 64)}
    for length in lengths:
        candidates = [range(init, p // 4 - 1) for p in range(length)]
        for p in range(20, length):
            for b in candidates[p]:
                weights[p // 4 - b] = weights.get(p // 4 - b, 0) + 1 / len(candidates[p])
        for size, counts in groups.items():
            for p in range(-(-20 // size) * size, length - size + 1, size):
                of_block = [[1 - (3 - init) / len(c) for c in candidates[p : p + size] if b in c] for b in range(length)]
                counts.append(sum(1 - math.prod(missed) for missed in of_block))
    below, median = 0, 0
    while below < sum(weights.values()) / 2:
        median += 1
        below += weights.get(median, 0)
    return 4 * median, [sum(counts) / len(counts) for counts in groups.values()]


def test_blocks(tmp: str) -> None:
    from plot_blocks import Selection, draw_last, draw_training
    from train_log import import_pyplot

    lengths = (40, 150, 200)
    first, second = write_blocks(tmp, "blocks_2.bin", 1), write_blocks(tmp, "blocks_10.bin", 2)
    with open(first, "rb") as file:
        flat = struct.unpack(f"<{2 * 2 * 390 * 5}i", file.read()[64 + 24 :])
    for init in (0, 1):  # with none, block 0 is a free one
        s = Selection(first, init, 2)
        for layer in range(2):
            found, block0, groups = [], [], {size: [] for size in (8, 16, 32, 64)}
            for head in range(2):
                begin = 0
                for length in lengths:
                    at = lambda p: flat[5 * ((layer * 2 + head) * 390 + begin + p) :][:5]  # noqa: E731
                    free = [{b for b in at(p) if b >= init and b <= p // 4 - 2} for p in range(length)]
                    for p in range(20, length):
                        found += [p // 4 - b for b in free[p]]
                        block0.append(0 in at(p))
                    for size, counts in groups.items():
                        for p in range(0, length - size + 1, size):
                            if p >= 20:
                                counts.append(len(set().union(*free[p : p + size])))
                    begin += length
            distances = [sum(1 << i <= d < 2 << i for d in found) for i in range(s.distances.shape[1])]
            check(s.distances[layer].tolist() == distances, f"distances {s.distances[layer]}, not {distances}")
            wanted = [sum(counts) / len(counts) for counts in groups.values()]
            check(all(abs(a - b) < 1e-9 for a, b in zip(s.distinct[layer], wanted)), f"distinct {s.distinct[layer]}, not {wanted}")
            check(abs(s.block0[layer] - sum(block0) / len(block0)) < 1e-9, f"block 0 {s.block0[layer]}")
            check(abs(s.median[layer] / 4 - sorted(found)[len(found) // 2]) <= 1, f"median {s.median[layer]}")
        median, distinct = random_blocks(lengths, init)
        right = s.random_median == median and all(abs(a - b) < 1e-9 for a, b in zip(s.random_distinct, distinct))
        check(right, f"random blocks: {s.random_median} {s.random_distinct}, not {median} {distinct}")
    check((abs(s.random_distinct / s.mean(s.distinct) - 1) < 0.05).all(), f"the file's blocks are random: {s.distinct}")
    axes = import_pyplot().subplots(2, 3)[1]
    draw_last(axes[0], s)
    draw_training(axes[1], [s, s])
    dashed = [[line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--" and len(line.get_ydata())] for axis in axes.flat]
    check(dashed == [[], [*s.random_distinct], [], [s.random_median], [*s.random_distinct], []], f"dashed lines: {dashed}")
    picture = os.path.join(tmp, "blocks.png")
    code, out, err = run("plot_blocks.py", second, first, "-o", picture)
    right = out.startswith("step 2: median") and "\nstep 10: median" in out and out.endswith(f"wrote {picture}\n")
    right = right and out.count(f"\n  random blocks: median distance {s.random_median} tokens; distinct free blocks of 8, 16,") == 2
    check((code, err) == (0, "") and right and os.path.getsize(picture) > 20000, f"plot_blocks.py: {code} {out} {err}")
    with open(first, "rb") as file:
        data = file.read()
    for name, content, wanted in (
        ("none_1.bin", None, "No such file"),
        ("magic_1.bin", b"x" + data[1:], "not a file of block indices"),
        ("cut_1.bin", data[:-4], "its size is not that of its header"),
        ("head_1.bin", data[:20], "not a file of block indices"),
        ("lengths_1.bin", data[:64] + struct.pack("<q", 41) + data[72:], "do not have as many tokens"),
        ("negative_1.bin", data[:8] + struct.pack("<q", -2) + data[16:], "its size is not that of its header"),
    ):
        path = os.path.join(tmp, name)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
        expect_error(wanted, "plot_blocks.py", path)
    expect_error("the name has no step number", "plot_blocks.py", os.path.join(tmp, "blocks.bin"))
    expect_error("so none is free", "plot_blocks.py", first, "--local-blocks", "4")
    expect_error("all queries select all blocks", "plot_blocks.py", write_blocks(tmp, "short_1.bin", 1, lengths=(20, 9)))
    # a layer of full attention, as the second one here, counts in no average
    with open(os.path.join(tmp, "hybrid_5.bin"), "wb") as file:
        half = 64 + 24 + 4 * len(flat) // 2
        file.write(data[:half] + b"\xff" * (len(data) - half))
    alone = [Selection(os.path.join(tmp, name), 1, 2) for name in ("hybrid_5.bin", "blocks_2.bin")]
    for values, wanted in zip(*((s.distances, s.distinct, s.block0, s.median) for s in alone)):
        check((values[0] == wanted[0]).all() and (values[1] != values[1]).all() and (alone[0].mean(values) == wanted[0]).all(),
              f"a full layer: {values}, not {wanted}")  # fmt: skip
    code, out, err = run("plot_blocks.py", first, os.path.join(tmp, "hybrid_5.bin"), "-o", picture)
    check((code, err) == (0, "") and "nan" not in out and "step 5: median" in out, f"a full layer: {code} {out} {err}")
    with open(os.path.join(tmp, "full_1.bin"), "wb") as file:
        file.write(data[: 64 + 24] + b"\xff" * (len(data) - 64 - 24))
    expect_error("no layer selects blocks", "plot_blocks.py", os.path.join(tmp, "full_1.bin"))
    code, out, err = run("plot_blocks.py", first, write_blocks(tmp, "three_3.bin", 1, layers=3))
    check(code == 1 and "three_3.bin: has 3 layers" in err and err.count("\n") == 1, f"layers: {code} {err}")


def test_tensorboard(tmp: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = os.path.join(tmp, "tb")
    for _ in range(2):  # a second export replaces the first one
        code, out, err = run("log_export.py", "a=" + os.path.join(tmp, "resumed"), os.path.join(tmp, "torn"), "--tensorboard", folder)
        check((code, err) == (0, ""), f"--tensorboard: {code} {out} {err}")
    events = EventAccumulator(os.path.join(folder, "a")).Reload()
    losses = events.Scalars("train/loss")
    check([e.step for e in losses] == list(range(1, 46)), f"steps: {[e.step for e in losses]}")
    check(abs(losses[-1].value - 2) < 1e-6 and losses[-1].wall_time - losses[0].wall_time > 7200, f"{losses[-1]}")
    check([e.value for e in events.Scalars("validation/loss")] == [50, 1.5, 1.5, 2.5], "validation losses")
    check(b"| flags.t | 128 |" in events.Tensors("configuration")[0].tensor_proto.string_val[0], "configuration")
    choices = EventAccumulator(os.path.join(folder, "torn")).Reload()
    values = [choices.Scalars(f"multiple_choice/arc{end}")[0].value for end in ("", "_normalized")]
    check(values == [0.25, 1], f"multiple choice: {values}")
    names = ("sliding/layer_00", "compressed/layer_01", "sliding/layer_01")
    gates = {name: choices.Scalars("gates/" + name)[0].value for name in names if "gates/" + name in choices.Tags()["scalars"]}
    check(gates == {names[0]: 0.75, names[1]: 0.5}, f"gates: {gates}")
    needles = write_log(tmp, "tb_needles", [*whole_log(), needle_line(40, "one", 3, (128, 256))])
    code, out, err = run("log_export.py", needles, "--tensorboard", folder)
    found = EventAccumulator(os.path.join(folder, "tb_needles")).Reload().Scalars("needle/one_0000256")
    check([(e.step, e.value) for e in found] == [(40, 0.75)], f"needles: {code} {err} {found}")
    positions = EventAccumulator(os.path.join(folder, "torn")).Reload().Scalars("validation/loss_from_0000128")
    check([(e.step, e.value) for e in positions] == [(40, 2)], f"loss by position: {positions}")
    recall = EventAccumulator(os.path.join(folder, "torn")).Reload().Scalars("recall/all")
    check([(e.step, e.value) for e in recall] == [(40, 0.875)], f"recall: {recall}")


def wandb_history(path: str) -> list:
    """Returns [{name: value}] of a .wandb file: a LevelDB log of protocol buffers behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    with open(path, "rb") as file:
        data = file.read()
    position, body, history = 7, b"", []
    while position + 7 <= len(data):
        block_left = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if block_left < 7 or kind == 0:
            position += block_left
            continue
        body += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record.FromString(body)
            body = b""
            if record.WhichOneof("record_type") == "history":
                history.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
    return history


def test_wandb(tmp: str) -> None:
    args = ("log_export.py", "a=" + os.path.join(tmp, "resumed"), "--wandb", os.path.join(tmp, "wb"))
    code, out, err = run(*args)
    check((code, err) == (0, "") and out.startswith("wrote "), f"--wandb: {code} {out} {err}")
    if code == 0:
        folder = out.split()[1].rstrip(":")
        history = wandb_history(os.path.join(folder, [f for f in os.listdir(folder) if f.endswith(".wandb")][0]))
        check([row["_step"] for row in history] == list(range(46)), f"steps: {[row['_step'] for row in history]}")
        check(history[45]["train/loss"] > 2 and history[45]["validation/loss"] == 2.5, f"last step: {history[-1]}")
    expect_error("already exported", *args)


def test_learning(tmp: str) -> None:
    """scripts/learning.sh: the flags of each run; what it skips, resumes, continues and removes; the texts that it makes; its
    errors. Programs that log their flags replace the trainer, from_hf.py and those that make the text."""
    root = os.path.join(tmp, "learning")
    shutil.copytree(SCRIPTS, os.path.join(root, "scripts"))
    for text in ("linux", "linux_quarter"):
        os.makedirs(os.path.join(root, "data", text))
        for part in ("train", "val"):
            with open(os.path.join(root, f"data/{text}/linux_{part}_000000.bin"), "w", encoding="utf-8"):
                pass
    fake = """#!/bin/bash
echo "$WORLD_SIZE $*" >>flags.txt
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2 ;; -x) steps=$2 ;; esac
    shift
done
row() { [ "${RANK:-0}" != 0 ] || echo ${CUDA_VISIBLE_DEVICES:-none} $1 ${out##*/} $OMP_NUM_THREADS >>gpus.txt; }
row begin
case $CUDA_VISIBLE_DEVICES in 0 | "" | *,*) ;; *) # until a second run has begun
    for i in {1..50}; do [ $(grep -c begin gpus.txt) -lt 2 ] || break; sleep 0.1; done ;; esac
row end
[ -z "$BAD" ] || [ $out != log/learning/$BAD ] || { echo "error: it is bad" >&2; exit 1; }
mkdir -p $out && echo "{\\"step\\":$steps,\\"tokens\\":9,\\"val_loss\\":2.5}" >>$out/log.jsonl
touch $(printf '%s/ckpt_%08d.bin' $out $steps)
"""
    maker = """#!/bin/bash
echo "${0##*/} $*" >>flags.txt
while [ $# -gt 0 ]; do
    case $1 in -o) mkdir -p $2 ;; --tokenizer) tokenizer=$2 ;; esac
    shift
done
[ -e "${tokenizer:-.}" ] || exit 1
"""
    trainer = os.path.join(root, "train_gpt_nsa")
    for program, text in ((trainer, fake), *((os.path.join(root, name), maker) for name in ("data/corpus", "data/bpe", "scripts/from_hf.py"))):
        with open(program, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(program, 0o755)
    shutil.copy(os.path.join(ROOT, "data/shards.py"), os.path.join(root, "data"))
    vocab = os.path.join(root, "data/vocab.py")  # which imports the packages that data/bpe needs: here none
    with open(vocab, "w", encoding="utf-8"):
        pass

    output = ""

    def train(runs: str, **env: str) -> tuple[int, str, list[str]]:
        """Returns the exit code, the errors, and the command line of each run of the trainer. `output` is what the script says."""
        nonlocal output
        flags = os.path.join(root, "flags.txt")
        with open(flags, "w", encoding="utf-8"):
            pass
        full = {name: value for name, value in os.environ.items() if name not in ("TRAINER", "GPUS", "SMOLLM2", "OMP_NUM_THREADS")}
        full |= {"BAD": "", "CUDA_VISIBLE_DEVICES": "0", **env}
        program = [os.path.join(root, "scripts/learning.sh"), *runs.split()]
        result = subprocess.run(program, capture_output=True, text=True, env=full)
        output = result.stdout
        with open(flags, encoding="utf-8") as file:
            return result.returncode, result.stderr, file.read().splitlines()

    def left(name: str) -> list[str]:
        return sorted(os.listdir(os.path.join(root, "log/learning", name)))

    code, err, lines = train("nsa-64k")
    check(code == 1 and not lines and "continues nsa-1" in err, f"a run whose start is missing: {code} {err} {lines}")
    code, err, lines = train("nsa-64k nsa-1 50m-nsa-2")
    right = (code, err, len(lines)) == (0, "", 3)
    check(right, f"three runs: {code} {err} {lines}")
    if right:
        wanted = "1 -t 16384 -e gpt-124m -theta 1e6 -l 6e-4 -b 4 -d 131072 -x 1526 -u 100 -k cosine -q 0.1 -v 100 -m 0 -n 100 -nk 1"
        end = " -i data/linux/linux_train_*.bin -j data/linux/linux_val_*.bin -attn nsa -seed 1"
        check(lines[0].startswith(wanted) and lines[0].endswith(end), f"nsa-1: {lines[0]}")
        wanted = "1 -e log/learning/nsa-1/ckpt_00001526.bin -t 65536 -l 1e-4 -b 1 -d 131072 -x 153 -u 100 "
        check(lines[1].startswith(wanted) and lines[1].endswith(" -u 15") and "gpt-124m" not in lines[1], f"nsa-64k: {lines[1]}")
        check(" -x 381 -u 100 " in lines[2] and lines[2].endswith(" -attn nsa -seed 2"), f"50m-nsa-2: {lines[2]}")
        kept = [left(name) for name in ("nsa-1", "nsa-64k", "50m-nsa-2")]
        check(kept == [["ckpt_00001526.bin", "log.jsonl"], ["log.jsonl"], ["log.jsonl"]], f"checkpoints: {kept}")
    with open(os.path.join(root, "log/learning/50m-nsa-2/ckpt_00000300.bin"), "w", encoding="utf-8"):
        pass  # a crash at the end of the run left it
    check(train("nsa-64k nsa-1 50m-nsa-2") == (0, "", []), "complete runs are skipped")
    kept = [left(name) for name in ("nsa-1", "50m-nsa-2")]
    check(kept == [["ckpt_00001526.bin", "log.jsonl"], ["log.jsonl"]], f"checkpoints of complete runs: {kept}")
    log = os.path.join(root, "log/learning/50m-nsa-2/log.jsonl")
    with open(log, "w", encoding="utf-8") as file:
        file.write('{"step":350,"tokens":9,"val_loss":2.5}\n{"step":381,"loss":2.5}\n')
    check(len(train("50m-nsa-2")[2]) == 1, "a run without its last validation goes on")
    os.remove(os.path.join(root, "log/learning/nsa-1/ckpt_00001526.bin"))
    check(len(train("nsa-1")[2]) == 1, "a run that another one continues, without its checkpoint, goes on")
    code, err, lines = train("350m-zero-30m-fp8 full-1 full-64k", BAD="full-1")
    wanted = "error: it is bad\nerror: full-64k continues full-1, which has no log/learning/full-1/ckpt_00001526.bin; "
    right = code == 1 and len(lines) == 2 and err == wanted + "run scripts/learning.sh full-1\n"
    check(right and output.endswith("\n== these runs failed: full-1 full-64k\n"), f"a run that fails: {code} {err} {lines}")
    check(" -l 3e-4 -layers 24 " in lines[1] and lines[1].endswith(" -matmul fp8"), f"350m-zero-30m-fp8: {lines[1]}")
    code, err, lines = train("full-1 window-1 window-64k", GPUS="4")
    cp = [line.count(" -cp 2 ") for line in lines]
    right = code == 0 and cp == [0] * 8 + [1] * 4 and all(line.startswith("4 ") and " -d 131072 " in line for line in lines)
    check(right, f"four GPUs: {code} {err} {lines}")
    # several GPUs: several runs at a time, each on its own, and one that continues another one after that
    os.rename(os.path.join(root, "log"), os.path.join(root, "log_before"))

    def gpus() -> list[list[str]]:
        """Returns [GPUs, begin or end, run, CPU threads] in the order of time, and forgets them."""
        path = os.path.join(root, "gpus.txt")
        with open(path, encoding="utf-8") as file:
            rows = [line.split() for line in file]
        os.remove(path)
        return rows

    gpus()
    code, err, lines = train("nsa-1 nsa-64k full-1 50m-nsa-2", CUDA_VISIBLE_DEVICES="3, ,5,-1,7", BAD="full-1")
    rows = gpus()
    check({row[0] for row in rows} == {row[0] for row in rows[:2]} == {"3", "5"}, f"two GPUs: {rows}")
    for gpu in "35":
        own = [row[1:3] for row in rows if row[0] == gpu]
        check(own == [[what, name] for _, name in own[::2] for what in ("begin", "end")], f"one run at a time on GPU {gpu}: {rows}")
    order = [row[1:3] for row in rows]
    check(len(order) == 8 and order.index(["end", "nsa-1"]) < order.index(["begin", "nsa-64k"]), f"nsa-64k waits for nsa-1: {rows}")
    threads = str((len(os.sched_getaffinity(0)) + 1) // 2)
    check({row[3] for row in rows} == {threads}, f"each has half of the CPU threads: {rows}")
    right = code == 1 and err == "" and output.endswith("\n== these runs failed: full-1\n") and output.startswith("== nsa-1 on GPU 3\n== full-1 on GPU 5\n")
    check(right, f"two runs at a time: {code} {err} {output}")
    code, err, lines = train("nsa-1 full-1 50m-nsa-2", CUDA_VISIBLE_DEVICES="3,5")
    right = code == 0 and output == "== nsa-1: complete\n== 50m-nsa-2: complete\n== full-1 on GPU 3\n== full-1: complete\n"
    check(right and len(lines) == 1, f"complete runs are skipped: {code} {err} {output} {lines}")
    with open(os.path.join(root, "log/learning/full-1/output.txt"), encoding="utf-8") as file:
        text = file.read()
    check(text.startswith("== full-1\nerror: it is bad\n") and text.count("== full-1\n") == 2, f"what a run prints is kept: {text}")
    gpus()
    code, err, lines = train("window-1 50m-full-1", CUDA_VISIBLE_DEVICES="3,5,6,8,9", GPUS="2")
    check(code == 0 and {row[0] for row in gpus()} == {"3,5", "6,8"} and [line[0] for line in lines] == ["2"] * 4, f"two GPUs a run: {output} {lines}")
    code, err, lines = train("50m-zero-1 50m-zero-2", CUDA_VISIBLE_DEVICES="")
    check((code, len(lines)) == (0, 2) and [row[0] for row in gpus()] == ["none"] * 4, f"no GPU: the trainer says so: {code} {err} {output}")
    count = ["bash", "-c", "set -euo pipefail; . scripts/common.sh; unset CUDA_VISIBLE_DEVICES; nvidia-smi() { return 9; }; all_gpus"]
    result = subprocess.run(count, capture_output=True, text=True, cwd=root)
    check((result.returncode, result.stdout, result.stderr) == (0, "0\n", ""), f"a host without GPUs: {result}")
    shutil.rmtree(os.path.join(root, "log"))
    os.rename(os.path.join(root, "log_before"), os.path.join(root, "log"))
    code, err, lines = train("nsa-1 nsa")
    check(code == 1 and not lines and err.startswith("error: nsa: no such run; ") and err.count("\n") == 1, f"no such run: {code} {err}")
    code, err, lines = train("50m-graded-hybrid-1 50m-graded-mean-1")
    wanted = [f"-attn nsa -seed 1 -gate-bias -2,0,2 {flags}" for flags in ("-full-every 4", "-phi mean")]
    right = [line.split("data/linux_quarter/linux_val_*.bin ")[1] for line in lines] == wanted
    check(right and all(" -i data/linux_quarter/linux_train_*.bin " in line for line in lines), f"a quarter of the text: {lines}")

    model = os.path.join(tmp, "SmolLM2 135M.gguf")
    with open(model, "w", encoding="utf-8"):
        pass
    code, err, lines = train("smollm2-8k-nsa")
    check(code == 1 and not lines and "name its GGUF file or folder in SMOLLM2" in err and err.count("\n") == 1, f"no SmolLM2: {code} {err}")
    code, err, lines = train("smollm2-8k-nsa smollm2-16k-full", SMOLLM2=os.path.relpath(model))
    documents = "--min-tokens 131072 --shard 2000000000 data/corpora/linux_c"
    wanted = [f"from_hf.py {model} -o data/smollm2/full.bin", "corpus -o data/corpora/linux_c --suffix .c --min-bytes 400000"]
    wanted += [f"bpe -o data/linux_smollm2 --name linux --tokenizer {model} --val-documents 2 --every 4 {documents}"]
    # the programs make no shards, so that the second run makes the text again
    wanted += [wanted[0], wanted[2]]
    check(code == 0 and lines[:-2] == wanted, f"the text of SmolLM2: {code} {err} {lines}")
    wanted = "1 -t 8192 -e data/smollm2/full.bin -l 1e-4 -b 8 -d 131072 -x 381 -u 100 -k cosine -q 0.1 -v 50 -m 0 -n 100 -nk 1"
    check(lines[-2].startswith(wanted) and lines[-2].endswith(" -attn nsa -seed 1 -u 8 -v 8"), f"smollm2-8k-nsa: {lines[-2]}")
    check(" -t 16384 " in lines[-1] and " -b 4 " in lines[-1], f"smollm2-16k-full: {lines[-1]}")
    code, err, lines = train("", TRAINER="/bin/false")
    right = "\n== these runs failed: " in output and output.endswith(" 350m-window-x3\n") and "smollm2" not in output + err
    check(code == 1 and right, f"all runs without SmolLM2: {output} {err}")
    shutil.rmtree(os.path.join(root, "data/linux"))
    shutil.rmtree(os.path.join(root, "log/learning/full-1"))
    code, err, lines = train("full-64k")
    right = code == 1 and not lines and err.startswith("error: full-64k continues full-1, ") and err.count("\n") == 1
    check(right, f"a run whose start is missing makes no text: {code} {err} {lines}")
    shutil.rmtree(os.path.join(root, "log/learning/window-1"))
    code, err, lines = train("window-64k")
    check(code == 1 and lines[0].startswith("bpe ") and "continues" not in err, f"a complete run needs no start: {code} {err} {lines}")
    shutil.rmtree(os.path.join(root, "data/linux_quarter"))
    os.remove(os.path.join(root, "log/learning/50m-graded-mean-1/log.jsonl"))
    code, err, lines = train("50m-graded-mean-1")
    wanted = ["bpe -o data/linux_bpe --name linux --train-vocab 16384 "]
    wanted += [f"bpe -o data/linux_quarter --name linux --tokenizer data/linux_bpe/tokenizer.json --val-documents 8 --every 4 {documents}"]
    check(len(lines) == 2 and lines[0].startswith(wanted[0]) and lines[1] == wanted[1] and code == 1, f"the text: {code} {err} {lines}")
    with open(vocab, "w", encoding="utf-8") as file:
        file.write("import no_such_package")
    shutil.rmtree(os.path.join(root, "data/corpora"))
    code, err, lines = train("50m-graded-mean-1")
    right = (code, err, lines) == (1, "error: Python package no_such_package is missing; run pip install -r requirements.txt\n", [])
    check(right, f"without the packages of data/bpe there is no text: {code} {err} {lines}")
    os.remove(trainer)
    code, err, lines = train("nsa-1")
    check(code == 1 and "build it with make train_gpt_nsa" in err and err.count("\n") == 1, f"no trainer: {code} {err}")


def test_recall(tmp: str) -> None:
    """scripts/recall.sh: the contexts of each mode, where each starts, the sequences of a step and those at a time. Programs
    that log their flags replace the trainer and build/recall."""
    root = os.path.join(tmp, "recall")
    shutil.copytree(SCRIPTS, os.path.join(root, "scripts"))
    os.makedirs(os.path.join(root, "build"))
    fake = """#!/bin/bash
echo "${0##*/} $*" >>flags.txt
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2 ;; -x) steps=$2 ;; esac
    shift
done
[ -z "$steps" ] || { mkdir -p $out && touch $(printf '%s/ckpt_%08d.bin' $out $steps); }
"""
    for program in ("train_gpt_nsa", "build/recall"):
        with open(os.path.join(root, program), "w", encoding="utf-8") as file:
            file.write(fake)
        os.chmod(os.path.join(root, program), 0o755)

    def train(*contexts: str, **env: str) -> tuple[int, str, list[str]]:
        """Returns the exit code, the errors, and the command line of each program."""
        flags = os.path.join(root, "flags.txt")
        with open(flags, "w", encoding="utf-8"):
            pass
        full = {name: value for name, value in os.environ.items() if name not in ("TRAINER", "STEPS", "TOKENS", "MODES")} | env
        result = subprocess.run([os.path.join(root, "scripts/recall.sh"), *contexts], capture_output=True, text=True, env=full)
        with open(flags, encoding="utf-8") as file:
            return result.returncode, result.stderr, file.read().splitlines()

    code, err, lines = train(MODES="nsa")
    check((code, err, len(lines)) == (0, "", 18), f"nsa alone: {code} {err} {lines}")
    wanted = "train_gpt_nsa -e recall-1k -theta 1e7 -attn nsa -t 256 -b 64 -d 16384 -x 1000 -l 1e-3 -u 100 "
    check(lines[0] == "recall -o data/recall_256 -t 256 -n 64000" and lines[1].startswith(wanted), f"context 256: {lines[:2]}")
    wanted = "train_gpt_nsa -e log/recall_32768_nsa/ckpt_00001000.bin -attn nsa -t 65536 -b 2 -d 524288 -x 1000 -l 5e-4 -u 100 "
    check(lines[-2] == "recall -o data/recall_65536 -t 65536 -n 8000" and lines[-1].startswith(wanted), f"context 65,536: {lines[-2:]}")
    code, err, lines = train()
    longest = {mode: max(int(line.split(" -t ")[1].split()[0]) for line in lines if f" -attn {mode} " in line) for mode in ("nsa", "full", "window")}
    check(longest == {"nsa": 65536, "full": 16384, "window": 16384}, f"longest contexts: {longest}")
    code, err, lines = train("24576", "65536", MODES="full", STEPS="200", TOKENS="1048576")
    steps = [" -t 24576 -b 3 -d 1032192 -x 200 ", " -t 65536 -b 2 -d 1048576 -x 200 "]
    check(len(lines) == 4 and all(step in line for step, line in zip(steps, lines[1::2])), f"other contexts: {code} {err} {lines}")
    check(" -e log/recall_24576_full/ckpt_00000200.bin " in lines[3], f"the second starts from the first: {lines[3]}")


# What scripts/learning.sh says of nsa-1.
NSA_1 = {"t": 16384, "e": "gpt-124m", "l": 6e-4, "seed": 1, "matmul": "bf16", "gate-bias": None, "i": "data/linux/linux_train_*.bin"}


def test_curves(tmp: str) -> None:
    """dev/results/curves.py: what a row has, its size, replaced rows, incomplete runs; both pictures."""
    root = os.path.join(tmp, "curves")
    for folder in ("scripts", "dev/results"):
        shutil.copytree(os.path.join(ROOT, folder), os.path.join(root, folder), ignore=shutil.ignore_patterns("curves_*.jsonl"))
    os.makedirs(os.path.join(root, "data"))
    shutil.copy(os.path.join(ROOT, "data/shards.py"), os.path.join(root, "data"))
    rows_file = os.path.join(root, "dev/results/curves_h300.jsonl")
    steps = 1526

    def log(seed: int, gpu: str | None = "NVIDIA H300") -> list:
        start = start_line(0)
        flags = {f"flag-{i}": 1e-3 for i in range(80)} | {"x": steps, "matmul": "bf16"}
        start["start"] |= {"gpu": gpu, "processes": 1, "flags": flags}
        lines = [start, val_line(0, 9.0)]
        for step in range(1, steps + 1):
            lines.append({**train_line(step), "loss": 2 + seed + 1 / 3 + 3 / step, "ms": 500.0})
            if step % 50 == 0 or step == steps:
                lines += [val_line(step, 2 + seed + 1 / step), position_line(step, 0.5)]
                lines.append({"step": step, "tokens": 1, "gates": [[0.123456789] * 3] * 24})
        return lines

    def curves(*args: str) -> tuple[int, str, str]:
        program = [sys.executable, os.path.join(root, "dev/results/curves.py"), *args]
        result = subprocess.run(program, capture_output=True, text=True, cwd=root)
        return result.returncode, result.stdout, result.stderr

    def rows() -> list:
        with open(rows_file, encoding="utf-8") as file:
            lines = file.read().splitlines()
        check(max(map(len, lines)) <= 12000, f"bytes of a row: {list(map(len, lines))}")
        return [json.loads(line) for line in lines]

    first, second = write_log(tmp, "first", log(0)), write_log(tmp, "second", log(1))
    code, out, err = curves("add", first, second)
    wanted = "wrote dev/results/curves_h300.jsonl: 2 runs, 2 of them from these folders\n"
    wanted += "next: python3 dev/results/curves.py draw NAME... --gpu H300 -o FILE; no page has tables of the H300\n"
    check((code, err, out) == (0, "", wanted), f"{code} {out} {err}")
    row = rows()[0]
    head = [row[key] for key in ("name", "commit", "date", "gpu", "gpus", "tokens_per_second", "seconds")]
    check(head == ["first", "abc", "2026-11-28", "NVIDIA H300", 1, 256, 763.0], f"a row begins with {head}")
    check(len(row["loss"]) <= 100 and row["loss"][-1][:2] == [256 * steps, 763.0], f"training loss: {row['loss'][-1]}")
    mean = sum(2 + 1 / 3 + 3 / step for step in range(1, 16)) / 15
    check(row["loss"][0] == [256 * 15, 7.5, round(mean, 5)], f"the first point is the mean of 15 steps: {row['loss'][0]}")
    check(row["val"][0] == [0, 0, 9.0] and row["val"][1] == [256 * 50, 25.0, 2.02] and len(row["val"]) == 32, f"{row['val'][:2]}")
    check(row["position_loss"][1]["loss"] == 2.5 and len(row["gates"]) == 24, "loss by position and gates")
    code, out, err = curves("add", write_log(tmp, "second", log(2)))
    check([(r["name"], round(r["val"][-1][2])) for r in rows()] == [("first", 2), ("second", 4)], f"a replaced row: {out} {err}")
    for name, lines, wanted in (
        ("stopped", log(0)[:-10], "the run stopped at step 1519 of 1526, its last validation is of step 1500; finish it: start scripts/learning.sh"),
        ("cpu", log(0, None), "names no GPU"),
    ):
        code, out, err = curves("add", write_log(tmp, name, lines))
        check(code == 1 and wanted in err and err.count("\n") == 1 and len(rows()) == 2, f"{name}: {code} {out} {err}")
    # one that stopped does not keep another from being added
    code, out, err = curves("add", os.path.join(tmp, "stopped"), first)
    check(code == 0 and err.startswith("note: not added: ") and "1 of them from" in out, f"a stopped run and a complete one: {code} {out} {err}")
    # a run with the name of one of scripts/learning.sh has its flags
    for flags, wanted in (
        ({}, ": -t None: nsa-1 of scripts/learning.sh has 16384; give the run another name: NAME=FOLDER\n"),
        ({**NSA_1, "x": steps, "seed": 2}, ": -seed 2: nsa-1 of scripts/learning.sh has 1; give the run another name: NAME=FOLDER\n"),
        ({**NSA_1, "gate-bias": "0,0,0"}, ": -gate-bias 0,0,0: nsa-1 of scripts/learning.sh has none; give the run another name: NAME=FOLDER\n"),
        (NSA_1, ""),
    ):
        lines = log(0)
        lines[0]["start"]["flags"] |= flags
        lines[0]["start"]["model"] |= {"attn": "nsa", "theta": 1000000}
        code, out, err = curves("add", write_log(tmp, "nsa-1", lines))
        check((code, err[-len(wanted) :] if wanted else err) == (1 if wanted else 0, wanted), f"nsa-1 with {flags}: {code} {out} {err}")
    with open(rows_file, encoding="utf-8") as file:
        kept = [line for line in file if json.loads(line)["name"] != "nsa-1"]
    with open(rows_file, "w", encoding="utf-8") as file:
        file.writelines(kept)
    code, out, err = curves("draw", "third", "-o", "a.svg", "--gpu", "H300")
    check(code == 1 and err == "error: third: no such run on H300; there are first, second\n", f"{code} {out} {err}")
    code, out, err = curves("draw", "first", "-o", "a.svg")
    check(code == 1 and err == "error: first: no such run on H200; there are none; --gpu takes another GPU's: H300\n", f"{code} {out} {err}")
    code, out, err = curves("add", write_log(tmp, "third", log(0, "NVIDIA H200")))
    wanted = "next: python3 dev/results/performance.py writes the tables of dev/results/learning.md\n"
    check(code == 0 and out.endswith(" 1 of them from these folders\n" + wanted), f"a GPU with tables: {code} {out} {err}")
    if not importlib.util.find_spec("matplotlib"):
        return
    for args in ((), ("--time",)):
        pictures = []
        for name in ("a.svg", "b.svg"):
            code, out, err = curves("draw", "first", write_log(tmp, "second", log(2)), "-o", name, "--gpu", "h300", *args)
            check((code, err) == (0, ""), f"draw {args}: {code} {out} {err}")
            with open(os.path.join(root, name), encoding="utf-8") as file:
                pictures.append(file.read())
        check(pictures[0] == pictures[1] and ("training, seconds" in pictures[0]) == bool(args), f"draw {args}: axis and bytes")
    sys.path.insert(0, os.path.join(ROOT, "dev/results"))
    from curves import draw
    from train_log import import_pyplot

    axes = [draw(import_pyplot(), rows(), time).axes[0] for time in (False, True)]
    ends = [axis.lines[3].get_xydata()[-1].tolist() for axis in axes]
    best, worst = (row["val"][-1][2] for row in rows())
    check(ends == [[256 * steps * 1e-6, worst], [763, worst]], f"the last validation of the second run: {ends}")
    low, high = axes[0].get_ylim()
    check(low < best < worst < high < 9, f"the losses at the end, {best} and {worst}, lie between {low} and {high}")


def test_help() -> None:
    """Every script explains itself with -h and --help, changes nothing, and says how it is used."""
    programs = [os.path.join("scripts", f) for f in sorted(os.listdir(SCRIPTS)) if f.endswith((".sh", ".py"))]
    programs = [p for p in programs if not p.endswith(("train_log.py", "common.sh"))]
    programs += ["data/" + name for name in ("get", "corpus", "bpe", "hub", "hellaswag", "mc", "needle")]
    for program in programs:
        path = os.path.join(ROOT, program)
        with open(path, encoding="utf-8") as file:
            command = [sys.executable, path] if program.endswith(".py") or "python3" in file.readline() else [path]
        for flag in ("-h", "--help"):
            with tempfile.TemporaryDirectory() as empty:
                result = subprocess.run([*command, flag], capture_output=True, text=True, cwd=empty)
                right = result.returncode == 0 and os.path.basename(program) in result.stdout and not result.stderr
                check(right and not os.listdir(empty), f"{program} {flag}: {result.returncode} {result.stdout} {result.stderr}")


def test_runs_are_kept(tmp: str) -> None:
    """The scripts of known data resume a run that exists, and stop with one line where a program is missing. The
    trainer and the makers of data are replaced by a program that logs its flags."""
    root = os.path.join(tmp, "root")
    shutil.copytree(SCRIPTS, os.path.join(root, "scripts"))
    for folder in ("build", "data/corpora/books"):
        os.makedirs(os.path.join(root, folder))
    with open(os.path.join(root, "data/corpora/tinyshakespeare.txt"), "w", encoding="utf-8") as file:
        file.write("text")
    env = {name: value for name, value in os.environ.items() if name != "TRAINER"}  # make test sets it
    fake = """#!/bin/bash
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2 ;; -y) resume=$2 ;; esac
    shift
done
case $out in log/*)
    [ "${resume:-}" = 1 ] && [ -f $out/ckpt_00000001.bin ] && touch $out/resumed
    echo '{"step":1,"val_loss":2.5,"val_perplexity":12}' >>$out/log.jsonl
esac
"""
    for script in ("books_124m.sh", "shakespeare.sh", "recall.sh"):
        result = subprocess.run([os.path.join(root, "scripts", script)], capture_output=True, text=True, env=env)
        right = result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        check(right and "build it with make train_gpt_nsa" in result.stderr, f"{script} without programs: {result}")
    for program in ("train_gpt_nsa", "build/text", "build/recall"):
        path = os.path.join(root, program)
        with open(path, "w", encoding="utf-8") as file:
            file.write(fake)
        os.chmod(path, 0o755)
    runs = {
        "books_124m.sh": [f"books_124m_{mode}" for mode in MODES],
        "shakespeare.sh": [f"shakespeare_{mode}_{seed}" for mode in MODES for seed in (1, 2, 3)],
        "recall.sh": [f"recall_256_{mode}" for mode in MODES],
    }
    for script, names in runs.items():
        for name in names:
            os.makedirs(os.path.join(root, "log", name))
            with open(os.path.join(root, "log", name, "ckpt_00000001.bin"), "w", encoding="utf-8"):
                pass
        args = ["256"] if script == "recall.sh" else []
        result = subprocess.run([os.path.join(root, "scripts", script), *args], capture_output=True, text=True, env=env)
        kept = [name for name in names if {"ckpt_00000001.bin", "resumed"} <= set(os.listdir(os.path.join(root, "log", name)))]
        check(result.returncode == 0 and kept == names, f"{script} resumes only {kept}: {result}")


def test_arguments(tmp: str) -> None:
    """Wrong arguments and variables of the scripts: one line, exit code 1, and nothing starts."""
    root = os.path.join(tmp, "arguments")
    shutil.copytree(SCRIPTS, os.path.join(root, "scripts"))
    for folder in ("build", "data/corpora/books", "data/linux"):
        os.makedirs(os.path.join(root, folder))
    for program in ("train_gpt_nsa", "build/text", "build/recall"):
        path = os.path.join(root, program)
        with open(path, "w", encoding="utf-8") as file:
            file.write('#!/bin/bash\necho "$0 $*" >>"${0%/*}/started"\n')
        os.chmod(path, 0o755)
    for name in ("data/corpora/tinyshakespeare.txt", "data/linux/linux_train_000000.bin", "data/linux/linux_val_000000.bin"):
        with open(os.path.join(root, name), "w", encoding="utf-8"):
            pass
    unset = ("TRAINER", "STEPS", "TOKENS", "CONTEXT", "MODES", "GPUS", "SEEDS", "JOBS", "LENGTHS", "MEMORY", "SMOLLM2", "MICRO_TOKENS", "DRY")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    for command, wanted in (
        ("learning.sh nsa", "nsa: no such run; there are nsa-1 "),
        ("learning.sh --foo", "--foo: no such run"),
        ("GPUS=x learning.sh nsa-1", "GPUS=x: x must be a whole number"),
        ("GPUS=3 learning.sh nsa-1", "GPUS=3: "),
        ("MICRO_TOKENS=3 learning.sh nsa-1", "MICRO_TOKENS=3: "),
        ("SMOLLM2=none learning.sh", "SMOLLM2=none: no such file"),
        ("shakespeare.sh --foo", "--foo: shakespeare.sh takes no arguments"),
        ("SEEDS=x shakespeare.sh", "SEEDS=x: x must be a whole number"),
        ("STEPS=abc shakespeare.sh", "STEPS=abc: abc must be"),
        ("JOBS=0 shakespeare.sh", "JOBS=0: 0 must be"),
        ("books_124m.sh foo", "foo: books_124m.sh takes no arguments"),
        ("STEPS=-1 books_124m.sh", "STEPS=-1: -1 must be"),
        ("recall.sh foo", "foo: a context must be"),
        ("recall.sh 256 --bad", "--bad: a context must be"),
        ("recall.sh 0", "0: a context must be"),
        ("STEPS=abc recall.sh", "STEPS=abc: abc must be"),
        ("MODES=foo recall.sh", "MODES=foo: foo must be nsa, full or window"),
        ("GPUS=abc gpus_host.sh -e tiny", "GPUS=abc: abc must be"),
        ("GPUS=0 gpus_host.sh -e tiny", "GPUS=0: nvidia-smi -L lists no GPU"),
        ("GPUS=abc gpus_mpi.sh localhost", "GPUS=abc: abc must be"),
        ("gpus_mpi.sh -e tiny", "no hosts: "),
        ("GPUS=1 gpus_scaling.sh foo", "foo: gpus_scaling.sh takes no arguments"),
        ("GPUS=1 STEPS=x gpus_scaling.sh", "STEPS=x: x must be"),
        ("GPUS=x gpus_losses.sh text", "GPUS=x: x must be"),
        ("GPUS=1 gpus_losses.sh", "no text: "),
        ("llama3_8b.sh foo", "foo: llama3_8b.sh takes no arguments"),
        ("GPUS=x MEMORY=80000 llama3_8b.sh", "GPUS=x: x must be"),
        ("GPUS=8 MEMORY=80000 LENGTHS=64K llama3_8b.sh", "LENGTHS=64K: 64K must be"),
        ("GPUS=8 MEMORY=80000 MATMUL=fp9 llama3_8b.sh", "MATMUL=fp9: must be bf16 or fp8"),
        ("llama3_8b_step.sh foo", "foo: llama3_8b_step.sh takes no arguments"),
        ("LENGTHS=64K llama3_8b_step.sh", "LENGTHS=64K: 64K must be"),
        ("gpus_slurm.sh -e tiny", "not in a Slurm job"),
        ("after_train.sh recall", "after_train.sh TASK TRAINER: two arguments"),
    ):
        words = command.split()
        variables = dict(word.split("=") for word in words if "=" in word)
        script, *args = [word for word in words if "=" not in word]
        program = [os.path.join(root, "scripts", script), *args]
        result = subprocess.run(program, capture_output=True, text=True, cwd=root, env=env | variables, timeout=60)
        right = result.returncode == 1 and result.stderr.startswith("error: " + wanted) and result.stderr.count("\n") == 1
        started = [name for name in ("started", "build/started") if os.path.exists(os.path.join(root, name))]
        check(right and not started, f"{command}: {result} {started}")


def test_signals(tmp: str) -> None:
    """SIGTERM to a script alone, and Ctrl-C, reach its trainers once; they write checkpoints, the script starts nothing more and
    ends with exit code 1."""
    root = os.path.join(tmp, "signals")
    shutil.copytree(SCRIPTS, os.path.join(root, "scripts"))
    for folder in ("build", "data/corpora/books", "data/linux"):
        os.makedirs(os.path.join(root, folder))
    slow = """#!/bin/bash
echo $$ >>started
trap 'echo TERM >>received; signal=15' TERM
trap 'echo INT >>received; signal=2' INT
while [ -z "$signal" ]; do sleep 0.05; done
sleep 0.5
touch checkpoint_$$
exit $((128 + signal))
"""
    for program, text in (("train_gpt_nsa", slow), ("build/text", "#!/bin/bash\n"), ("build/recall", "#!/bin/bash\n")):
        with open(os.path.join(root, program), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(os.path.join(root, program), 0o755)
    for name in ("data/corpora/tinyshakespeare.txt", "data/linux/linux_train_000000.bin", "data/linux/linux_val_000000.bin"):
        with open(os.path.join(root, name), "w", encoding="utf-8"):
            pass
    env = {name: value for name, value in os.environ.items() if name not in ("TRAINER", "GPUS")}

    def lines(name: str) -> list[str]:
        path = os.path.join(root, name)
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8") as file:
            return file.read().split()

    def alive(pid: str) -> bool:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        return True

    def default_signals() -> None:
        """A background job of a shell ignores SIGINT, and bash cannot trap what it was started to ignore."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    for script, runs in (("learning.sh", 1), ("learning.sh", 2), ("shakespeare.sh", 3), ("books_124m.sh", 1), ("recall.sh", 1), ("llama3_8b_step.sh", 1)):
        for name, to_group in (("TERM", False), ("INT", True)):
            for file in os.listdir(root):
                if file.startswith(("started", "received", "checkpoint_")):
                    os.remove(os.path.join(root, file))
            args = ["nsa-1", "full-1", "window-1"] if script == "learning.sh" else []
            program = [os.path.join(root, "scripts", script), *args]
            env["CUDA_VISIBLE_DEVICES"] = "0,1" if (script, runs) == ("learning.sh", 2) else "0"
            process = subprocess.Popen(program, cwd=root, env=env, start_new_session=True, preexec_fn=default_signals,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            for _ in range(200):
                if len(lines("started")) == runs:
                    break
                time.sleep(0.05)
            time.sleep(0.2)
            number = getattr(signal, "SIG" + name)
            (os.killpg if to_group else os.kill)(process.pid, number)
            try:
                out = process.communicate(timeout=20)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                out = b"it went on"
            pids = lines("started")
            saved = [pid for pid in pids if os.path.exists(os.path.join(root, "checkpoint_" + pid))]
            left = [pid for pid in pids if alive(pid)]
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            right = process.returncode == 1 and len(pids) == runs and saved == pids and not left and lines("received") == [name] * runs
            check(right, f"SIG{name} to {script}: {process.returncode} {out} started {pids} saved {saved} left {left} {lines('received')}")
    with open(os.path.join(root, "train_gpt_nsa"), "w", encoding="utf-8") as file:
        file.write("#!/bin/bash\nsleep 0.5\nkill -KILL $$\n")
    env["TRAINER"] = "train_gpt_nsa"
    result = subprocess.run([os.path.join(root, "scripts/learning.sh"), "nsa-1"], capture_output=True, text=True, cwd=root, env=env)
    right = result.returncode == 1 and result.stderr.startswith("error: process ") and " was ended by SIGKILL; " in result.stderr
    check(right and result.stderr.count("\n") == 1, f"a trainer that is killed: {result}")


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        test_reader(tmp)
        test_errors(tmp)
        if has("matplotlib"):
            test_plots(tmp)
            test_position(tmp)
            test_needle(tmp)
            test_blocks(tmp)
        if has("tensorboard"):
            test_tensorboard(tmp)
        if has("wandb"):
            test_wandb(tmp)
        test_runs_are_kept(tmp)
        test_arguments(tmp)
        with ThreadPoolExecutor() as pool:
            signals = pool.submit(test_signals, tmp)  # which waits most of the time
            test_learning(tmp)
            test_recall(tmp)
            test_curves(tmp)
            signals.result()
    test_help()
    finish()


if __name__ == "__main__":
    main()
