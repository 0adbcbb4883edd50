#!/usr/bin/env python3
"""Times other people's attention kernels beside ours: same tensors, same events, same run.

    make peers                                  # builds libfsa.so and runs all of it
    dev/peers/run.py --peers ours flash_nsa --lengths 65536 --steps

Each system runs in its own process. Its results are compared with float32 on sampled rows. The times are appended to
dev/results/peers_GPU.jsonl, from which dev/results/performance.py makes the tables. README.md beside this file says where
to get the systems.
"""

import argparse
import datetime
import json
import os
import queue
import re
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "../..")
SYSTEMS = ["ours", "cudnn", "fa4", "flash_nsa", "nsa", "fsa", "fla", "cudnn_nsa"]
PARTS = {
    "core": "whole NSA, linear compression",
    "core_mean": "whole NSA, mean compression",
    "core_mean64": "whole NSA, mean compression of 64 tokens without overlap (fla-core)",
    "sel": "selected branch, random blocks",
    "win": "sliding window of 512",
    "full": "full attention",
    "step": "training step of Llama 3 8B's shape with 4 layers",
}
LENGTHS, STEPS = [8192, 16384, 32768, 65536, 131072], [8192, 16384, 32768, 65536]
HEADS = [(32, 8), (32, 32), (40, 8), (64, 4)]
START_LIMIT = 300  # seconds until a system is imported


def die(message):
    sys.exit("error: " + message)


def heads(text):
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match or not int(match[2]) or int(match[1]) % int(match[2]) or not 1 <= int(match[1]) // int(match[2]) <= 16:
        die(f"--heads {text}: must be query heads,KV heads with 1 to 16 query heads for each KV head, as 32,8")
    return int(match[1]), int(match[2])


def tokens(flag, text):
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 64:
        die(f"{flag} {text}: must be a number of tokens, at least 64")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(message + "; see --help")


def arguments():
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:12} {text}" for name, text in PARTS.items()),
    )
    names = ", ".join(SYSTEMS)
    parser.add_argument("--peers", nargs="+", default=SYSTEMS, metavar="NAME", help=f"of {names}, or a Python file")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART", help="see below; default: all")
    parser.add_argument("--lengths", nargs="+", metavar="N", help="tokens; default: those of the tables")
    parser.add_argument("--heads", nargs="+", metavar="HQ,HKV", help="default: 32,8, and others at 65536 tokens")
    parser.add_argument("--steps", nargs="*", metavar="N", help="tokens of the training steps; alone: none")
    parser.add_argument("--limit", type=int, default=120, metavar="S", help="seconds for a measurement (120)")
    parser.add_argument("--out", metavar="FILE", help="default: dev/results/peers_GPU.jsonl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test these programs")
    args = parser.parse_args()
    for name in args.peers:
        if name not in SYSTEMS and not (name.endswith(".py") and os.path.exists(name)):
            die(f"--peers {name}: must be one of {names}, or a Python file that exists")
    for name in args.parts:
        if name not in PARTS:
            die(f"--parts {name}: must be one of {', '.join(PARTS)}")
    if args.limit < 1:
        die(f"--limit {args.limit}: must be at least 1 second")
    return args


def make_jobs(args):
    if args.lengths or args.heads:
        lengths = [tokens("--lengths", n) for n in args.lengths] if args.lengths else LENGTHS
        pairs = [heads(h) for h in args.heads] if args.heads else HEADS[:1]
        shapes = [(n, *pair) for n in lengths for pair in pairs]
    else:
        shapes = [(n, *HEADS[0]) for n in LENGTHS] + [(65536, *pair) for pair in HEADS[1:]]
    steps = STEPS if args.steps is None else [tokens("--steps", n) for n in args.steps]
    if args.device == "cpu":
        if args.steps:
            die(f"--steps {args.steps[0]}: needs --device cuda; leave it out")
        steps = []
    parts = [part for part in args.parts if part != "step"]
    jobs = [{"part": part, "n": n, "hq": hq, "hkv": hkv} for n, hq, hkv in shapes for part in parts]
    if "step" in args.parts:
        jobs += [{"part": "step", "n": n, "hq": HEADS[0][0], "hkv": HEADS[0][1]} for n in steps]
    return jobs


# ---- one system ------------------------------------------------------------------------------------------
class Run:
    """The rows of one call of this program."""

    def __init__(self, args):
        commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
        now = datetime.datetime.now(datetime.timezone.utc)
        self.common = {
            "commit": os.environ.get("COMMIT") or commit.stdout.strip() or "unknown",
            "date": now.strftime("%Y-%m-%d"),
            "run": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "program": "peers",
        }
        self.args, self.rows, self.failed = args, [], False

    def write(self, row):
        self.rows.append(row)
        known = re.search("GB200|B200|H200|H100|A100", row["gpu"])
        name = f"dev/results/peers_{known[0].lower() if known else 'gpu'}.jsonl"
        path = self.args.out or os.path.join(ROOT, name)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            die(f"{path}: {error.strerror}; --out names another file")


def where(job):
    return f"{job['part']:11} {job['n']:6} ({job['hq']}, {job['hkv']})"


def show(name, row):
    text = f"{name:10} {where(row):28} {row['dir']} {row['ms']:9.3f} ms"
    if "error" in row:
        text += f"  error {row['error']:.1e}"
    if "blocks" in row:
        text += f"  blocks {row['blocks']:.3f}"
    if "tokens_per_second" in row:
        text += f"  forward {row['forward_ms']:.1f} ms  {row['tokens_per_second']:,.0f} tokens/s"
    print(text + ("  WRONG" if row.get("wrong") else ""), flush=True)


def lines_of(process):
    """Returns a queue of the process's lines; None is its end."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_system(run, name, jobs):
    """Runs a system's jobs. After a crash or a time-out a new process takes the jobs that remain."""
    while jobs:
        command = [sys.executable, os.path.join(HERE, "harness.py"), name, run.args.device]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, text=True, **pipes)
        try:
            process.stdin.write(json.dumps(jobs))
            process.stdin.close()
        except BrokenPipeError:
            pass
        lines, now, last, common = lines_of(process), None, [], None
        while True:
            try:
                line = lines.get(timeout=run.args.limit if now else START_LIMIT)
            except queue.Empty:
                process.kill()
                line = None
                reason = f"no result in {run.args.limit} s; --limit allows more" if now else "the import takes too long"
            else:
                reason = None
            if line is None:
                break
            if not line.startswith("@@"):
                last = (last + [line.rstrip()])[-20:] if line.strip() else last
                continue
            kind, fields = line[2:].split(" ", 1)
            fields = json.loads(fields)
            if kind == "unavailable":
                print(f"{name:10} skipped: {fields['reason']}", flush=True)
                process.wait()
                return
            if kind == "begin":
                common = {"peer": os.path.basename(name).removesuffix(".py"), **fields, **run.common}
                print(f"{name:10} {fields['version']}, PyTorch {fields['torch']}, {fields['gpu']}", flush=True)
            elif kind == "start":
                now = fields
            elif kind == "row":
                run.write({**common, **fields})
                show(name, fields)
            elif kind in ("skip", "fail"):
                run.failed |= kind == "fail"
                verb = "skipped" if kind == "skip" else "FAILED"
                print(f"{name:10} {where(fields):28} {verb}: {fields['reason']}", flush=True)
            elif kind == "done":
                process.wait()
                return
        code = process.wait()
        run.failed = True
        reason = reason or f"exit code {code}: {last[-1] if last else 'no output'}"
        print(f"{name:10} {where(now) if now else 'start':28} FAILED: {reason}", flush=True)
        for line in last[:-1]:
            print(f"           | {line}", flush=True)
        if now is None:
            return
        jobs = jobs[jobs.index(now) + 1 :]


def main():
    args = arguments()
    jobs = make_jobs(args)
    run = Run(args)
    try:
        import torch
    except ImportError:
        die("PyTorch is not installed; see dev/peers/README.md")
    if args.device == "cuda" and not torch.cuda.is_available():
        die("PyTorch sees no GPU; --device cpu tests these programs without one")
    for name in args.peers:
        run_system(run, name, jobs)
    wrong = [row for row in run.rows if row.get("wrong")]
    print(f"{len(run.rows)} rows, {len(wrong)} wrong" + ("; some measurements failed, see above" if run.failed else ""))
    if not run.rows or wrong or run.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
