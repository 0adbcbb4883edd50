"""Kills a trainer at random moments and resumes it until its run is done, again and again. After every kill the
newest checkpoint must be intact, and the last checkpoint must have the bits of a run without kills. Every fifth
time it gets SIGTERM instead, and must save.

usage: fuzz_kills.py TRAINER RECALL. SECONDS=N runs for N seconds (5), COUNT=N for at least N kills (0).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

STEPS = 40


def main():
    trainer, recall = map(os.path.abspath, sys.argv[1:3])
    seconds, count = float(os.environ.get("SECONDS") or 5), int(os.environ.get("COUNT") or 0)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    rng, folder = random.Random(seed), tempfile.mkdtemp(prefix="fuzz_kills.")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([recall, "-o", f"{folder}/data", "-t", "64", "-n", "40", "-m", "3"], check=True, stdout=subprocess.DEVNULL)
    flags = f"-e tiny -i {folder}/data/recall_train_*.bin -t 64 -b 1 -v 0 -n 1 -nk 3 -x {STEPS} -y 1".split()
    last = f"ckpt_{STEPS:08d}.bin"

    def start(out):
        return subprocess.Popen([trainer, *flags, "-o", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)

    begin = time.monotonic()
    p = start(f"{folder}/whole")
    err = p.communicate()[1]
    assert p.returncode == 0, err
    run_seconds = time.monotonic() - begin
    with open(f"{folder}/whole/{last}", "rb") as f:
        wanted = f.read()
    begin, kills, signals, runs, failures = time.monotonic(), 0, 0, 0, 0
    while (time.monotonic() - begin < seconds or kills < count) and failures < 10:
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
        runs += 1
        for attempt in range(1000):
            p = start(f"{folder}/out")
            number = signal.SIGTERM if attempt % 5 == 2 else signal.SIGKILL
            try:
                err = p.communicate(timeout=rng.uniform(0, run_seconds / 4))[1]
            except subprocess.TimeoutExpired:
                p.send_signal(number)
                err = p.communicate()[1]
                kills, signals = kills + (number == signal.SIGKILL), signals + (number == signal.SIGTERM)
            if p.returncode == 0:
                break
            if number == signal.SIGTERM and err.startswith(b"note: stopping after this step") and err.count(b"\n") == 1:
                err = b""
            if err or p.returncode not in (-number, 128 + number):
                failures += 1
                print(f"FAILED fuzz_kills.py: code {p.returncode} after signal {number}: {err}", flush=True)
                break
        if p.returncode == 0:
            with open(f"{folder}/out/{last}", "rb") as f:
                if f.read() != wanted:
                    failures += 1
                    print("FAILED fuzz_kills.py: the resumed run has other bits", flush=True)
            if any(name.endswith(".tmp") for name in os.listdir(f"{folder}/out")):
                failures += 1
                print("FAILED fuzz_kills.py: a temporary file is left", flush=True)
    shutil.rmtree(folder)
    print(f"seed {seed}: {kills} kills, {signals} signals in {runs} runs, {time.monotonic() - begin:.0f} s: {failures} failures")
    print(f"fuzz_kills: {max(runs - failures, 0)} passed, {failures} failed, 0 skipped")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
