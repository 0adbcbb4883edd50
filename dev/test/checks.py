"""What the Python tests share: counted checks, parts that are skipped, and the last line, which run.sh reads."""

import os
import sys
import threading

NAME = os.path.basename(sys.argv[0]).removesuffix(".py")
counts = {"passed": 0, "failed": 0, "skipped": 0}
lock = threading.Lock()  # some tests run on several threads


def check(condition, what):
    """Counts a check. A failed one prints `what`; with FIRST_FAILURE=1 it ends the test."""
    with lock:
        counts["passed" if condition else "failed"] += 1
        if not condition:
            print(f"FAILED {NAME}.py: {what}", flush=True)
    if not condition and os.environ.get("FIRST_FAILURE"):
        sys.exit(1)


def skip(what):
    """Counts a part that does not run, and says why."""
    counts["skipped"] += 1
    print(f"skipped: {NAME}.py: {what}", flush=True)


def set_libfsa():
    """Sets LIBFSA, unless it is set. make puts the library beside the sources, or into another BUILD."""
    build = os.environ.get("BUILD", "build")
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
    os.environ.setdefault("LIBFSA", os.path.join(root, "" if build == "build" else build, "libfsa.so"))


def finish():
    """Prints the counts. Exits with 1 if a check failed."""
    print("{}: {passed} passed, {failed} failed, {skipped} skipped".format(NAME, **counts))
    sys.exit(counts["failed"] > 0)
