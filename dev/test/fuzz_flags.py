"""Runs a trainer with random flags on small recall data. Each run must succeed, or end with code 1 and one line
on stderr. A run that takes long must stop after SIGTERM.

With a second trainer, every combination also runs there. Both must parse the flags and check the data in the same way:
an error must be the same in both, except the errors that only the model, the memory or the GPU of one can have.

usage: fuzz_flags.py TRAINER RECALL [TRAINER2]. SECONDS=N runs for N seconds (5), COUNT=N at least N combinations (0), and
SEED=N repeats a run.
"""

import glob
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HANG_SECONDS = 60
# Errors behind the setup that both trainers share; those of the GPU trainer alone begin with the second line.
LATER = (
    "out of memory|step [0-9]|-prompt|-sample 1: the vocabulary|cannot write|cannot rename|.*damaged|"
    "no NVIDIA|out of GPU memory|rmsnorm: |embedding: |classifier: |-channels [0-9]+ -hidden|-block-indices .*(only -attn|processes)|"
    "[^ ]*[.]cuh?:[0-9]+: |num_queries |-?head.dim [0-9]+: .*(64|128)"
)
GPU_FLAGS = ("-r", "-profile", "-block-indices", "-peak-tflops", "-z", "-cp")
NUMBERS = "0 1 2 3 7 64 -1 65 1e9 2147483647 9223372036854775807 99999999999999999999 x nan inf 0.5 1e-9".split()
BASE = {"-e": "recall", "-head-dim": "64", "-t": "64", "-b": "1", "-x": "1", "-v": "0", "-g": "2"}


def choices(folder):
    """Returns {flag: values to draw}; flags that are not here get one of NUMBERS."""
    files = [f"{folder}/{name}" for name in ("data/recall_train_000000.bin", "data/recall_val_*.bin", "fifo", "none*")]
    files += [folder, "/dev/zero", f"{folder}/damaged.bin", f"{folder}/data/tokenizer.bin", ""]
    return {
        "-i": files,
        "-j": files,
        **{flag: files for flag in ("-hellaswag", "-mc", "-needle")},
        "-e": ["recall", "tiny", "gpt-124m", "nothing", "", *files],
        "-o": [f"{folder}/out", f"{folder}/fifo", "/dev/null/x", "", f"{folder}/data"],
        "-prompt": ["", "Remember Mara : lamp .", "Mara", "\xff", "lamp " * 300],
        "-attn": ["nsa", "full", "window", "x"],
        "-phi": ["linear", "mean", "x"],
        "-block-indices": [f"{folder}/out/indices", "/dev/full"],
    }


def cpu_ticks(pid):
    """Returns the CPU time that a process has used; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])
    except OSError:
        return 0


class Trainer:
    """A trainer, the folder that it runs in, and counts of its runs."""

    def __init__(self, path, folder):
        self.path, self.folder, self.ran, self.stopped = path, folder, 0, 0
        # the address sanitizer reserves terabytes of address space
        with open(path, "rb") as f:
            self.sanitized = b"__asan" in f.read()

    def flags(self):
        text = subprocess.run([self.path, "-h"], capture_output=True, text=True).stdout
        flags = sorted(set(re.findall(r"^ +(-[a-z][a-z0-9-]*)", text, re.M)))
        assert len(flags) > 20, f"{self.path} -h lists only {flags}"
        return flags

    def limit(self):
        if not self.sanitized:
            resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def wait(self, p):
        """Waits for a run, or stops it after 3 seconds. Returns its stderr, and "stopped", "blocked", "hang" or ""."""
        try:
            return p.communicate(timeout=3)[1], ""
        except subprocess.TimeoutExpired:  # many steps: it must stop after the current one
            end = "stopped"
        begin, ticks = time.monotonic(), cpu_ticks(p.pid)
        while p.poll() is None and cpu_ticks(p.pid) == ticks and end != "blocked":  # waits for something, such as a FIFO
            time.sleep(0.1)
            end = "blocked" if time.monotonic() - begin > HANG_SECONDS / 3 else end
        p.send_signal(signal.SIGTERM)
        try:
            return p.communicate(timeout=HANG_SECONDS)[1], end
        except subprocess.TimeoutExpired:
            p.kill()
            return p.communicate()[1], "hang"

    def run(self, words):
        """Returns the error of a run, "" if it has none, and what is wrong with the run, or ""."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0"}
        p = subprocess.Popen(
            [self.path, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=self.folder, env=env, preexec_fn=self.limit
        )
        err, end = self.wait(p)
        text = err.decode("utf-8", "replace")
        errors = [line for line in text.splitlines() if not line.startswith(("warning: ", "note: "))]
        self.ran += p.returncode == 0
        self.stopped += end == "stopped"
        good = (p.returncode == 0 and not errors) or (p.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: "))
        # a trainer that SIGTERM stops exits with 128 + 15; before training begins, SIGTERM ends it at once
        good |= end == "stopped" and p.returncode in (128 + signal.SIGTERM, -signal.SIGTERM) and not errors
        wrong = end if end in ("hang", "blocked") else "" if good else f"code {p.returncode}: {text[:1500]}"
        return errors[0].removeprefix("error: ") if errors else "", wrong


def parse_alike(words, first, second):
    """Returns whether two trainers with these errors treat the flags alike."""
    if any(word in GPU_FLAGS for word in words):
        return True
    return first == second or all(not error or re.match(LATER, error) for error in (first, second))


def main():
    paths = [os.path.abspath(path) for path in sys.argv[1:4]]
    recall = paths.pop(1)
    seconds, count = float(os.environ.get("SECONDS") or 5), int(os.environ.get("COUNT") or 0)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    rng, folder = random.Random(seed), tempfile.mkdtemp(prefix="fuzz_flags.")
    subprocess.run([recall, "-o", f"{folder}/data", "-t", "64", "-n", "4", "-m", "3"], check=True, stdout=subprocess.DEVNULL)
    os.mkfifo(f"{folder}/fifo")
    with open(f"{folder}/damaged.bin", "wb") as f:
        f.write(rng.randbytes(5000))
    trainers = [Trainer(path, folder) for path in paths]
    flags, values, runs, failures = trainers[0].flags(), choices(folder), 0, 0
    if trainers[-1].flags() != flags:
        failures += 1
        print("FAILED fuzz_flags.py: the trainers' -h list different flags")
    begin = time.monotonic()
    while (time.monotonic() - begin < seconds or runs < count) and failures < 20:
        chosen = {**BASE, "-i": f"{folder}/data/recall_train_*.bin"}
        for _ in range(rng.randint(1, 5)):
            flag = rng.choice(flags)
            chosen[flag] = rng.choice(values.get(flag, NUMBERS))
        words = [word for flag, value in chosen.items() for word in (flag, value)]
        if rng.random() < 0.1:
            words.pop(rng.randrange(len(words)))
        runs += 1
        errors = []
        for trainer in trainers:
            error, wrong = trainer.run(words)
            errors.append(error)
            if wrong:
                failures += 1
                print(f"FAILED fuzz_flags.py: {trainer.path}: {words}: {wrong}", flush=True)
            for name in ("out", "data/log.jsonl"):
                subprocess.run(["rm", "-rf", f"{folder}/{name}"], check=True)
            for name in glob.glob(f"{folder}/data/ckpt_*"):
                os.remove(name)
        if not parse_alike(words, errors[0], errors[-1]):
            failures += 1
            print(f"FAILED fuzz_flags.py: the trainers differ: {words}: {errors}", flush=True)
    shutil.rmtree(folder)
    print(f"seed {seed}: {runs} combinations in {time.monotonic() - begin:.0f} s, {failures} failures")
    for trainer in trainers:
        print(f"{trainer.path}: {trainer.ran} ran, {trainer.stopped} stopped by SIGTERM")
    print(f"fuzz_flags: {runs - failures} passed, {failures} failed, 0 skipped")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
