"""Tests data/hellaswag, data/mc and data/needle from the command line: what they write is read here apart from
data/evals.py; every error is one line. `make test` sets CPU (the trainer). With the packages of dev/test/requirements.txt
the trainer's answers to multiple-choice questions must be those of lm-eval, which runs the exported model.
"""

import concurrent.futures
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile

from checks import check, finish, skip
from forks import Forks

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
CPU = os.path.abspath(os.environ.get("CPU", os.path.join(ROOT, "train_gpt_nsa_cpu")))
sys.path.insert(0, os.path.join(ROOT, "data"))
errors = []  # the cases of expect_error, which run at the same time
file_numbers = itertools.count()


def run(program, *args):
    if program == CPU:
        return subprocess.run([CPU, *map(str, args)], capture_output=True, text=True)
    return forks.run(os.path.join(ROOT, program), *args)


def run_ok(program, *args):
    """Runs a program that must succeed without warnings, but may print notes. Returns its stdout."""
    r = run(program, *args)
    notes = all(line.startswith("note: ") for line in r.stderr.splitlines())
    check(r.returncode == 0 and notes, f"{program} {args}: code {r.returncode}, {r.stderr[-600:]}")
    return r.stdout


def expect_error(wanted, program, *args):
    """Takes down a program that must end with code 1, one line on stderr that contains `wanted`, and no file."""
    errors.append((wanted, program, *args))


def run_error(wanted, program, *args):
    r = run(program, *args)
    right = r.returncode == 1 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1
    parts = [wanted] if isinstance(wanted, str) else wanted
    check(right and all(part in r.stderr for part in parts), f"{wanted!r}: {program} {args}: {r.returncode} {r.stderr[-600:]}")
    output = args[args.index("-o") + 1] if "-o" in args else ""
    check(not os.path.isfile(output), f"{program} {args}: leaves a file")


def run_errors():
    with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        for future in [pool.submit(run_error, *case) for case in errors]:
            future.result()


def write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


def bad_path(tmp):
    """Returns the name of a new file."""
    return f"{tmp}/bad{next(file_numbers)}.jsonl"


def write_rows(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_llmc(path):
    """Returns [(context, choices, label)] of a file in llm.c's format."""
    with open(path, "rb") as f:
        data = f.read()
    magic, version, count, longest = struct.unpack("<4i", data[:16])
    assert (magic, version) == (20240522, 1) and data[16:24] == bytes(8) != data[24:32] and data[28:1024] == bytes(996)
    values, examples, at, sizes = struct.unpack(f"<{(len(data) - 1024) // 2}H", data[1024:]), [], 0, []
    for i in range(count):
        begin = at
        start, size, index, label, choices, length = values[at : at + 6]
        assert (start, index) == (65535, i)
        at += 6
        parts = [values[at : at + length]]
        at += length
        for _ in range(choices):
            length = values[at]
            parts.append(values[at + 1 : at + 1 + length])
            at += 1 + length
        assert 2 * (at - begin) == size
        sizes.append(size)
        examples.append((parts[0], parts[1:], label))
    assert at == len(values) and longest == max(sizes)
    return examples


def read_ours(path):
    """Returns (kind, vocabulary size, keys, [(context, [(tokens, length)], label, depth)])."""
    with open(path, "rb") as f:
        data = f.read()
    magic, version, kind, count, vocab_size, keys = struct.unpack("<6i", data[:24])
    assert (magic, version) == (20260803, 1) and data[24:28] != bytes(4) and data[28:1024] == bytes(996)
    values, examples, at = struct.unpack(f"<{(len(data) - 1024) // 4}i", data[1024:]), [], 0
    for _ in range(count):
        label, choices, depth, length = values[at : at + 4]
        context = values[at + 4 : at + 4 + length]
        at += 4 + length
        parts = []
        for _ in range(choices):
            length, tokens = values[at : at + 2]
            parts.append((values[at + 2 : at + 2 + tokens], length))
            at += 2 + tokens
        examples.append((context, parts, label, depth))
    assert at == len(values)
    return kind, vocab_size, keys, examples


class Texts:
    """A tokenizer that is trained on some text, and texts of its tokens."""

    def __init__(self, tmp):
        rng = random.Random(1)
        words = "the a river house walks sees green old stone and of in to is was garden Question Answer number".split()
        lines = (" ".join(rng.choice(words) for _ in range(9)).capitalize() + ". " for _ in range(6000))
        self.path = write(f"{tmp}/text.txt", "".join(lines) + "magic 0123456789 : “é”")
        run_ok("data/bpe", "-o", f"{tmp}/data", "--name", "t", "--train-vocab", 400, self.path)
        self.tokenizer = f"{tmp}/data/tokenizer.json"
        import vocab

        self.vocabulary = vocab.load(self.tokenizer, None)

    def decode(self, tokens):
        return b"".join(self.vocabulary.pieces[t] for t in tokens).decode()


HELLASWAG = [
    {"ind": 24, "activity_label": "Roof", "ctx_a": "A man is on a roof.", "ctx_b": "he", "ctx": "A man is on a roof. he",
     "split": "val", "split_type": "indomain", "label": 3, "source_id": "activitynet~v_-JhWjGDPHMY",
     "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up “roofing”."]},
    {"ind": 25, "activity_label": "Dog", "ctx_a": "[header] Dogs [title] One.", "ctx_b": "", "ctx": "[header] Dogs [title] One.",
     "split": "val", "split_type": "zeroshot", "label": 0, "source_id": "wikihow~1", "endings": ["(a)", "b", "cc", "dd d"]},
]  # fmt: skip


def test_hellaswag(tmp, texts):
    rows = write_rows(f"{tmp}/hellaswag_val.jsonl", HELLASWAG)
    flags = ["--tokenizer", texts.tokenizer]
    out = run_ok("data/hellaswag", "-o", f"{tmp}/eval/h.bin", *flags, rows)
    check(out == f"{tmp}/eval/h.bin: 2 questions\n", out)
    examples = read_llmc(f"{tmp}/eval/h.bin")
    for row, (context, choices, label) in zip(HELLASWAG, examples):
        check((texts.decode(context), label) == (row["ctx"], row["label"]), f"context {texts.decode(context)!r}, {label}")
        decoded = [texts.decode(c) for c in choices]
        check(decoded == [" " + ending for ending in row["endings"]], f"endings {decoded}")
        alone = [tuple(texts.vocabulary.encode((" " + e).encode(), False).tolist()) for e in row["endings"]]
        check(alone == choices, "endings are encoded as llm.c does")
    for change, wanted in (
        ({"label": 4}, "must be from 0 to 3"),
        ({"label": ""}, "must be from 0 to 3"),
        ({"label": "²"}, "the right choice is '²', but must be from 0 to 3"),
        ({"label": "1" * 5000}, "11, but must be from 0 to 3"),
        ({"label": True}, "must be from 0 to 3"),
        ({"endings": ["one"]}, "'endings' is not a list of two or more texts"),
        ({"ctx": 5}, "has no text 'ctx'"),
        ({"ctx": "a " * 40000}, "at most 65534 fit"),
    ):
        bad = write_rows(bad_path(tmp), [HELLASWAG[0], {**HELLASWAG[1], **change}])
        where = "example 1 has " if "65534" in wanted else f"{bad}, line 2: "
        expect_error((where, wanted), "data/hellaswag", "-o", f"{tmp}/eval/x.bin", *flags, bad)
    output = ["data/hellaswag", "-o", f"{tmp}/eval/x.bin"]
    expect_error("line 1: not a JSON object", *output, *flags, write(bad_path(tmp), "[1]\n"))
    expect_error("line 1: not a JSON object", *output, *flags, write(bad_path(tmp), "[" * 100000))
    expect_error("has no questions", *output, *flags, write(bad_path(tmp), "\n"))
    expect_error("No such file", *output, *flags, f"{tmp}/none.jsonl")
    expect_error("--tokenizer T is missing", *output, rows)
    expect_error("is a folder", "data/hellaswag", "-o", tmp, *flags, rows)
    expect_error("-o /proc/h.bin: cannot write there", "data/hellaswag", "-o", "/proc/h.bin", *flags, rows)
    mirror = f"file://{tmp}/mirror"
    expect_error("cannot download", *output, *flags, "--from", f"{mirror}/none")
    folder = f"{tmp}/mirror/rowanz/hellaswag/a29ff8e9a04bba4bd6588223785ce105328adc57/data"
    write_rows(f"{folder}/hellaswag_val.jsonl", HELLASWAG)
    expect_error("not the expected file", *output, *flags, "--from", mirror)
    expect_error("the context has", CPU, *trainer_flags(tmp), "-t", "8", "-hellaswag", f"{tmp}/eval/h.bin")


MC = [
    ({"context": "2 + 2 =", "choices": [" 3", " 4", "five"], "label": 1}, "2 + 2 =", [" 3", " 4", "five"], 1),
    ({"context": "trailing ", "choices": ["é", "b"], "label": "0"}, "trailing", [" é", " b"], 0),
    ({"context": "", "choices": ["a", "b"], "label": 0}, "", ["a", "b"], 0),
    (
        {"id": "x", "question": {"stem": "Which?", "choices": [{"text": "dog", "label": "A"}, {"text": "a stone", "label": "B"}]},
         "answerKey": "B"}, "Question: Which?\nAnswer:", [" dog", " a stone"], 1
    ),
    (
        {"question": "Why?", "choices": {"text": ["dog", "a stone", "rain"], "label": ["1", "2", "3"]}, "answerKey": "1"},
        "Question: Why?\nAnswer:", [" dog", " a stone", " rain"], 0
    ),
    ({"goal": "Open.", "sol1": "turn.", "sol2": "eat.", "label": 1}, "Question: Open.\nAnswer:", [" turn.", " eat."], 1),
    (HELLASWAG[1], HELLASWAG[1]["ctx"], [" " + e for e in HELLASWAG[1]["endings"]], 0),
]  # fmt: skip


def test_mc(tmp, texts):
    rows = write_rows(f"{tmp}/rows.jsonl", [row for row, *_ in MC])
    flags = ["--tokenizer", texts.tokenizer]
    out = run_ok("data/mc", "-o", f"{tmp}/eval/m.bin", *flags, rows)
    check("7 of 7 questions, 2 to 4 choices each" in out, out)
    kind, vocab_size, _, examples = read_ours(f"{tmp}/eval/m.bin")
    check((kind, vocab_size, len(examples)) == (0, len(texts.vocabulary.pieces), len(MC)), "the header")
    for (row, context, choices, label), (tokens, parts, found, _) in zip(MC, examples):
        check(tokens[0] == texts.vocabulary.bos, "a context begins with BOS")
        tokens = tokens[1:]
        got = texts.decode(tokens), [texts.decode(t) for t, _ in parts], found
        check(got == (context, choices, label), f"{got}, not {(context, choices, label)}")
        lengths = [length for _, length in parts]
        given = row["choices"] if "context" in row else [c[1:] for c in choices]  # without the space before
        check(lengths == [len(c) for c in given], f"lengths {lengths} of {choices}")
        whole = [tuple(texts.vocabulary.encode((context + c).encode(), False).tolist()) for c in choices]
        check([tokens + t for t, _ in parts] == whole, f"{context!r} is not encoded as a whole with its choices")
    run_ok("data/mc", "-o", f"{tmp}/eval/m2.bin", *flags, "--bos", "none", rows)
    for (tokens, *_), (with_bos, *_) in zip(read_ours(f"{tmp}/eval/m2.bin")[3], examples):
        check(tokens == with_bos[1:] or tokens == with_bos[:1], "--bos none")
    piqa = [{"goal": f"{i}", "sol1": "a", "sol2": "b"} for i in range(10)]
    labels = write(f"{tmp}/labels.lst", "".join(f"{i % 3 % 2}\n" for i in range(10)))
    spread = ["--labels", labels, "--examples", 4, write_rows(f"{tmp}/piqa.jsonl", piqa)]
    run_ok("data/mc", "-o", f"{tmp}/eval/p.bin", *flags, *spread)
    found = [(texts.decode(e[0][1:])[10:11], e[2]) for e in read_ours(f"{tmp}/eval/p.bin")[3]]
    check(found == [("0", 0), ("2", 0), ("5", 0), ("7", 1)], f"--labels, --examples 4: {found}")
    good = {"context": "a", "choices": ["b", "c"], "label": 0}
    arc = MC[4][0]
    for row, wanted in (
        ({**good, "label": 2}, "the right choice is 2, but must be from 0 to 1"),
        ({**good, "choices": ["b", ""]}, "'choices' is not a list of two or more texts"),
        ({**good, "context": None}, "has no text 'context'"),
        ({"prompt": "a"}, "an unknown format; mc -h lists"),
        ({**arc, "answerKey": "4"}, "no choice is named '4'"),
        ({**arc, "choices": {"text": ["a", "b"], "label": ["1"]}}, "no choice is named"),
        ({**arc, "question": None}, "not a question of ARC"),
        ({"goal": "a", "sol1": "b", "sol2": 3, "label": 0}, "has no text 'sol2'"),
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "the right choice is None"),
    ):
        bad = write_rows(bad_path(tmp), [good, row])
        expect_error(f"{bad}, line 2: {wanted}", "data/mc", "-o", f"{tmp}/eval/x.bin", *flags, bad)
    spread[1] = write(f"{tmp}/superscript.lst", "²\n" * 10)
    expect_error("line 1: the right choice is '²', but must be from 0 to 1", "data/mc", "-o", f"{tmp}/eval/x.bin", *flags, *spread)
    spread[1] = write(f"{tmp}/few.lst", "0\n1\n")
    expect_error("has 2 labels for 10 questions", "data/mc", "-o", f"{tmp}/eval/x.bin", *flags, *spread)


def test_needle(tmp, texts):
    for keys, depths, lengths in ((1, 5, (128, 300)), (4, 3, (256,))):
        path = f"{tmp}/eval/needle{keys}.bin"
        flags = ["--tokenizer", texts.tokenizer, "--keys", keys, "--depths", depths, "--examples", 3]
        args = ["data/needle", "-o", path, *flags, "--lengths", ",".join(map(str, lengths)), texts.path]
        run_ok(*args)
        with open(path, "rb") as f:
            content = f.read()
        kind, _, found_keys, examples = read_ours(path)
        check((kind, found_keys) == (1, keys) and len(examples) == len(lengths) * depths * 3, "the header")
        with open(texts.path, encoding="utf-8") as f:
            source = " ".join(f.read().split())
        places = []
        for i, (context, parts, label, depth) in enumerate(examples):
            text, answer = texts.decode(context), texts.decode(parts[0][0])
            length = lengths[i // (depths * 3)]
            check(len(context) + len(parts[0][0]) == length and len(parts) == 1 and label == 0, "the length")
            check(depth == round(1000 * (i // 3 % depths) / (depths - 1)), f"depth {depth} of example {i}")
            needles = re.findall(r" The magic number of the (\w+ \w+) is (\d{5})\.", text)
            asked = re.search(r" The magic number of the (\w+ \w+) is$", text)
            names = [name for name, _ in needles]
            check(len(set(names)) == keys and asked and dict(needles).get(asked[1]) == answer[1:], f"{text[-200:]} {answer}")
            check(text.startswith("<|endoftext|>"), "a context begins as a document")
            before = text.index(f" The magic number of the {asked[1]} is {answer[1:]}.")
            places.append((depth / 1000, before / len(text)))
            rest = re.sub(r" The magic number of the \w+ \w+ is( \d{5}\.)?", "\0", text.removeprefix("<|endoftext|>"))
            pieces = [piece for piece in rest.split("\0") if piece]
            first = pieces[0].split(". ", 1)  # the first sentence may lack its beginning, and follows another one
            whole = " ".join(source.split())
            check(all(piece.strip() in whole for piece in pieces[1:] + first[1:]), "the text around is not that of the file")
        worst = max(abs(wanted - place) for wanted, place in places)
        check(worst < 0.35, f"needles are {worst:.2f} of the context away from their depths")
        check(all(place < 0.05 for wanted, place in places if wanted == 0 and keys == 1), "depth 0")
        run_ok(*args)
        with open(path, "rb") as f:
            check(f.read() == content, "a second run makes other contexts")
        run_ok(*args, "--seed", 5)
        with open(path, "rb") as f:
            check(f.read() != content, "--seed changes nothing")
    base = ["data/needle", "-o", f"{tmp}/eval/x.bin", "--tokenizer", texts.tokenizer]
    expect_error("fewer than a context of 10000000", *base, "--lengths", "1e7", texts.path)
    expect_error("--lengths 64: 20 needles and the question need", *base, "--lengths", "64", "--keys", 20, texts.path)
    expect_error("must be a whole number from 64", *base, "--lengths", "128,63", texts.path)
    expect_error("--keys", *base, "--keys", "0", texts.path)
    expect_error("No such file", *base, f"{tmp}/none.txt")


def trainer_flags(tmp):
    data = ["-i", f"{tmp}/data/t_train_*.bin", "-j", f"{tmp}/data/t_val_*.bin"]
    return ["-e", "recall", "-b", "2", "-x", "2", "-u", "0", "-v", "2", "-m", "1", *data]


def test_trainer(tmp):
    """Both kinds of files at once, while training and with -val 1."""
    files = ["-hellaswag", f"{tmp}/eval/h.bin", "-mc", f"{tmp}/eval/[mp].bin", "-needle", f"{tmp}/eval/needle1.bin"]
    r = run(CPU, *trainer_flags(tmp), "-t", "300", *files, "-o", f"{tmp}/run")
    lines = [line for line in r.stdout.split("\n") if re.search("[|] step 2$|^[^,]* at step 2", line)]
    check(r.returncode == 0 and len(lines) == 7, f"{r.returncode} {r.stderr} {r.stdout}")
    alone = run(CPU, "-e", f"{tmp}/run/ckpt_00000002.bin", "-val", "1", "-b", "1", "-t", "300", *files)
    check(alone.stdout.split("\n")[-5:-1] == lines[3:], f"-val 1 differs: {alone.stderr} {alone.stdout} {lines}")


def test_other_tokenizer(tmp, texts):
    """Shards and files of another tokenizer of the same size are refused; more added tokens and another BOS are not."""
    text = write(f"{tmp}/other.txt", "".join(f"{i * i} apples, {i % 7} pears and {i} plums; " for i in range(9000)))
    run_ok("data/bpe", "-o", f"{tmp}/other", "--name", "t", "--train-vocab", 400, text)
    other = ["--tokenizer", f"{tmp}/other/tokenizer.json"]
    run_ok("data/mc", "-o", f"{tmp}/eval/m_other.bin", *other, f"{tmp}/rows.jsonl")
    run_ok("data/hellaswag", "-o", f"{tmp}/eval/h_other.bin", *other, f"{tmp}/hellaswag_val.jsonl")
    run_ok("data/needle", "-o", f"{tmp}/eval/n_other.bin", *other, "--lengths", 128, "--depths", 1, text)
    val = ["-e", f"{tmp}/run/ckpt_00000002.bin", "-val", "1", "-b", "2"]
    for flag, file in (("-mc", "m_other.bin"), ("-hellaswag", "h_other.bin"), ("-needle", "n_other.bin")):
        wanted = f"{flag} {tmp}/eval/{file}: made with another tokenizer than {tmp}/run/tokenizer.bin"
        run_error((wanted, f"make it with the latter: data/{flag[1:]} --tokenizer"), CPU, *val, flag, f"{tmp}/eval/{file}")
    both = f"{tmp}/other/tokenizer.bin: another tokenizer than {tmp}/run/tokenizer.bin; make all data with the latter: data/bpe"
    run_error(f"-j {both}", CPU, *val, "-j", f"{tmp}/other/t_val_*.bin")
    run_error(f"-i {both}", CPU, *val[:2], "-t", "64", "-b", "1", "-x", "1", "-i", f"{tmp}/other/t_train_*.bin")
    with open(texts.tokenizer, encoding="utf-8") as f:
        content = json.load(f)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<|new|>"})
    more = ["--tokenizer", write(f"{tmp}/more.json", json.dumps(content)), "--bos", "none"]
    run_ok("data/mc", "-o", f"{tmp}/eval/m_more.bin", *more, f"{tmp}/rows.jsonl")
    run_ok("data/bpe", "-o", f"{tmp}/more", "--name", "t", *more, texts.path)
    r = run(CPU, *trainer_flags(tmp)[:-1], f"{tmp}/more/t_val_*.bin", "-t", "64", "-mc", f"{tmp}/eval/m_more.bin")
    check(r.returncode == 0 and "m_more: " in r.stdout, f"an added token and another BOS are refused: {r.stderr}")


TASK = """task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


# Prints the scores of each model, a line of JSON each.
LM_EVAL = """import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
for folder in sys.argv[2:]:
    model = {"pretrained": folder, "trust_remote_code": True, "dtype": "float32"}
    scores = simple_evaluate("hf", model, ["mine"], device="cpu", batch_size=8, task_manager=manager)["results"]["mine"]
    print(json.dumps({name: scores[name + ",none"] for name in ("acc", "acc_norm")}))
"""


def test_lm_eval(tmp, texts):
    """The trainer and lm-eval give the same answers, with full attention and with NSA."""
    rng = random.Random(2)
    with open(texts.path, encoding="utf-8") as f:
        words = f.read().split()
    phrase = lambda n: " ".join(words[(at := rng.randrange(20000)) : at + n])  # noqa: E731
    rows = [
        {"context": phrase(rng.randint(1, 60)) + " " * (i % 7 == 0), "choices": [" " + phrase(rng.randint(1, 12)) for _ in range(4)],
         "label": rng.randrange(4)}
        for i in range(60)
    ]  # fmt: skip
    path = write_rows(f"{tmp}/lm/rows.jsonl", rows)
    write(f"{tmp}/lm/mine.yaml", TASK.format(rows=path))
    ours, attentions = {}, ("full", "nsa")
    for attn in attentions:
        folder = f"{tmp}/lm/{attn}"
        run_ok(CPU, *trainer_flags(tmp), "-t", "128", "-attn", attn, "-x", "30", "-v", "0", "-l", "2e-3", "-o", folder)
        # this tokenizer.json adds no BOS; the one that is made from tokenizer.bin does
        given, bos = (["--tokenizer", texts.tokenizer], ["--bos", "none"]) if attn == "full" else ([], [])
        run_ok("data/mc", "-o", f"{tmp}/lm/mine.bin", "--tokenizer", texts.tokenizer, *bos, path)
        r = run(CPU, "-e", f"{folder}/ckpt_00000030.bin", "-val", "1", "-b", "2", "-mc", f"{tmp}/lm/mine.bin")
        found = re.search(r"mine: (\d+) of 60 right.*per character (\d+),", r.stdout)
        check(found, f"{attn}: {r.stdout} {r.stderr}")
        ours[attn] = found and [int(count) for count in found.groups()]
        run_ok("scripts/to_hf.py", f"{folder}/ckpt_00000030.bin", "-o", f"{folder}_hf", "--dtype", "fp32", *given)
    env = {**os.environ, "HF_HOME": f"{tmp}/hf", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", LM_EVAL, f"{tmp}/lm", *(f"{tmp}/lm/{attn}_hf" for attn in attentions)]
    r = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in r.stdout.splitlines() if line.startswith("{")] + 2 * ["{}"]
    for attn, line in zip(attentions, lines):
        theirs = [round(60 * score) for score in json.loads(line).values()]
        check(theirs == ours[attn], f"{attn}: lm-eval has {theirs} right, the trainer {ours[attn]}: {r.stderr[-1500:]}")


def main():
    global forks
    needed = ("numpy", "tokenizers", "tiktoken")
    missing = [p for p in needed if importlib.util.find_spec(p) is None]
    if missing:
        skip(f"data/hellaswag, data/mc and data/needle need the Python packages {', '.join(missing)}")
    else:
        forks = Forks(*needed)
        tmp = tempfile.mkdtemp(prefix="test_evals.")
        try:
            texts = Texts(tmp)
            test_hellaswag(tmp, texts)
            test_mc(tmp, texts)
            test_needle(tmp, texts)
            test_trainer(tmp)
            test_other_tokenizer(tmp, texts)
            run_errors()
            missing = [p for p in ("lm_eval", "torch", "transformers", "accelerate") if importlib.util.find_spec(p) is None]
            if missing:
                skip(f"a comparison with lm-eval needs the Python packages {', '.join(missing)}: "
                     "python3 -m pip install -r dev/test/requirements.txt")  # fmt: skip
            else:
                test_lm_eval(tmp, texts)
        finally:
            shutil.rmtree(tmp)
    finish()


if __name__ == "__main__":
    main()
