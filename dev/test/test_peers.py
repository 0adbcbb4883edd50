"""dev/peers: wrong, failing, hanging and missing systems are reported as such, and errors in arguments take one line.
make test runs it, without a GPU. Without PyTorch it tests the arguments alone."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from checks import check, finish, skip

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))

# A system whose parts are wrong in different ways.
FAULTY = '''
import os
import time
from systems import ours

def version():
    return "faulty 1.0"
def nan(x):
    return ours.core(x) * float("nan")
def raises(x):
    raise ValueError("nothing works\\nsecond line")
def hangs(x):
    time.sleep(600)
def dies(x):
    os._exit(3)
def wrong_gradient(x):
    o = ours.window(x)
    return o + 0.1 * (o - o.detach())
PARTS = {"core": nan, "core_mean": raises, "core_mean64": hangs, "sel": dies, "win": wrong_gradient, "full": ours.full}
BLOCKS = ours.BLOCKS
'''
# A system that selects blocks by the first query head of each KV head alone, attends to them rightly, and refuses one shape.
OTHER_BLOCKS = '''
import flash_sparse_attention as fsa
from systems import ours
from sizes import BLOCKS as SELECTION, CMP, WINDOW

FORWARD_ONLY = ("sel", "core_mean")
def version():
    return "2.0"
def refuses(part, n, hq, hkv):
    return "needs an odd number of heads" if hq == 4 else None
def blocks(x):
    first = slice(None, None, x.q.shape[1] // x.k.shape[1])
    return fsa.native_sparse_attention(x.q[:, first], x.k, x.v, x.gate[:, first], cu_seqlens=x.cu_seqlens, window=WINDOW,
                                       return_block_indices=True, **CMP, **SELECTION)[1]
def core_mean(x):
    return fsa.native_sparse_attention(x.q, x.k, x.v, x.gate, cu_seqlens=x.cu_seqlens, window=WINDOW,
                                       block_indices=blocks(x), **CMP, **SELECTION)
PARTS = {"sel": lambda x: 1.05 * ours.selected(x), "core_mean": core_mean}
BLOCKS = {"core_mean": blocks}
'''
MISSING = "import a_package_that_nobody_has\n"


def run(*args: str) -> tuple[int, str, str]:
    program = [sys.executable, os.path.join(ROOT, "dev/peers/run.py"), *args]
    result = subprocess.run(program, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def expect_error(message: str, *args: str) -> None:
    code, out, err = run(*args)
    right = (code, out) == (1, "") and err == f"error: {message}\n"
    check(right, f"{' '.join(args)}: code {code}, {out!r}, {err!r}; expected {message!r}")


def test_arguments() -> None:
    names = "ours, flash_nsa, fsa, nsa, cudnn, fa4, fla, cudnn_nsa"
    parts = "core, core_mean, core_mean64, sel, win, full, step"
    expect_error(f"--peers nobody: must be one of {names}, or a Python file that exists", "--peers", "nobody")
    expect_error(f"--peers no.py: must be one of {names}, or a Python file that exists", "--peers", "ours", "no.py")
    expect_error(f"--parts all: must be one of {parts}", "--parts", "all")
    expect_error("--lengths 63: must be a number of tokens, at least 64", "--lengths", "8192", "63")
    expect_error("--lengths 64K: must be a number of tokens, at least 64", "--lengths", "64K")
    expect_error("--steps 0: must be a number of tokens, at least 64", "--steps", "0")
    expect_error("--steps 8192: needs --device cuda; leave it out", "--device", "cpu", "--steps", "8192")
    for heads in ("32", "32,0", "32,5", "32,1", "a,b"):
        rule = "must be query heads,KV heads with 1 to 16 query heads for each KV head, as 32,8"
        expect_error(f"--heads {heads}: {rule}", "--heads", heads)
    expect_error("--limit 0: must be at least 1 second", "--limit", "0")
    expect_error("--deadline -1: must be at least 1 second", "--deadline", "-1")
    expect_error("argument --limit: invalid int value: 'x'; see --help", "--limit", "x")
    expect_error("unrecognized arguments: --fast; see --help", "--fast")
    code, out, err = run("--help")
    check(code == 0 and "parts:" in out and not err, f"--help: {code}, {err!r}")


def write(folder: str, name: str, text: str) -> str:
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def measure(folder: str, *args: str) -> tuple[int, list[str], list[dict]]:
    """Runs a measurement on the CPU. Returns the exit code, the lines of output and the rows."""
    rows = os.path.join(folder, "rows.jsonl")
    if os.path.exists(rows):
        os.remove(rows)
    code, out, err = run("--device", "cpu", "--out", rows, *args)
    check(err == "", f"{args}: {err}")
    lines = open(rows, encoding="utf-8").readlines() if os.path.exists(rows) else []
    return code, out.splitlines(), [json.loads(line) for line in lines]


def says(lines: list[str], *words: str) -> None:
    found = any(all(word in line for word in words) for line in lines)
    check(found, f"no line with {words} in:\n" + "\n".join(lines))


def test_right(folder: str) -> None:
    parts = ("core", "core_mean", "sel", "win", "full")
    code, lines, rows = measure(folder, "--peers", "ours", "--lengths", "1100", "--heads", "2,1")
    check(code == 0 and lines[-1] == "10 rows, 0 wrong, 0 with other blocks", f"ours is right: {code}, {lines}")
    check([(r["part"], r["dir"]) for r in rows] == [(p, d) for p in parts for d in ("fwd", "bwd")], f"rows: {rows}")
    says(lines, "| tokens | heads | NSA, ours (ms) | NSA, ours, mean (ms) | full, ours (ms) |")
    says(lines, "| 1,100 | (2, 1) | ")
    says(lines, "cpu, commit ", "all systems in one run")
    fields = {"peer": "ours", "gpu": "cpu", "n": 1100, "hq": 2, "hkv": 1, "d": 128, "block": 64, "topk": 16}
    for row in rows:
        check(fields.items() <= row.items() and 0 < row["error"] < 0.01 and row["ms"] > 0, f"row: {row}")
        check(all(row[name] for name in ("version", "commit", "date", "run", "torch")), f"row: {row}")
        check(row["wrong"] is False and row.get("blocks", 1) > 0.95 and not row.get("other_blocks"), f"row: {row}")


def test_faulty(folder: str) -> None:
    faulty = write(folder, "faulty.py", FAULTY)
    args = ("--peers", faulty, write(folder, "missing.py", MISSING), "--lengths", "128", "--heads", "2,1")
    code, lines, rows = measure(folder, *args, "--limit", "10")
    check(code == 1, f"exit code {code}")
    says(lines, "faulty ", "core ", "fwd", "error inf", "WRONG")
    says(lines, "core_mean ", "FAILED: ValueError: nothing works ... second line")
    says(lines, "| ", "raise ValueError")
    says(lines, "core_mean64", "FAILED: no result in 10 s; --limit allows more")
    says(lines, "sel ", "FAILED: exit code 3")
    says(lines, "missing ", "skipped: ModuleNotFoundError: No module named 'a_package_that_nobody_has'")
    check(lines[-1] == "6 rows, 3 wrong, 0 with other blocks; some measurements failed, see above", f"last line: {lines[-1]}")
    wrong = [(row["part"], row["dir"]) for row in rows if row["wrong"]]
    check(wrong == [("core", "fwd"), ("core", "bwd"), ("win", "bwd")], f"wrong: {wrong}")
    check([row["part"] for row in rows if not row["wrong"]] == ["win", "full", "full"], f"rows: {rows}")
    check(all(row["peer"] == "faulty" and row["version"] == "faulty 1.0" for row in rows), f"rows: {rows}")


def processes(word: str) -> list[str]:
    """Returns the running processes with a word in their command line."""
    result = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in result.stdout.splitlines() if word in line and "harness.py" in line]


def test_ends(folder: str) -> None:
    """A deadline and SIGTERM end the systems too."""
    faulty = os.path.join(folder, "faulty.py")
    args = ("--peers", faulty, "--lengths", "128", "--heads", "2,1", "--parts", "core_mean64", "full")
    code, lines, rows = measure(folder, *args, "--deadline", "8")
    check(code == 1 and rows == [], f"--deadline: {code}, {rows}")
    says(lines, "faulty ", "FAILED: the deadline passed")
    check(lines[-1] == "0 rows, 0 wrong, 0 with other blocks; some measurements failed, see above", f"--deadline: {lines}")
    program = [sys.executable, os.path.join(ROOT, "dev/peers/run.py"), "--device", "cpu", *args]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    check("faulty 1.0" in line and len(processes(faulty)) == 1, f"SIGTERM: {line}, {processes(faulty)}")
    process.terminate()
    _, err = process.communicate(timeout=60)
    check((process.returncode, err) == (1, "error: ended by SIGTERM\n"), f"SIGTERM: {process.returncode}, {err!r}")
    check(processes(faulty) == [], f"SIGTERM: {processes(faulty)}")


def test_other_blocks(folder: str) -> None:
    peer = write(folder, "other_blocks.py", OTHER_BLOCKS)
    args = ("--lengths", "1536", "--heads", "2,1", "4,1", "--parts", "core_mean", "sel")
    code, lines, rows = measure(folder, "--peers", peer, *args)
    check(code == 0 and lines[-1] == "2 rows, 1 wrong, 1 with other blocks", f"{code}, {lines}")
    notes = ["note: other_blocks: 1 with other blocks", "note: other_blocks: 1 wrong"]
    check(lines[-3:-1] == notes, f"notes on another system: {lines}")
    says(lines, "(4, 1)", "skipped: needs an odd number of heads")
    by_part = {row["part"]: row for row in rows}
    says(lines, "core_mean ", "blocks 0.", "OTHER BLOCKS")
    core = by_part["core_mean"]
    check(core["error"] < 0.01 and not core["wrong"] and core["blocks"] < 0.9 and core["other_blocks"], f"rows: {rows}")
    check(0.04 < by_part["sel"]["error"] < 0.06 and by_part["sel"]["dir"] == "fwd", f"rows: {rows}")
    ours = write(folder, "ours.py", OTHER_BLOCKS)  # the name counts as ours
    for part, n, mark in (("sel", "128", "1 wrong, 0 with other blocks"), ("core_mean", "1536", "0 wrong, 1 with other blocks")):
        code, lines, _ = measure(folder, "--peers", ours, "--lengths", n, "--heads", "2,1", "--parts", part)
        check(code == 1 and lines[-1] == f"1 rows, {mark}", f"ours, {part}: {code}, {lines}")


def test_no_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        expect_error("PyTorch sees no GPU; --device cpu tests these programs without one")
    args = ("--device", "cpu", "--peers", "ours", "--lengths", "64", "--heads", "1,1", "--parts", "full")
    code, _, err = run(*args, "--out", "/no/such/folder/rows.jsonl")
    message = "error: /no/such/folder/rows.jsonl: No such file or directory; --out names another file\n"
    check((code, err) == (1, message), f"--out: {code}, {err}")


def main() -> None:
    test_arguments()
    if importlib.util.find_spec("torch"):
        test_no_gpu()
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, ThreadPoolExecutor() as pool:
            waiting = pool.submit(lambda: (test_faulty(a), test_ends(a)))  # most of their time
            test_right(b)
            test_other_blocks(b)
            waiting.result()
    else:
        skip("the measurements of dev/peers need the Python package torch")
    finish()


if __name__ == "__main__":
    main()
