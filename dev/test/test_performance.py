"""dev/results/performance.py: its tables and chart agree with the rows, and --check notices when they do not.
make test runs it; it needs python3 alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

from checks import check, finish

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
sys.path.insert(0, os.path.join(ROOT, "dev/results"))
import learning  # noqa: E402
from performance import CHART, MEASURED, PEERS, run_tables  # noqa: E402

FILE, COMMIT = MEASURED["H200"]["attention"]
PEERS_FILE = "dev/results/" + PEERS["H200"]


def run(root: str, *args: str) -> tuple[int, str, str]:
    """Runs the program of the copy in root. Returns its exit code, output and errors."""
    program = [sys.executable, os.path.join(root, "dev/results/performance.py"), *args]
    result = subprocess.run(program, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def copy(tmp: str, name: str) -> str:
    """Returns a new folder with README.md, dev/results, fsa/docs and what performance.py imports."""
    root = os.path.join(tmp, name)
    for folder in ("dev/results", "fsa/docs"):
        shutil.copytree(os.path.join(ROOT, folder), os.path.join(root, folder))
    os.makedirs(os.path.join(root, "data"))
    for file in ("README.md", "data/shards.py"):
        shutil.copy(os.path.join(ROOT, file), os.path.join(root, file))
    return root


def replace(path: str, old: str, new: str) -> None:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    check(old in text, f"{path} does not contain {old!r}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new, 1))


def expect(what: str, result: tuple[int, str, str], code: int, contents: str) -> None:
    right = result[0] == code and contents in result[1] + result[2] and "Traceback" not in result[2]
    check(right, f"{what}: {result}; expected code {code} and {contents!r}")


def test_repo() -> None:
    result = run(ROOT, "--check")
    check(result == (0, "", ""), f"the repo's own tables and chart: {result[2]}")


def test_differences(tmp: str) -> None:
    """A change on either side is noticed, named and repaired."""
    changes = {
        "a number in a table": ("README.md", "| 64K |", "| 64K | 1", "README.md: table summary"),
        "the chart": (CHART, "ms</text>", "s</text>", CHART),
        "a kernel's page": ("fsa/docs/topk.md", "| 64K |", "| 64K | 1", "fsa/docs/topk.md: table kernel H200"),
        "a row": (PEERS_FILE, '"ms": ', '"ms": 9', "performance.md: table attention"),
    }
    for i, (what, (file, old, new, message)) in enumerate(changes.items()):
        root = copy(tmp, f"change{i}")
        replace(os.path.join(root, file), old, new)
        expect(what, run(root, "--check"), 1, message)
        expect(f"{what}: nothing was written", run(root, "--check"), 1, message)
        expect(f"{what}: written", run(root), 0, "wrote ")
        check(run(root, "--check") == (0, "", ""), f"{what}: agrees when it is written")


def step(attn: str, n: int, gpus: int, speed: float, **other: object) -> dict[str, object]:
    """Returns a row of a training step, as train_gpt_nsa -profile writes it."""
    row = {"commit": "abc1234", "date": "2026-12-01", "gpu": "NVIDIA H200", "gpus": gpus, "program": "train_gpt_nsa"}
    row |= {"part": "step", "attn": attn, "dir": "step", "n": n, "hq": 32, "hkv": 8, "d": 128, "dtype": "bf16"}
    row |= {"ms": 1e3 * n * gpus / speed, "layers": 4, "channels": 4096, "vocab": 32768, "micro_batches": 1}
    row |= {"recompute": 0, "tokens_per_second": speed, "mfu": 0.5, "memory_bytes": 2**34}
    parts = "products attention_forward attention_backward classifier norms optimizer"
    return row | {"split": dict.fromkeys(parts.split(), 1.5)} | other


def test_scaling(tmp: str) -> None:
    """Rows of several GPUs, and of full attention at all lengths: the tables and the sentence of them."""
    root = copy(tmp, "scaling")
    lengths = (8192, 16384, 32768, 65536)
    rows = [step(attn, n, 1, 80000) for attn in ("nsa", "full") for n in lengths]
    rows += [step("nsa", n, 2, speed, zero=1, cp=1) for n, speed in ((8192, 156000), (16384, 154000))]
    rows += [step("nsa", 8192, 2, 150000, zero=0, cp=1), step("nsa", 131072, 2, 90000, zero=1, cp=2, recompute=1)]
    del rows[0]["gpus"]  # absent: one GPU
    llama = {"layers": 32, "vocab": 128256, "recompute": 2, "zero": 1, "commit": "abc1235"}
    for n, cp, nsa, full in ((32768, 1, 32000, 20000), (131072, 2, 28000, 10000)):
        rows += [step("nsa", n, 4, nsa, cp=cp, **llama), step("full", n, 4, full, cp=cp, **llama)]
    with open(os.path.join(root, "dev/results/h200_new.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    new = 'MEASURED["H200"] |= dict.fromkeys(("step", "scaling"), ("h200_new.jsonl", "abc1234"))'
    new += '; MEASURED["H200"]["llama3_8b"] = ("h200_new.jsonl", "abc1235")'
    replace(os.path.join(root, "dev/results/performance.py"), "\nPEERS = ", f"\n{new}\nPEERS = ")
    expect("rows of several GPUs", run(root), 0, "wrote README.md: table scaling_sentence H200")
    check(run(root, "--check") == (0, "", ""), "tables of several GPUs agree when they are written")
    with open(os.path.join(root, "README.md"), encoding="utf-8") as file:
        readme = file.read()
    sentence = "With `-z 1`, 2 GPUs train 1.95 times as fast as one (2 H200s of one host, commit abc1234, 2026-12-01, 8K"
    check(sentence in readme, "README has the sentence on two GPUs")
    with open(os.path.join(root, "dev/results/performance.md"), encoding="utf-8") as file:
        page = file.read()
    model = "nsa, 4 layers, 4,096 channels, vocabulary 32,768 | 1 x 1"
    for line in (
        "H200s of one host, commit abc1234, 2026-12-01.",
        f"| 8K | {model} | 1 |  | 102 | 80,000 | 1.00 | 50.0 | 16.0 |",
        f"| 8K | {model} | 2 | `-z 0` | 109 | 150,000 | 1.88 | 50.0 | 16.0 |",
        f"| 8K | {model} | 2 | `-z 1` | 105 | 156,000 | 1.95 | 50.0 | 16.0 |",
        f"| 128K | {model} | 2 | `-z 1 -cp 2 -r 1` | 2,913 | 90,000 | - | 50.0 | 16.0 |",
        *(f"| {n // 1024}K | full | 1.50 | 1.50 |" for n in lengths),
        "| 32K | 8,000 | 8,400 | 5,000 | 5,960 | 1.60 | 3,890 |",  # the predictions are those of the repo
        "| 128K | nsa | `-z 1 -cp 2 -r 2` |",
    ):
        check(line in page, f"performance.md has no {line!r}")


def test_learning(tmp: str) -> None:
    """Rows of training runs: the tables of learning.md, and of none of them where there are no rows."""
    root = copy(tmp, "learning")
    page = os.path.join(root, "dev/results/learning.md")

    def row(name: str, loss: float, attn: str = "nsa", **other: object) -> dict[str, object]:
        result = {"name": name, "commit": "abc1234", "date": "2026-12-01", "gpu": "NVIDIA H200", "gpus": 1, "seconds": 1234.5}
        result |= {"flags": {"matmul": "bf16", "l": 6e-4}, "model": {"attn": attn}, "tokens_per_second": 345678}
        buckets = [{"from": begin, "loss": loss + begin / 2**20} for begin in (0, 128, 256)]
        result |= {"val": [[0, 0, 9.7], [200, 1234.5, loss]], "position_loss": buckets}
        return result | ({"gates": [[0.25, 0.5, 0.75], [0.125, 0.5, 1]]} if attn == "nsa" else {}) | other

    def write(*rows: dict[str, object]) -> None:
        with open(os.path.join(root, "dev/results/curves_h200.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    with open(page, encoding="utf-8") as file:
        old = file.read()
    old = re.sub(r"(<!-- table learning_64k H200 -->\n).*?(?=<!-- end -->)", r"\1Not run yet.\n", old, flags=re.DOTALL)
    with open(page, "w", encoding="utf-8") as file:
        file.write(old)
    tables = re.findall(r"<!-- table (\w+) ", old)
    check(sorted(tables) == sorted(learning.tables()), f"learning.md has each of its tables once: {tables}")
    names = re.search(r"<<'END'\n(.*?)END", open(os.path.join(ROOT, "scripts/learning.sh"), encoding="utf-8").read(), re.DOTALL)
    runs = {line.split()[0] for line in names[1].splitlines()}
    runs |= {f"50m-{kv}-kv-{seed}" for kv in ("shared", "separate", "equal") for seed in (1, 2)}  # of separate_kv.py
    runs |= {"50m-graded-1-bf0dded", "graded-1-bf0dded", "window-1-d73accb", "graded-64k-bf0dded", "window-64k-d73accb"}  # at other commits
    runs |= {f"50m-{run}-0603293" for run in ("graded-1", "nsa-1", "nsa-2")}  # at other commits, with micro-batches of one sequence
    shown = {run for group, _ in learning.tables().values() for run in group}
    check(shown == runs, f"the tables show all runs: {shown ^ runs}")
    pairs = [*learning.LOSSES.values(), *(runs for _, runs in learning.CONTINUED.values())]
    compared = {run: other for table in pairs for run, other in table}
    rated = {run for groups in learning.RATES.values() for group in groups.values() for run in group}
    check(set(compared) | rated == runs and set(filter(None, compared.values())) <= runs, "every run has its loss in a table")

    check(learning.runs_of("nsa") == ["nsa-1", "nsa-2", "nsa-3"], f"the seeds of nsa: {learning.runs_of('nsa')}")

    rows = [row("full-1", 2.5, "full", seconds=2345), row("nsa-1", 2.4875), row("window-1", 2.75, "window")]
    rows += [row("nsa-2", 2.5125), row("zero-1", 2.5), row("zero-2", 2.75)]
    rows += [row("graded-1", 2.4875), row("graded-fp8-1", 2.5, flags={"matmul": "fp8", "l": 6e-4}, commit="abc1235")]
    rows += [row("50m-graded-1", 3.25), row("50m-graded-2", 3.25), row("full-x6-1", 2.25, "full", flags={"matmul": "bf16", "l": 3.6e-3})]
    # equal times: one that goes on after the other has ended, one that never gets so low, one that is so low before training,
    # and one on another number of GPUs
    slow = [[0, 0, 9], [100, 1000, 3], [200, 2000, 2.5]]
    rows += [row("50m-full-2", 2.75, "full", val=[[0, 0, 9], [200, 1200, 2.75]], seconds=1200), row("50m-graded-hybrid-1", 0, val=slow)]
    rows += [row("50m-graded-mean-1", 2.5, gpus=2), row("350m-full", 2.5, "full", seconds=100), row("350m-nsa", 0, val=[[0, 0, 2.5], [20, 90, 2.25]])]
    val = [[0, 0, 3.5], [1048576, 2, 3.25], [2097152, 4, 3], [9437184, 6, 2.75], [10485760, 8, 2.5], [49938432, 9, 2.25]]
    rows += [row("smollm2-8k-full", 0, "full", val=val), row("smollm2-8k-nsa", 0, val=[[*point[:2], point[2] + 0.125] for point in val])]
    rows += [row("50m-zero-1", 3), row("50m-zero-2", 3.5), row("50m-nsa-1", 3)]
    write(*rows)
    expect("rows of training runs", run(root), 0, "wrote dev/results/learning.md: table learning_200m H200")
    check(run(root, "--check") == (0, "", ""), "tables of training runs agree when they are written")
    with open(page, encoding="utf-8") as file:
        text = file.read()
    for line in (
        "1 H200 a run, commits abc1234, abc1235, 2026-12-01.",
        "| run | attention | matmuls | validation loss | compared with | difference | tokens/s | time (s) | commit |",
        "| full-1 | full | bf16 | 2.5000 | nsa-1 | +0.0125 | 345,678 | 2,345 | abc1234 |",
        "| window-1 | window | bf16 | 2.7500 | nsa-1 | +0.2625 | 345,678 | 1,234 | abc1234 |",
        "| nsa-1 | nsa | bf16 | 2.4875 | - | - | 345,678 | 1,234 | abc1234 |",
        "| graded-fp8-1 | nsa | fp8 | 2.5000 | graded-1 | +0.0125 | 345,678 | 1,234 | abc1235 |",
        "| zero-2 | nsa | bf16 | 2.7500 | nsa-2 | +0.2375 | 345,678 | 1,234 | abc1234 |",
        "| nsa | 2 | 2.5000 | 0.0177 | - | - | - |",
        "| zero | 2 | 2.6250 | 0.1768 | +0.1250 | 0.1256 | -1.47 to +1.72 |",
        "| runs | 6e-4 | 3.6e-3 |",
        "| nsa | 2.4875, 2.5125 | - |",
        "| full | 2.5000 | 2.2500 |",
        "| position | nsa-1 | full-1 | window-1 | nsa-1 - full-1 | nsa-1 - window-1 |",
        "| 0 to 127 | 2.4875 | 2.5000 | 2.7500 | -0.0125 | -0.2625 |",
        "| 256 to 511 | 2.4877 | 2.5002 | 2.7502 | -0.0125 | -0.2625 |",
        "| nsa-1 | full-1 | 2,345 | 2.5000 | 2.4875 | -0.0125 | 1,232 | 0.53 |",
        "| window-1 | full-1 | 2,345 | 2.5000 | 2.7500 | +0.2500 | - | - |",
        "| 50m-graded-1 | 50m-full-2 | 1,200 | 2.7500 | 3.4303 | +0.6803 | - | - |",
        "| 50m-graded-hybrid-1 | 50m-full-2 | 1,200 | 2.7500 | 2.9000 | +0.1500 | 1,500 | 1.25 |",
        "| 350m-nsa | 350m-full | 100 | 2.5000 | 2.2500 | -0.2500 | 0 | 0.00 |",
        "| smollm2-8k-full | full | 3.5000 | 3.2500 | 2.5000 | 2.2500 | - | - | 345,678 | 1,234 | abc1234 |",
        "| smollm2-8k-nsa | nsa | 3.6250 | 3.3750 | 2.6250 | 2.3750 | smollm2-8k-full | +0.1250 / +0.1250 / +0.1250 / +0.1250 | 345,678 | 1,234 | abc1234 |",
        "| 50m-zero | 2 | 3.2500 | 0.3536 | - | - | - |",
        "| 50m-graded | 2 | 3.2500 | 0.0000 | +0.0000 | 0.2500 | -3.18 to +3.18 |",
        "| layer | nsa-1 | nsa-2 | graded-1 | zero-1 | zero-2 |",
        "| 1 | 0.12 / 0.50 / 1.00 | 0.12 / 0.50 / 1.00 | 0.12 / 0.50 / 1.00 |",
    ):
        check(line in text, f"learning.md has no {line!r}")
    check("| 50m-nsa | 1 |" not in text, "no mean of one run")
    check("| 50m-graded-mean-1 | 50m-full-2 | 1,200" not in text, "no equal times on other numbers of GPUs")
    check("<!-- table learning_64k H200 -->\nNot run yet.\n<!-- end -->" in text, "a table without rows is left out")
    # three seeds each with the same variance: four degrees of freedom
    three = {f"{name}-{i}": row(f"{name}-{i}", i + (name == "window")) for name in ("nsa", "window") for i in (1, 2, 3)}
    got = learning.seeds(three, ["nsa", "window"])[1]
    check(got[1] == ["window", "3", "3.0000", "1.0000", "+1.0000", "0.8165", "-1.27 to +3.27"], f"an interval of three seeds each: {got}")
    # README's table needs each attention mode at 64K
    check(learning.overview({row["name"]: row for row in rows})[1:] == ([], []), "no overview without runs at 64K")
    longer = [row(f"{mode}-64k", 2, mode, tokens_per_second=100_000 * i) for i, mode in enumerate(("nsa", "full", "window"), 1)]
    write(*rows, *longer, row("nsa-3", 2, commit="abc1235"))
    expect("runs at 64K", run(root), 0, "wrote README.md: table loss H200")
    with open(os.path.join(root, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for line in ("| nsa | 2.487, 2.513 | 345,678 | 2.000 | 100,000 |", "| full | 2.500 | 345,678 | 2.000 | 200,000 |"):
        check(line in text, f"README has no {line!r}")
    mixed = {row["name"]: row for row in [*rows, *longer[:2], {**longer[2], "commit": "abc1235"}]}
    check(learning.overview(mixed)[1:] == ([], []), "README's table is of one commit")
    write(rows[0], row("nsa-1", 2.4), *rows[2:])
    expect("another loss", run(root, "--check"), 1, "dev/results/learning.md: table learning_positions_200m H200 does not agree")
    run(root)
    shutil.copy(os.path.join(root, "dev/results/curves_h200.jsonl"), os.path.join(root, "dev/results/curves_a100-sxm4-80gb.jsonl"))
    code, out, err = run(root)
    wanted = "/curves_a100-sxm4-80gb.jsonl; python3 dev/results/curves.py draw NAME... --gpu A100-SXM4-80GB -o FILE draws them\n"
    right = (code, err) == (0, "") and out.startswith("note: no page has tables of the runs in ") and out.endswith(wanted)
    check(right and out.count("\n") == 1, f"rows of a GPU without tables: {code} {out} {err}")
    check(run(root, "--check") == (0, "", ""), "rows of a GPU without tables agree with all pages")


def test_errors(tmp: str) -> None:
    """Every error is one line that names the file."""
    program = "dev/results/performance.py"
    changes = {
        "no such table": ("README.md", "<!-- table summary H200 -->", "<!-- table sumary H200 -->", "no table"),
        "no such GPU": ("README.md", "<!-- table summary H200 -->", "<!-- table summary H300 -->", "no table"),
        "no end": ("README.md", "<!-- end -->", "", "needs an <!-- end -->"),
        "no JSON": (PEERS_FILE, "{", "", "line 1 is not JSON"),
        "another GPU": (PEERS_FILE, "NVIDIA H200", "NVIDIA H100", "line 1 is of an NVIDIA H100, not of an H200"),
        "no such file": (program, f'"{FILE}"', '"none.jsonl"', "none.jsonl: No such file"),
        "no such commit": (program, f'"{COMMIT}"', '"none"', "no row of commit none"),
    }
    for i, (what, (file, old, new, message)) in enumerate(changes.items()):
        root = copy(tmp, f"error{i}")
        replace(os.path.join(root, file), old, new)
        result = run(root, "--check")
        expect(what, result, 1, message)
        check(result[2].count("\n") == 1 and result[2].startswith("error: "), f"{what}: {result}")


def test_one_run(tmp: str) -> None:
    """Rows of one run of make peers: ours comes from it too, and wrong results and other blocks are marked."""
    root = copy(tmp, "one_run")
    rows = []
    systems = {"ours": ("core", "core_mean", "full"), "flash_nsa": ("core_mean", "sel"), "fa4": ("full",), "cudnn_nsa": ("sel",)}
    for ms, (peer, parts) in enumerate(systems.items(), 1):
        row = {"peer": peer, "gpu": "NVIDIA H200", "commit": "abc1234", "date": "2026-12-01", "run": "2026-12-01T00:00:00Z"}
        row |= {"n": 65536, "hq": 32, "hkv": 8, "wrong": False}
        rows += [row | {"part": part, "dir": dir, "ms": ms} for part in parts for dir in ("fwd", "bwd")]
    rows.pop()  # the backward pass of cudnn_nsa
    rows += [rows[0] | {"part": "step", "dir": "step", "ms": 700, "attention": "core"}]
    rows += [rows[0] | {"peer": "flash_nsa", "part": "step", "dir": "step", "n": n, "ms": 900, "attention": "core_mean"} for n in (32768, 65536)]
    next(row for row in rows if (row["peer"], row["part"]) == ("flash_nsa", "sel"))["wrong"] = True
    next(row for row in rows if (row["peer"], row["part"]) == ("flash_nsa", "core_mean"))["other_blocks"] = True
    with open(os.path.join(root, PEERS_FILE), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    expect("one run of make peers", run(root), 0, "wrote dev/results/performance.md: table selected H200")
    with open(os.path.join(root, "dev/results/performance.md"), encoding="utf-8") as file:
        page = file.read()
    for line in (
        "H200, commit abc1234, 2026-12-01, all systems in one run of `make peers`.",
        "| 64K | (32, 8) | 1.00 / 1.00 | 1.00 / 1.00 | 2.00 (other blocks) / 2.00 | 1.00 / 1.00 | 3.00 / 3.00 |",  # NSA and full attention
        "| 64K | (32, 8) | 2.00 (wrong) / 2.00 | 4.00 |",  # the selected branch
        "NSA, PyTorch with ours (ms)",
        "| 32K | 372 | 275 | - | 900 | 538 |",  # a step takes the marks of its system's attention at the same length
        "| 64K | 779 | 562 | 700 | 900 (other blocks) | 1,521 |",
    ):
        check(line in page, f"performance.md has no {line!r}")
    with open(os.path.join(root, "README.md"), encoding="utf-8") as file:
        check("| 64K | 2.00 | 2.00 | 4.00 (other blocks) | 2.00 | 6.00 |" in file.read(), "README.md does not mark other blocks")


def test_runs(tmp: str) -> None:
    """Several runs of make peers in a file: the newest one that the headline needs is shown; and files that no page uses."""
    root = copy(tmp, "runs")
    path = os.path.join(root, PEERS_FILE)

    def read(page: str) -> str:
        with open(os.path.join(root, page), encoding="utf-8") as file:
            return file.read()

    def append(path: str, day: int, *peers: str, **other: str) -> None:
        """Adds the committed rows of these peers, or of all, as a run of its own, of DAY ms each."""
        rows = [row | {"commit": f"abc000{day}", "date": f"2026-12-0{day}", "run": f"2026-12-0{day}T00:00:00Z"} | other for row in committed]
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row | {"ms": day}) + "\n" for row in rows if not peers or row["peer"] in peers)

    committed = [json.loads(line) for line in read(PEERS_FILE).splitlines()]
    headline = re.search("<!-- table headline H200 -->.*?<!-- end -->", read("README.md"), re.DOTALL)[0]
    append(path, 2)
    expect("a second run", run(root), 0, "wrote README.md: table headline H200")
    check(run(root, "--check") == (0, "", ""), "tables of the second run agree when they are written")
    step = "One H200, commit 0603293, 2026-11-29. PyTorch: another H200, commit abc0002, 2026-12-02."
    for text in ("(H200, commit abc0002, 2026-12-02, all systems in one run", "| 64K | 4.00 | 4.00 | 4.00 |", step):
        check(text in read("README.md"), f"README.md after a second run has no {text!r}")
    append(path, 1)
    append(path, 3, "ours", "cudnn")
    code, out, err = run(root)
    notes = [f"note: no table shows the {kind} of the run 2026-12-03T00:00:00Z in {PEERS_FILE}; " for kind in ("attention", "training steps")]
    lines = out.splitlines()
    right = (code, err, len(lines)) == (0, "", 2) and all(line.startswith(note) for line, note in zip(lines, notes))
    check(right, f"an older run and one of two systems: {code} {out} {err}")

    os.remove(path)
    append(path, 3, "ours", "cudnn")
    old = read("README.md")
    expect("a run of two systems alone", run(root), 0, "wrote README.md: table summary H200")
    check(run(root, "--check") == (0, "", ""), "tables of two systems agree when they are written")
    for text in ("| tokens | NSA, ours (ms) | NSA, ours, mean (ms) | full, ours (ms) | full, cuDNN (ms) |", "| 64K | 6.00 | 6.00 | 6.00 | 6.00 |"):
        check(text in read("README.md"), f"README.md of two systems has no {text!r}")
    part = old[old.index("<!-- table headline") : old.index("At 8K tokens")]
    check(part in read("README.md") and headline not in old, "the headline keeps its text")

    append(os.path.join(root, "dev/results/peers_h100.jsonl"), 1, gpu="NVIDIA H100 80GB HBM3")
    code, out, err = run(root)
    right = (code, err, out.count("\n")) == (0, "", 1) and re.match("note: no page has tables of the rows in .*/peers_h100.jsonl; ", out)
    check(bool(right), f"rows of a GPU without tables: {code} {out} {err}")


def test_run_tables() -> None:
    """The tables that make peers prints: on another GPU, of some systems, other lengths, and with wrong results of ours."""
    row = {"gpu": "NVIDIA GeForce RTX 4090", "commit": "abc1234", "date": "2026-12-01", "run": "2026-12-01T00:00:00Z"}
    row |= {"hq": 32, "hkv": 8, "ms": 100}
    rows = [row | {"peer": peer, "part": "full", "n": n, "dir": dir} for peer, n in (("ours", 4096), ("cudnn", 4096), ("cudnn", 5000)) for dir in ("fwd", "bwd")]
    rows[0]["wrong"] = True
    steps = [row | {"peer": peer, "part": "step", "attention": "full", "n": n, "dir": "step"} for peer, n in (("cudnn", 8192), ("fa4", 5000))]
    caption = "NVIDIA GeForce RTX 4090, commit abc1234, 2026-12-01, all systems in one run of `make peers`.\n"
    step = f"""### Training step

{caption}
| tokens | full, PyTorch with FlashAttention-4 (ms) | full, PyTorch with cuDNN (ms) |
| --- | --- | --- |
| 5,000 | 100 | - |
| 8K | - | 100 |"""
    attention = f"""### Attention, forward plus backward, (32, 8) heads

{caption}
| tokens | full, ours (ms) | full, cuDNN (ms) |
| --- | --- | --- |
| 4K | 200 (wrong) | 200 |
| 5,000 | - | 200 |

### Attention, forward / backward

{caption}
| tokens | heads | full, ours (ms) | full, cuDNN (ms) |
| --- | --- | --- | --- |
| 4K | (32, 8) | 100 (wrong) / 100 | 100 / 100 |
| 5,000 | (32, 8) | - | 100 / 100 |"""
    for some, wanted in ((rows, attention), (steps, step), (rows + steps, attention + "\n\n" + step)):
        check(run_tables(some) == wanted, f"tables of a run:\n{run_tables(some)}")


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        test_repo()
        test_differences(tmp)
        test_scaling(tmp)
        test_one_run(tmp)
        test_runs(tmp)
        test_run_tables()
        test_learning(tmp)
        test_errors(tmp)
    finish()


if __name__ == "__main__":
    main()
