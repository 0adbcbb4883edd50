#!/usr/bin/env python3
"""Times other people's attention kernels beside ours: same tensors, same events, same run.

    make peers                                  # builds libfsa.so and runs all of it
    dev/peers/run.py --peers ours flash_nsa --lengths 65536 --steps

Each system runs in its own process; on a machine of several GPUs, several systems run at a time, each on its own GPU. The
results are compared with float32 on sampled rows. The times are appended to dev/results/peers_GPU.jsonl, from which
dev/results/performance.py makes the tables of the pages; the tables of this run are printed at its end. README.md beside
this file says where to get the systems.
"""

import argparse
import collections
import datetime
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "../..")
sys.path.insert(0, os.path.join(ROOT, "dev/results"))
from performance import run_tables  # noqa: E402

SYSTEMS = ["ours", "flash_nsa", "fsa", "nsa", "cudnn", "fa4", "fla", "cudnn_nsa"]
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
MARKS = {"wrong": "wrong", "other_blocks": "with other blocks"}  # fields of rows, in words; a mark on a row of ours makes the exit code 1


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
    parser.add_argument("--limit", type=int, default=240, metavar="S", help="seconds for a measurement (240)")
    parser.add_argument("--deadline", type=int, metavar="S", help="seconds until all of it ends; default: none")
    parser.add_argument("--out", metavar="FILE", help="default: dev/results/peers_GPU.jsonl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test these programs")
    args = parser.parse_args()
    for name in args.peers:
        if name not in SYSTEMS and not (name.endswith(".py") and os.path.exists(name)):
            die(f"--peers {name}: must be one of {names}, or a Python file that exists")
    for name in args.parts:
        if name not in PARTS:
            die(f"--parts {name}: must be one of {', '.join(PARTS)}")
    for name in ("limit", "deadline"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            die(f"--{name} {getattr(args, name)}: must be at least 1 second")
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


# ---- the rows --------------------------------------------------------------------------------------------
class Run:
    """The rows of one call of this program, and its processes. Several threads use it."""

    def __init__(self, args):
        commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
        now = datetime.datetime.now(datetime.timezone.utc)
        self.common = {
            "commit": os.environ.get("COMMIT") or commit.stdout.strip() or "unknown",
            "date": now.strftime("%Y-%m-%d"),
            "run": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "program": "peers",
        }
        self.args, self.rows, self.failed, self.error = args, [], False, None
        self.end = time.monotonic() + args.deadline if args.deadline else float("inf")
        self.lock, self.processes, self.stopped = threading.Lock(), [], False

    def write(self, row):
        known = re.search("GB200|B200|H200|H100|A100", row["gpu"])
        name = f"dev/results/peers_{known[0].lower() if known else 'gpu'}.jsonl"
        path = self.args.out or os.path.join(ROOT, name)
        with self.lock:
            self.rows.append(row)
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self.error = f"{path}: {error.strerror}; --out names another file"

    def say(self, name, text, details=()):
        with self.lock:
            print("\n".join([f"{name:10} {text}", *(f"           | {line}" for line in details)]), flush=True)

    def fail(self, name, job, reason, details=()):
        self.failed = True
        self.say(name, f"{where(job) if job else 'start':28} FAILED: {reason}", details)

    def start(self, command, environment):
        """Starts a process in a group of its own, so that stop() ends its children too. After stop_all() it ends the
        calling thread instead."""
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with self.lock:
            if self.stopped:
                sys.exit()
            process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
            self.processes.append(process)
        return process

    def stop_all(self):
        with self.lock:
            self.stopped = True
        for process in self.processes:
            self.stop(process)

    @staticmethod
    def stop(process):
        if process.returncode is None:  # otherwise its number may be another process's by now
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return process.wait()


def where(job):
    return f"{job['part']:11} {job['n']:6} ({job['hq']}, {job['hkv']})"


def text_of(row):
    text = f"{where(row):28} {row['dir']} {row['ms']:9.3f} ms"
    if "error" in row:
        text += f"  error {row['error']:.1e}"
    if "blocks" in row:
        text += f"  blocks {row['blocks']:.3f}"
    if "tokens_per_second" in row:
        text += f"  forward {row['forward_ms']:.1f} ms  {row['tokens_per_second']:,.0f} tokens/s"
    return text + "".join("  " + name.replace("_", " ").upper() for name in MARKS if row.get(name))


def lines_of(process):
    """Returns a queue of the process's lines; None is its end."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def run_system(run, name, jobs, device):
    """Runs a system's jobs on a GPU. After a crash or a time-out a new process takes the jobs that remain."""
    file = name
    name = os.path.basename(name).removesuffix(".py")
    while jobs and not run.error:
        if time.monotonic() > run.end:
            run.fail(name, jobs[0], f"the deadline passed before it and {len(jobs) - 1} more")
            return
        command = [sys.executable, os.path.join(HERE, "harness.py"), file, run.args.device]
        process = run.start(command, {**os.environ, "CUDA_VISIBLE_DEVICES": device})
        try:
            now, reason, last = follow(run, name, process, jobs)
        finally:
            code = run.stop(process)
        if reason == "done":
            return
        reason = reason or f"exit code {code}: {last[-1] if last else 'no output'}"
        run.fail(name, now, reason, last[:-1])
        jobs = jobs[jobs.index(now) + 1 :] if now else []


def follow(run, name, process, jobs):
    """Sends the jobs to a process and reads its reports. Returns the job at which it ended, the reason ("done": it did
    all of them; None: it crashed) and the last lines of its output."""
    try:
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
    except BrokenPipeError:
        pass
    lines, now, last, common = lines_of(process), None, [], None
    while not run.error:
        limit = run.args.limit if now else START_LIMIT
        try:
            line = lines.get(timeout=max(0, min(limit, run.end - time.monotonic())))
        except queue.Empty:
            if time.monotonic() > run.end:
                return now, "the deadline passed", last
            return now, f"no result in {limit} s" + ("; --limit allows more" if now else ""), last
        if line is None:
            return now, None, last
        if not line.startswith("@@"):
            last = (last + [line.rstrip()])[-20:] if line.strip() else last
            continue
        kind, fields = line[2:].split(" ", 1)
        fields = json.loads(fields)
        if kind == "unavailable":
            run.say(name, f"skipped: {fields['reason']}")
            return now, "done", last
        if kind == "begin":
            common = {"peer": name, **fields, **run.common}
            run.say(name, f"{fields['version']}, PyTorch {fields['torch']}, {fields['gpu']}")
        elif kind == "start":
            now = fields
        elif kind == "row":
            run.write({**common, **fields})
            run.say(name, text_of(fields))
        elif kind == "skip":
            run.say(name, f"{where(fields):28} skipped: {fields['reason']}")
        elif kind == "fail":
            run.fail(name, fields, fields["reason"], fields["details"])
        elif kind == "done":
            return now, "done", last
    return now, "done", last


def main():
    args = arguments()
    jobs = make_jobs(args)
    run = Run(args)
    if not importlib.util.find_spec("torch"):
        die("PyTorch is not installed; see dev/peers/README.md")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if args.device == "cuda":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            die("PyTorch sees no GPU; --device cpu tests these programs without one")
        if devices == [""]:
            devices = [str(i) for i in range(torch.cuda.device_count())]
    kinds = [[job for job in jobs if (job["part"] == "step") == step] for step in (False, True)]
    work = queue.Queue()
    for unit in [(name, some) for some in kinds for name in args.peers if some]:
        work.put(unit)

    def take(device):
        while True:
            try:
                unit = work.get_nowait()
            except queue.Empty:
                return
            run_system(run, *unit, device)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))
    threads = [threading.Thread(target=take, args=(device,), daemon=True) for device in devices]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        run.stop_all()
    if run.error:
        die(run.error)
    tables = run.rows and run_tables(run.rows)
    if tables:
        print(f"\n{tables}\n")
    marked = [(row["peer"], name) for row in run.rows for name in MARKS if row.get(name)]
    for (peer, name), count in sorted(collections.Counter(marked).items()):
        print(f"note: {peer}: {count} {MARKS[name]}")
    counts = [f"{sum(name == field for _, field in marked)} {text}" for name, text in MARKS.items()]
    failed = "; some measurements failed, see above" if run.failed else ""
    print(", ".join([f"{len(run.rows)} rows", *counts]) + failed)
    if not run.rows or run.failed or any(peer == "ours" for peer, _ in marked):
        sys.exit(1)


if __name__ == "__main__":
    main()
