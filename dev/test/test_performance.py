"""dev/results/performance.py: its tables and chart agree with the rows, and --check notices when they do not.
make test runs it; it needs python3 alone."""

import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
sys.path.insert(0, os.path.join(ROOT, "dev/results"))
from performance import CHART, MEASURED, PEERS  # noqa: E402

FILE, COMMIT = MEASURED["H200"]
PEERS_FILE = "dev/results/" + PEERS["H200"]
passed = failed = 0


def check(condition: bool, what: str) -> None:
    global passed, failed
    if condition:
        passed += 1
    else:
        failed += 1
        print(f"FAILED test_performance.py: {what}", flush=True)


def run(root: str, *args: str) -> tuple[int, str, str]:
    """Runs the program of the copy in root. Returns its exit code, output and errors."""
    program = [sys.executable, os.path.join(root, "dev/results/performance.py"), *args]
    result = subprocess.run(program, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def copy(tmp: str, name: str) -> str:
    """Returns a new folder with README.md and dev/results."""
    root = os.path.join(tmp, name)
    shutil.copytree(os.path.join(ROOT, "dev/results"), os.path.join(root, "dev/results"))
    shutil.copy(os.path.join(ROOT, "README.md"), root)
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
        "a row": (PEERS_FILE, '"ms": ', '"ms": 9', "performance.md: table attention"),
    }
    for i, (what, (file, old, new, message)) in enumerate(changes.items()):
        root = copy(tmp, f"change{i}")
        replace(os.path.join(root, file), old, new)
        expect(what, run(root, "--check"), 1, message)
        expect(f"{what}: nothing was written", run(root, "--check"), 1, message)
        expect(f"{what}: written", run(root), 0, "wrote ")
        check(run(root, "--check") == (0, "", ""), f"{what}: agrees when it is written")


def test_kernel_pages() -> None:
    """The tables of the kernels' pages agree with the rows."""
    result = subprocess.run([sys.executable, "fsa/docs/times.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    check(result.returncode == 0, f"fsa/docs/times.py --check: {result.stdout}{result.stderr}")


def test_errors(tmp: str) -> None:
    """Every error is one line that names the file."""
    program = "dev/results/performance.py"
    changes = {
        "no such table": ("README.md", "<!-- table summary -->", "<!-- table sumary -->", "no table"),
        "no end": ("README.md", "<!-- end -->", "", "needs an <!-- end -->"),
        "no JSON": (PEERS_FILE, "{", "", "line 1 is not JSON"),
        "no such file": (program, f'"{FILE}"', '"none.jsonl"', "none.jsonl: No such file"),
        "no such commit": (program, f'"{COMMIT}"', '"none"', "no row of commit none"),
    }
    for i, (what, (file, old, new, message)) in enumerate(changes.items()):
        root = copy(tmp, f"error{i}")
        replace(os.path.join(root, file), old, new)
        result = run(root, "--check")
        expect(what, result, 1, message)
        check(result[2].count("\n") == 1 and result[2].startswith("error: "), f"{what}: {result}")


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        test_repo()
        test_kernel_pages()
        test_differences(tmp)
        test_errors(tmp)
    print(f"test_performance.py: {passed} passed, {failed} failed, 0 skipped")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
