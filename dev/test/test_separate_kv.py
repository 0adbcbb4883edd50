"""dev/results/separate_kv.py on the CPU with a tiny model: the C trainer's losses with the same flags, the K and V that each
branch reads, the number of parameters, the log as curves.py reads it, and bad input. `make test` sets CPU (the trainer) and
BUILD (the folder with the program text). Without PyTorch only its absence is tested."""

import contextlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tempfile

from checks import check, finish, skip

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
BUILD = os.path.abspath(os.environ.get("BUILD", os.path.join(ROOT, "build")))
CPU = os.path.abspath(os.environ.get("CPU", os.path.join(ROOT, "train_gpt_nsa_cpu")))
PROGRAM = os.path.join(ROOT, "dev/results/separate_kv.py")
SIZES = dict(layers=2, channels=48, hidden=80, heads=4, kv_heads=2, head_dim=12, theta=1e4, cmp_len=8, cmp_stride=4, block=16,
             topk=4, window=24)  # fmt: skip
RUN = dict(seed=3, steps=10, seq_len=256, sequences=2, val_every=5, lr=3e-3, warmup=1, **SIZES)


def expect_error(contents: str, *args: str, **env: str) -> None:
    """Checks that the program ends with one line on stderr that has `contents`."""
    r = subprocess.run([sys.executable, PROGRAM, *args], capture_output=True, text=True, env=os.environ | env)
    right = r.returncode == 1 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1 and contents in r.stderr
    check(right and not r.stdout, f"{args} {env}: {r.returncode} {r.stdout} {r.stderr}; expected one line with {contents!r}")


def make_data(tmp: str) -> str:
    """Makes shards of 40 short documents, so that samples have several of them. Returns their folder."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghij ", k=rng.randint(2, 7))) for _ in range(40)]
    os.mkdir(f"{tmp}/documents")
    for i in range(40):
        with open(f"{tmp}/documents/{i:02d}", "w", encoding="utf-8") as file:
            file.write("".join(rng.choices(words, k=rng.randint(5, 300))))
    subprocess.run([f"{BUILD}/text", "-o", f"{tmp}/data", "-name", "text", f"{tmp}/documents"], check=True, capture_output=True)
    return f"{tmp}/data"


def run_trainer(tmp: str, data: str) -> None:
    """Runs the C trainer with the flags of RUN."""
    names = {"seq_len": "t", "steps": "x", "val_every": "v", "lr": "l", "warmup": "u"}
    flags = {names.get(k, k.replace("_", "-")): value for k, value in RUN.items() if k != "sequences"}
    flags |= {"b": 1, "d": RUN["sequences"] * RUN["seq_len"], "k": "cosine", "q": 0.1, "m": 0, "n": 0, "y": 0}
    flags |= {"gate-bias": "-2,0,2", "i": f"{data}/text_train_*.bin", "j": f"{data}/text_val_*.bin", "o": f"{tmp}/trainer"}
    command = [CPU, "-e", "gpt-124m", *(text for k, value in flags.items() for text in ("-" + k, str(value)))]
    subprocess.run(command, check=True, capture_output=True)


def same(a: object, b: object) -> bool:
    """Returns whether two values of a log are equal; numbers may differ by 1e-5."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return abs(a - b) <= 1e-5 * abs(a)


def test_trainer(tmp: str, data: str) -> None:
    """`shared` logs the C trainer's losses, norms, learning rates and losses by position. curves.py takes all logs."""
    run_trainer(tmp, data)
    rows = {}
    for variant in ("shared", "separate", "equal"):
        with contextlib.redirect_stdout(io.StringIO()):
            kv.train(kv.Settings(variant, data=data, **RUN), f"{tmp}/{variant}", "cpu", "eager")
        rows[variant] = curves.row_of(read_run(f"{tmp}/{variant}"))
    logs = []
    for name in ("trainer", "shared"):
        with open(f"{tmp}/{name}/log.jsonl", encoding="utf-8") as file:
            logs.append([row for row in map(json.loads, file) if not {"start", "gates"} & set(row)])
    keys = ("step", "tokens", "loss", "lr", "norm", "val_loss", "val_tokens", "val_perplexity", "position_loss")
    logs = [[{key: row[key] for key in keys if key in row} for row in log] for log in logs]
    check(len(logs[0]) == len(logs[1]) == 16, f"lines of the logs: {len(logs[0])}, {len(logs[1])}")
    for a, b in zip(*logs):
        check(same(a, b), f"trainer {a}, shared {b}")
    losses = {curves.learning.val_loss(row) for row in rows.values()}
    check(len(losses) == 3 and all(row["val"][0][2] - row["val"][-1][2] > 0.5 for row in rows.values()), f"losses: {losses}")
    _, table = curves.learning.losses(rows, [("shared", None), ("separate", "shared"), ("equal", "shared")])
    attn = [line[1] for line in table]
    check(attn == ["nsa", "nsa, separate K/V", "nsa, separate K/V, narrower MLP"], f"table of losses: {table}")


def test_branches() -> None:
    """With copies of one K and V the loss is that of `shared`. A branch whose gate is open reads its own K and V alone; the
    selected branch selects by the compressed one, through which no gradient flows."""
    shared, separate = (kv.Model(kv.Settings(v, vocab=300, eot=0, **RUN), "cpu", "eager") for v in ("shared", "separate"))
    sample = torch.randint(300, (RUN["seq_len"] + 1,), generator=torch.Generator().manual_seed(0))
    cu_seqlens, rows = torch.tensor([0, 50, 256, 256]), SIZES["head_dim"] * SIZES["kv_heads"]
    with torch.no_grad():
        for a, b in zip([*shared.layers, shared.outer], [*separate.layers, separate.outer]):
            for name, x in b.items():
                x.copy_(torch.cat([a[name], a[name][-2 * rows :], a[name][-2 * rows :]]) if name == "wqkv" else a[name])
    losses = [model.losses(sample, cu_seqlens) for model in (shared, separate)]
    check(torch.allclose(*losses, rtol=1e-6), f"copies of K and V: {losses}")
    for branch in range(3):
        for w in separate.layers:
            w["bgate"].data.view(-1, 3)[:] = torch.where(torch.arange(3) == branch, 0.0, -100.0)
            w["wqkv"].grad = None
        separate.losses(sample, cu_seqlens).mean().backward()
        for w in separate.layers:
            found = [bool(x.abs().max() > 1e-7) for x in w["wqkv"].grad[-6 * rows :].split(rows)]
            check(found == [i // 2 == branch for i in range(6)], f"gradients of k, v of each branch, open {branch}: {found}")


def test_parameters() -> None:
    counts = []
    for variant in ("shared", "separate", "equal"):
        groups = kv.init_parameters(kv.Settings(variant, vocab=16384), "meta")
        counts.append(sum(x.numel() for w in groups for x in w.values()))
    shared = 96763056  # 48 fewer than the trainer's, which pads the gates' biases
    check(counts == [shared, shared + 12 * 4 * 192 * 768, shared], f"parameters: {counts}")


def test_errors(tmp: str, data: str) -> None:
    expect_error("no GPU found", "shared", "-o", f"{tmp}/new", CUDA_VISIBLE_DEVICES="")
    expect_error("--steps 0: must be", "shared", "--steps", "0", "-o", f"{tmp}/new")

    def expect(contents: str, **settings: object) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                kv.train(kv.Settings(**{"data": f"{tmp}/bad", **RUN, **settings}), f"{tmp}/shared", "cpu", "eager")
        except SystemExit as e:
            text = str(e.code)
            check(text.startswith("error: ") and "\n" not in text and contents in text, f"{text}; expected {contents!r}")
        else:
            check(False, f"no error; expected {contents!r}")

    def copy(name: str, change: object) -> None:
        with open(f"{data}/{name}", "rb") as source, open(f"{tmp}/bad/{name}", "wb") as file:
            file.write(change(source.read()))

    os.mkdir(f"{tmp}/bad")
    expect("tokenizer.bin: No such file")
    copy("tokenizer.bin", lambda b: b[:15])
    expect("tokenizer.bin: is truncated")
    copy("tokenizer.bin", lambda b: b"\0" + b[1:])
    expect("is no tokenizer")
    copy("tokenizer.bin", lambda b: b[:8] + b"\x20\0\0\0" + b[12:])
    expect("has 0 train shards")
    copy("text_train_000000.bin", lambda b: b[:-1])
    expect("text_train_000000.bin: is no shard of 16-bit tokens, or is truncated")
    copy("text_train_000000.bin", lambda b: b)
    expect("is outside the vocabulary of 32")
    copy("tokenizer.bin", lambda b: b)
    expect("has 0 val shards")
    copy("text_val_000000.bin", lambda b: b)
    expect("a sample needs 1000001", seq_len=1000000)
    expect("--steps 9999: needs 19998 samples", steps=9999)
    expect("log.jsonl: File exists")


with tempfile.TemporaryDirectory() as TMP:
    os.mkdir(f"{TMP}/torch")
    with open(f"{TMP}/torch/__init__.py", "w", encoding="utf-8") as module:
        module.write("raise ImportError")
    expect_error("PyTorch is missing", PYTHONPATH=TMP)
    if importlib.util.find_spec("torch") is None:
        skip("PyTorch is not installed: python3 -m pip install -r dev/test/requirements.txt")
        finish()
    sys.path.insert(0, os.path.dirname(PROGRAM))
    import curves
    import separate_kv as kv
    import torch
    from train_log import read_run

    torch.set_num_threads(1)  # the tensors are small, and other tests run beside this one
    DATA = make_data(TMP)
    test_trainer(TMP, DATA)
    test_branches()
    test_parameters()
    test_errors(TMP, DATA)
finish()
