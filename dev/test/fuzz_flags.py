"""Runs a trainer with random flags on small recall data. Each run must succeed, or end with code 1 and one line
on stderr. A run that takes long must stop after SIGTERM.

usage: fuzz_flags.py TRAINER RECALL. SECONDS=N runs for N seconds (5), COUNT=N at least N combinations (0), and
SEED=N repeats a run.
"""

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
NUMBERS = "0 1 2 3 7 64 -1 65 1e9 2147483647 9223372036854775807 99999999999999999999 x nan inf 0.5 1e-9".split()
BASE = {"-e": "recall", "-t": "64", "-b": "1", "-x": "1", "-v": "0", "-g": "2"}


def choices(folder):
    """Returns {flag: values to draw}; flags that are not here get one of NUMBERS."""
    files = [f"{folder}/{name}" for name in ("data/recall_train_000000.bin", "data/recall_val_*.bin", "fifo", "none*")]
    files += [folder, "/dev/zero", f"{folder}/damaged.bin", f"{folder}/data/tokenizer.bin", ""]
    return {
        "-i": files,
        "-j": files,
        "-e": ["recall", "tiny", "gpt-124m", "nothing", "", *files],
        "-o": [f"{folder}/out", f"{folder}/fifo", "/dev/null/x", "", f"{folder}/data"],
        "-prompt": ["", "Remember Mara : lamp .", "Mara", "\xff", "lamp " * 300],
        "-attn": ["nsa", "full", "window", "x"],
        "-phi": ["linear", "mean", "x"],
        "-block-indices": [f"{folder}/out/indices", "/dev/full"],
    }


def main():
    trainer, recall = map(os.path.abspath, sys.argv[1:3])
    seconds, count = float(os.environ.get("SECONDS") or 5), int(os.environ.get("COUNT") or 0)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    rng, folder = random.Random(seed), tempfile.mkdtemp(prefix="fuzz_flags.")
    flags = sorted(set(re.findall(r"^ +(-[a-z][a-z0-9-]*)", subprocess.run([trainer, "-h"], capture_output=True, text=True).stdout, re.M)))
    assert len(flags) > 20, f"{trainer} -h lists only {flags}"
    subprocess.run([recall, "-o", f"{folder}/data", "-t", "64", "-n", "4", "-m", "3"], check=True, stdout=subprocess.DEVNULL)
    os.mkfifo(f"{folder}/fifo")
    with open(f"{folder}/damaged.bin", "wb") as f:
        f.write(rng.randbytes(5000))
    values, runs, ran, stopped, failures = choices(folder), 0, 0, 0, 0
    # the address sanitizer reserves terabytes of address space
    sanitized = b"__asan" in open(trainer, "rb").read()

    def limit():
        if not sanitized:
            resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

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
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0"}
        p = subprocess.Popen([trainer, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=env, preexec_fn=limit)
        hang = term = False
        try:
            err = p.communicate(timeout=3)[1]
        except subprocess.TimeoutExpired:  # many steps: it must stop after the current one
            stopped, term = stopped + 1, True
            p.send_signal(signal.SIGTERM)
            try:
                err = p.communicate(timeout=HANG_SECONDS)[1]
            except subprocess.TimeoutExpired:
                hang = True
                p.kill()
                err = p.communicate()[1]
        text = err.decode("utf-8", "replace")
        errors = [line for line in text.splitlines() if not line.startswith(("warning: ", "note: "))]
        ran += p.returncode == 0
        good = (p.returncode == 0 and not errors) or (p.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: "))
        # a trainer that SIGTERM stops exits with 128 + 15; before training begins, SIGTERM ends it at once
        good |= term and p.returncode in (128 + signal.SIGTERM, -signal.SIGTERM) and not errors
        if hang or not good:
            failures += 1
            print(f"FAILED fuzz_flags.py: {'hang' if hang else f'code {p.returncode}'}: {words}: {text[:1500]}", flush=True)
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
    shutil.rmtree(folder)
    print(f"seed {seed}: {runs} combinations in {time.monotonic() - begin:.0f} s: {ran} ran, {stopped} stopped by SIGTERM, {failures} failures")
    print(f"fuzz_flags: {runs - failures} passed, {failures} failed, 0 skipped")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
