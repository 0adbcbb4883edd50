"""Loads mutated tokenizer.json, tokenizer_config.json, GGUF and NAME.json files with data/vocab.py and
data/shards.py. Each must be loaded or refused with one line, in 4 GiB of memory.

usage: fuzz_json.py. SECONDS=N runs for N seconds (5), COUNT=N for at least N files (0). SEED=N repeats a run.
"""

import copy
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../data"))
HANG_SECONDS = 30
VALUES = [None, True, False, 0, 1, -1, 1.5, 10**6, 10**12, 10**30, 1e300, "", "x", "a b", "\ud800", "Ġ", [], [[]], {}, {"": 0}]


class Hang(BaseException):
    pass


def places(value, parent=None, key=None):
    """Yields (parent, key) of each value in a JSON value."""
    if parent is not None:
        yield parent, key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, child in list(items):
        yield from places(child, value, k)


def mutate_bytes(rng, content):
    """Returns changed bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if len(content) <= 8:
            break
        at = rng.randrange(len(content) - 8)
        kind = rng.randrange(4)
        if kind == 0:
            content[at] = rng.randrange(256)
        elif kind == 1:
            content[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 255, 1 << 31, 1 << 40, (1 << 64) - 1]))
        elif kind == 2:
            del content[at : at + rng.randint(1, 9)]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def mutate(rng, base):
    """Returns the bytes of a changed copy of a JSON value, or of bytes."""
    if isinstance(base, bytes):
        return mutate_bytes(rng, base)
    j = copy.deepcopy(base)
    for _ in range(rng.randint(1, 3)):
        found = list(places(j))
        # half of the changes near the root, where most fields are
        parent, key = rng.choice(found if rng.random() < 0.5 else [p for p in found if len(p[0]) < 30] or found)
        kind = rng.randrange(4)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "Ġa", "\ud800", "zz"])] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 2:
            parent[key] = copy.deepcopy(rng.choice(found)[0])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    content = bytearray(json.dumps(j).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.05:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def main():
    missing = [name for name in ("numpy", "tokenizers", "tiktoken") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: needs the Python packages {', '.join(missing)}\nfuzz_json: 0 passed, 0 failed, 1 skipped")
        return
    import shards
    import vocab

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    seconds, count = float(os.environ.get("SECONDS") or 5), int(os.environ.get("COUNT") or 0)
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    rng, folder = random.Random(seed), tempfile.mkdtemp(prefix="fuzz_json.")
    tokenizer = json.loads(vocab.train([b"some words and some more words, 123 of them\n" * 50], 300).hf_json)
    import test_bpe

    sentencepiece = test_bpe.sentencepiece_json(rng)
    config = {"bos_token": {"content": "<s>"}, "add_bos_token": True, "eos_token": "</s>"}
    gguf = test_bpe.gguf_file(test_bpe.gguf_fields(tokenizer))
    state = {
        "settings": {"val": 0.1, "shard": 2000},
        "done": False,
        "position": [0, 5],
        "train": 100,
        "val": 20,
        "bytes": 300,
        "documents": 3,
    }

    def load_tokenizer(path):
        vocabulary = vocab.load(path, None)
        vocabulary.tokenizer_bin()
        vocabulary.encode("some words, é \U0001f600 12345\n\n".encode() + b"\xff", True)

    def load_state(path):
        output = shards.Output(os.path.dirname(path), "text", state["settings"], lambda p: p == [0, 5])
        os.close(output.lock)
        output.open_shards(vocab.np.dtype("<u2"))
        shards.summary(output)

    def hang(*_):
        raise Hang

    def load_config(path):
        shutil.copy(path, f"{folder}/model/tokenizer_config.json")
        load_tokenizer(f"{folder}/model/tokenizer.json")

    os.mkdir(f"{folder}/model")
    with open(f"{folder}/model/tokenizer.json", "w") as f:
        json.dump(sentencepiece, f)
    cases = [
        (tokenizer, load_tokenizer, "t.json"),
        (sentencepiece, load_tokenizer, "s.json"),
        (config, load_config, "c.json"),
        (gguf, load_tokenizer, "g.gguf"),
        (state, load_state, "text.json"),
    ]
    signal.signal(signal.SIGALRM, hang)
    begin, runs, loaded, failures = time.monotonic(), 0, 0, 0
    while (time.monotonic() - begin < seconds or runs < count) and failures < 20:
        base, load, name = cases[runs % len(cases)]
        path, problem = os.path.join(folder, name), None
        with open(path, "wb") as f:
            f.write(mutate(rng, base))
        runs += 1
        signal.alarm(HANG_SECONDS)
        try:
            load(path)
            loaded += 1
        except SystemExit as e:
            if not str(e).startswith("error: ") or "\n" in str(e):
                problem = f"not one line: {e}"
        except BaseException:
            problem = traceback.format_exc()
        signal.alarm(0)
        if problem:
            failures += 1
            kept = shutil.copy(path, f"{tempfile.gettempdir()}/fuzz_json_{seed}_{runs}.json")
            print(f"FAILED fuzz_json.py: {kept}: {problem}", flush=True)
        if load is load_state:
            for fd in range(3, 64):  # the locks of folders whose state is refused
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith(folder):
                        os.close(fd)
                except OSError:
                    pass
    shutil.rmtree(folder)
    print(f"seed {seed}: {runs} files in {time.monotonic() - begin:.0f} s: {loaded} loaded, {failures} failures")
    print(f"fuzz_json: {runs - failures} passed, {failures} failed, 0 skipped")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
