"""Tests data/bpe, data/hub, data/get, data/corpus and dev/results/repeated_text.py from the command line: shards decode to their text, killed runs and
runs on a full disk resume, and every error is reported. `make test` sets CPU (the trainer) and BUILD (the
folder with the program of dev/test/encode.c). Tests are skipped if packages of requirements.txt are missing.
"""

import base64
import concurrent.futures
import fcntl
import glob
import gzip
import hashlib
import http.server
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.parse

from checks import check, finish, skip
from forks import Forks

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
DATA = os.path.join(ROOT, "data")
CPU = os.path.abspath(os.environ.get("CPU", os.path.join(ROOT, "train_gpt_nsa_cpu")))
ENCODE = os.path.abspath(os.path.join(os.environ.get("BUILD", os.path.join(ROOT, "build")), "encode"))
sys.path.insert(0, DATA)
SEED = random.SystemRandom().randrange(10**6)


def command(program, *args):
    return [sys.executable, os.path.join(DATA, program), *map(str, args)]


def run(program, *args, env=None, limit=None):
    """Runs a program of data/. limit: maximum file size in bytes."""

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    if not env and not limit:
        return forks.run(os.path.join(DATA, program), *args)
    return subprocess.run(
        command(program, *args),
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=set_limit if limit else None,
        timeout=300,
    )


def run_ok(program, *args, **kw):
    """Runs a program that must succeed without warnings. Returns its notes and its stdout."""
    r = run(program, *args, **kw)
    notes = all(line.startswith("note: ") for line in r.stderr.splitlines())
    check(r.returncode == 0 and notes, f"{program} {args}: code {r.returncode}, {r.stderr[-600:]}")
    return r.stderr + r.stdout


def read_folder(folder):
    """Returns {relative path: bytes} of all files in a folder, without its lock file."""
    found = {}
    for subfolder, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(subfolder, name)
            if os.path.isfile(path) and name != ".lock":
                with open(path, "rb") as f:
                    found[os.path.relpath(path, folder)] = f.read()
    return found


folder_numbers = itertools.count()


def expect_error(wanted, program, *args, **kw):
    """Runs a program that must end with code 1, one line on stderr that contains `wanted`, and no shards. A
    folder ".../x" in `args` is replaced by a new one each time."""
    number = next(folder_numbers)
    args = [f"{a}{number}" if str(a).endswith("/x") else a for a in args]
    r = run(program, *args, **kw)
    text = f"{program} {' '.join(map(str, args))[-200:]}: code {r.returncode}: {r.stderr[-700:]!r}"
    check(
        r.returncode == 1
        and r.stderr.count("\n") == 1
        and r.stderr.startswith("error: ")
        and wanted in r.stderr,
        f"{wanted!r} is missing; {text}",
    )
    check(not glob.glob(f"{tempfile.gettempdir()}/*/x{number}/text_*.bin"), f"leaves shards; {text}")


def write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode())
    return path


# ---- readers of the files, independent of data/*.py -------------------------------------------------------


def read_shard(path):
    """Returns (tokens, bytes per token). Checks what llmc/shard.h checks."""
    with open(path, "rb") as f:
        content = f.read()
    magic, version, count = struct.unpack("<3i", content[:12])
    width = {20240520: 2, 20240801: 4}[magic]
    assert version == {2: 1, 4: 7}[width] and count > 0 and len(content) == 1024 + count * width, path
    return list(struct.unpack(f"<{count}{'H' if width == 2 else 'I'}", content[1024:])), width


def read_shards(folder, name, part, max_tokens=None):
    """Returns (tokens of all shards, set of their bytes per token). All but the last must have max_tokens."""
    tokens, widths = [], set()
    paths = sorted(glob.glob(f"{folder}/{name}_{part}_*.bin"))
    for i, path in enumerate(paths):
        assert path.endswith(f"_{part}_{i:06d}.bin"), path
        shard, width = read_shard(path)
        assert max_tokens is None or (
            len(shard) == max_tokens if i < len(paths) - 1 else len(shard) <= max_tokens
        ), path
        tokens += shard
        widths.add(width)
    return tokens, widths


def read_tokenizer(folder):
    """Returns (bytes of each token, id of end-of-text, pretokenizer) of a BPE tokenizer.bin."""
    with open(os.path.join(folder, "tokenizer.bin"), "rb") as f:
        content = f.read()
    header, offset, pieces = struct.unpack("<256i", content[:1024]), 1024, []
    for _ in range(header[2]):
        (n,) = struct.unpack_from("<H", content, offset)
        pieces.append(content[offset + 2 : offset + 2 + n])
        offset += 2 + n + 5
    assert header[:2] == (20260801, 2) and header[4] in (2, 3) and offset + 12 * header[10] == len(content)
    return pieces, header[3], header[5]


def decode_documents(tokens, pieces, eot):
    """Returns the text of each document. Every document ends with end-of-text."""
    texts, text = [], []
    for token in tokens:
        if token == eot:
            texts.append(b"".join(text))
            text = []
        else:
            text.append(pieces[token])
    assert not text, "the last document has no end-of-text"
    return texts


def run_encode(folder, items, kind, *mode):
    """Runs the C encoder (llmc/tokenizer.h) on a list of inputs and returns the list of outputs, as bytes. kind: bytes
    of an item of an input."""
    data = b"".join(struct.pack("<I", len(x) // kind) + x for x in items)
    r = subprocess.run([ENCODE, os.path.join(folder, "tokenizer.bin"), *mode], input=data, capture_output=True)
    check(r.returncode == 0, f"encode: {r.stderr}")
    out, at, width = [], 0, 5 - kind
    while at < len(r.stdout):
        end = at + 4 + width * struct.unpack_from("<I", r.stdout, at)[0]
        out.append(r.stdout[at + 4 : end])
        at = end
    return out


def encode_in_c(folder, text, *mode):
    """Returns the tokens that the C encoder makes of bytes."""
    return encode_all_in_c(folder, [text], *mode)[0]


def encode_all_in_c(folder, texts, *mode):
    """Returns the tokens that the C encoder makes of each text. mode "special": special tokens become their ids."""
    found = [list(struct.unpack(f"<{len(x) // 4}i", x)) for x in run_encode(folder, texts, 1, *mode)]
    check(len(found) == len(texts), f"encode: {len(found)} results of {len(texts)} texts")
    return found


def decode_in_c(folder, lists):
    """Returns the text that the C decoder makes of each list of tokens."""
    return run_encode(folder, [struct.pack(f"<{len(x)}i", *x) for x in lists], 4, "decode")


def bos_and_eos(folder):
    """Returns (id of BOS, ids of the end-of-sequence tokens) of a tokenizer.bin."""
    with open(os.path.join(folder, "tokenizer.bin"), "rb") as f:
        header = struct.unpack("<256i", f.read(1024))
    return header[7], list(header[14 : 14 + header[13]])


def val_start(text, val_fraction=0.1):
    """Returns the offset of bpe's validation part."""
    start = len(text) - int(len(text) * val_fraction)
    line = text[start : start + 4096].find(b"\n") + 1
    if 0 < line < len(text) - start:
        return start + line
    while start < len(text) and 0x80 <= text[start] < 0xC0:
        start += 1
    return start


def sentences(rng, size):
    """Text of made-up words, some with accents, digits and quotes."""
    syllables = ["ba", "do", "ki", "lu", "mer", "ton", "sha", "vel", "é", "ü", "str"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    words += ["don't", "I'LL", "1984", "3.14", "“so”", "—", "x=y;", "漢字", "🙂"]
    out, n = [], 0
    while n < size:
        line = " ".join(rng.choices(words, k=12)) + rng.choice([".\n", "!\n\n", ",\n", "?\r\n", ".  "])
        out.append(line)
        n += len(line.encode())
    return "".join(out).encode()


# ---- get (needs no packages) -------------------------------------------------------------------------------


def load_program(name):
    loader = importlib.machinery.SourceFileLoader(name, os.path.join(DATA, name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def test_get(tmp):
    import shards

    get = load_program("get")
    novel = (
        "\ufeffThe Project Gutenberg EBook\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\n\r\n"
        "Produced by A and B\r\n\r\n\r\n\r\n\r\nTITLE\r\n\r\n\r\n\r\n\r\n\r\nCafé\r\nwords, words.\r\n\r\n"
        "End of the Project Gutenberg EBook\r\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\nlicense"
    )
    for encoding in ("utf-8", "latin-1"):
        check(
            get.novel_only(novel.encode(encoding, "ignore")) == "TITLE\n\n\nCafé\nwords, words.\n".encode(),
            f"header and footer of a novel, {encoding}: {get.novel_only(novel.encode(encoding, 'ignore'))}",
        )
    expect_error("check the network", "get", "-o", f"{tmp}/g", "--from", "http://127.0.0.1:9")
    expect_error("check the network", "get", "-o", f"{tmp}/g", "--from", "nonsense")
    check(not os.path.exists(f"{tmp}/g"), "get leaves a folder after a failed download")

    # a local server, first with a wrong text
    served, wanted = f"{tmp}/served", hashlib.sha256(get.novel_only(novel.encode())).hexdigest()
    get.TEXTS = [
        ("plays.txt", "who/plays", "c0", "a/plays.txt", hashlib.sha256(b"Exeunt.\n").hexdigest()),
        ("books/x.txt", "who/x", "c1", "x-0.txt", wanted),
    ]
    write(f"{served}/who/plays/c0/a/plays.txt", "Exeunt.\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = []

        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *_):
            self.requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"

    def fetch():
        sys.argv, out = ["get", "-o", f"{tmp}/g", "--from", base], sys.stdout
        with open(os.devnull, "w") as sys.stdout:
            try:
                get.main()
            except SystemExit as e:
                return str(e)
            finally:
                sys.stdout = out
        return ""

    write(f"{served}/who/x/c1/x-0.txt", novel.replace("words", "wards"))
    check(
        "not the expected text" in fetch() and list(read_folder(f"{tmp}/g")) == ["plays.txt"],
        "get keeps a wrong text",
    )
    write(f"{served}/who/x/c1/x-0.txt", novel)
    check(
        fetch() == ""
        and read_folder(f"{tmp}/g")["books/x.txt"] == "TITLE\n\n\nCafé\nwords, words.\n".encode(),
        "get's download",
    )
    count = len(Handler.requests)
    check(fetch() == "" and len(Handler.requests) == count, "get downloads an existing file again")
    with open(f"{served}/who/x/c1/x-0.txt", "ab") as f:
        f.truncate(shards.MAX_DOWNLOAD_BYTES + 1)
    os.remove(f"{tmp}/g/books/x.txt")
    check("more than 67108864 bytes" in fetch(), "get reads a download of any length")
    write(f"{tmp}/g/books/x.txt", "another text")
    shutil.rmtree(f"{served}/who/x")
    os.remove(f"{tmp}/g/books/x.txt")
    check("404" in fetch(), "get does not report a file that the server does not have")
    server.shutdown()


# ---- bpe ---------------------------------------------------------------------------------------------------


def test_corpus(tmp):
    """data/corpus writes each file of a tree once, in documents of a least length from one part of the tree."""
    source, rng = f"{tmp}/tree", random.Random(3)
    sizes = {"a/1.c": 700, "a/2.c": 500, "a/3.h": 300, "a/b/4.c": 100, "a/b/5.c": 200, "big/6.c": 5000}
    sizes.update({"7.c": 400, "c/d/8.c": 1000, "c/9.c": 50})
    texts = {}
    for name, size in sizes.items():
        letters = bytes(rng.choice(b"abcdefgh \n") for _ in range(size - 1))
        texts[name] = b"<" + letters.strip() + b">\n"
        write(f"{source}/{name}", texts[name][: -1 if name == "a/2.c" else None])  # without its last newline
    write(f"{source}/c/binary.c", b"\0" * 2000)
    write(f"{source}/a/.hidden/x.c", "hidden")
    write(f"{source}/empty.c", "")
    os.symlink("../big", f"{source}/c/link")
    with tarfile.open(f"{tmp}/tree.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="/top")
        archive.add(f"{source}/7.c", arcname="../outside.c")
    wanted = {
        # c/d has a document of its own, 9.c of the same length or more has not, so 9.c goes up with 7.c
        "a/000.txt": texts["a/b/4.c"] + texts["a/b/5.c"] + texts["a/1.c"],
        "big/000.txt": texts["big/6.c"],
        "c/d/000.txt": texts["c/d/8.c"],
    }
    wanted["a/000.txt"] += texts["a/2.c"] + texts["a/3.h"]  # too short for a document
    least = 900
    out = run_ok("corpus", "-o", f"{tmp}/long", "--min-bytes", least, source)
    check(
        read_folder(f"{tmp}/long") == wanted,
        f"documents {[(k, len(v)) for k, v in read_folder(f'{tmp}/long').items()]}",
    )
    rest = len(texts["c/9.c"] + texts["7.c"])
    check(
        out.startswith(f"{tmp}/long: 3 documents of ")
        and f"left out: 1 binary file, {rest} bytes" in out,
        out,
    )
    check(min(map(len, wanted.values())) >= least, "the test's documents")
    run_ok("corpus", "-o", f"{tmp}/long_tar", "--min-bytes", least, f"{tmp}/tree.tar.gz")
    check(
        read_folder(f"{tmp}/long_tar") == {f"top/{k}": v for k, v in wanted.items()},
        "documents of a tar archive",
    )
    check(not os.path.exists(f"{tmp}/outside.c"), "a member of an archive is written outside")
    run_ok("corpus", "-o", f"{tmp}/headers", "--min-bytes", 1, "--suffix", ".h,.x", source)
    check(read_folder(f"{tmp}/headers") == {"a/000.txt": texts["a/3.h"]}, "--suffix")
    left = len(b"".join(texts.values()))
    expect_error(
        f"has {left} bytes of text, too few", "corpus", "-o", f"{tmp}/x", "--min-bytes", "1e6", source
    )
    write(f"{tmp}/names/000.txt/1.c", b"a" * least), write(f"{tmp}/names/2.c", b"b" * least)
    run_ok("corpus", "-o", f"{tmp}/named", "--min-bytes", least, f"{tmp}/names")
    names = sorted(read_folder(f"{tmp}/named"))
    check(names == ["000.txt/000.txt", "000_.txt"], f"a folder with the name of a document: {names}")
    expect_error("exists already", "corpus", "-o", f"{tmp}/long", source)
    expect_error("No such file", "corpus", "-o", f"{tmp}/x", f"{tmp}/nowhere")
    expect_error("--min-bytes", "corpus", "-o", f"{tmp}/x", "--min-bytes", "0", source)
    expect_error("-o /proc/c: cannot write there", "corpus", "-o", "/proc/c", source)
    with open(f"{tmp}/tree.tar.gz", "rb") as f:
        cut = write(f"{tmp}/cut.tar.gz", f.read()[:300])
    for path in (cut, f"{source}/7.c"):
        expect_error("not a whole tar archive; check the path", "corpus", "-o", f"{tmp}/x", path)
    if not glob.glob("/usr/src/linux-source-*.tar.*"):
        expect_error("apt-get install linux-source", "corpus", "-o", f"{tmp}/x")
    check(not glob.glob(f"{tmp}/*.tmp"), f"left: {glob.glob(f'{tmp}/*.tmp')}")


def test_text(tmp, rng):
    """Shards of all kinds of text decode to it, and have the tokens that the trainer's encoder makes."""
    texts = {
        "a.txt": sentences(rng, 1_400_000),
        "b/latin1.txt": "Müller trank süßen Käse à la carte.\n".encode("latin-1") * 300,
        "b/bytes.bin": bytes(rng.randrange(256) for _ in range(40000)),
        "b/nospace.txt": "漢字".encode() * 150_000,  # no safe cut
        "b/tiny.txt": b"x",
        "b/special.txt": b"spelled <|endoftext|> out\n" * 50,
        "b/white.txt": b" \n\t \r\n" * 2000,
    }
    for name, text in texts.items():
        write(f"{tmp}/texts/{name}", text)
    write(f"{tmp}/texts/b/empty.txt", "")
    write(f"{tmp}/texts/.hidden", "not read")
    os.symlink("..", f"{tmp}/texts/b/loop")
    out = run_ok("bpe", "-o", f"{tmp}/t", "--train-vocab", 1000, "--shard", 100_000, f"{tmp}/texts")
    check("training a BPE of 1000 tokens" in out and " 13 documents, " in out, out)
    pieces, eot, _ = read_tokenizer(f"{tmp}/t")
    check(len(pieces) == 1000 and pieces[eot] == b"<|endoftext|>", "the trained vocabulary")
    train, widths = read_shards(f"{tmp}/t", "text", "train", 100_000)
    val, _ = read_shards(f"{tmp}/t", "text", "val", 100_000)
    check(widths == {2} and len(glob.glob(f"{tmp}/t/text_train_*.bin")) > 3, "16-bit shards, several")
    train_texts, val_texts = decode_documents(train, pieces, eot), decode_documents(val, pieces, eot)
    num_val = 0
    for i, name in enumerate(sorted(texts)):
        cut = val_start(texts[name])
        check(train_texts[i] == texts[name][:cut], f"training part of {name} decodes to another text")
        if cut < len(texts[name]):
            check(
                val_texts[num_val] == texts[name][cut:], f"validation part of {name} decodes to another text"
            )
            num_val += 1
    check(
        len(train_texts) == len(texts) and num_val == len(val_texts),
        f"{len(train_texts)} training and {len(val_texts)} validation documents",
    )
    # bpe cuts a.txt into chunks, the C encoder does not
    cut = val_start(texts["a.txt"])
    check(
        train[: train.index(eot)] == encode_in_c(f"{tmp}/t", texts["a.txt"][:cut]),
        "the C encoder makes other tokens of a.txt",
    )
    for text in (texts["b/latin1.txt"], texts["b/bytes.bin"]):
        ids = encode_in_c(f"{tmp}/t", text)
        check(b"".join(pieces[i] for i in ids) == text, "the C encoder changes bytes")
    ends = [i for i, token in enumerate(train) if token == eot]
    cut = val_start(texts["b/bytes.bin"])
    check(
        train[ends[0] + 1 : ends[1]] == encode_in_c(f"{tmp}/t", texts["b/bytes.bin"][:cut]),
        "the C encoder makes other tokens of bytes.bin",
    )

    before = read_folder(f"{tmp}/t")
    check(
        "nothing to do"
        in run_ok("bpe", "-o", f"{tmp}/t", "--train-vocab", 1000, "--shard", 100_000, f"{tmp}/texts"),
        "a second run does the work again",
    )
    check(read_folder(f"{tmp}/t") == before, "a second run changes files")
    # a run that was killed after it saved its end and before it renamed the last two shards
    shards = sorted(glob.glob(f"{tmp}/t/text_train_*.bin"))
    for path in shards[-2:]:
        os.rename(path, path + ".tmp")
    args = ["bpe", "-o", f"{tmp}/t", "--train-vocab", 1000, "--shard", 100_000, f"{tmp}/texts"]
    run_ok(*args)
    check(read_folder(f"{tmp}/t") == before, "finished shards are not renamed")
    os.rename(shards[-1], f"{tmp}/moved")
    expect_error("is missing", *args)
    os.rename(f"{tmp}/moved", shards[-1])
    return before


def test_val_documents(tmp, tokenizer):
    """--val-documents holds out whole files with at least --min-tokens tokens."""
    rng = random.Random(5)
    texts = {
        f"{i:02d}.txt": sentences(rng, size) for i, size in enumerate([400, 9000, 300, 7000, 8000, 12000])
    }
    for name, text in texts.items():
        write(f"{tmp}/whole/{name}", text)
    flags = ["--tokenizer", tokenizer, "--val-documents", 2, "--min-tokens", 1500, f"{tmp}/whole"]
    out = run_ok("bpe", "-o", f"{tmp}/held", *flags)
    pieces, eot, _ = read_tokenizer(f"{tmp}/held")
    parts = [read_shards(f"{tmp}/held", "text", part)[0] for part in ("train", "val")]
    train, val = (decode_documents(tokens, pieces, eot) for tokens in parts)
    check(len(val) == 2 and sorted(train + val) == sorted(texts.values()), f"not whole files: {out}")
    ends = [-1] + [i for i, token in enumerate(parts[1]) if token == eot]
    lengths = [b - a - 1 for a, b in zip(ends, ends[1:])]
    check(min(lengths) >= 1500, f"held out files of {lengths} tokens")
    run_ok("bpe", "-o", f"{tmp}/held2", *flags)
    check(read_shards(f"{tmp}/held2", "text", "val")[0] == parts[1], "a second run holds out other files")
    longest = max(len(encode_in_c(f"{tmp}/held", text)) for text in texts.values())
    flags[3], flags[5] = 1, longest
    run_ok("bpe", "-o", f"{tmp}/held3", *flags)
    val = decode_documents(read_shards(f"{tmp}/held3", "text", "val")[0], pieces, eot)
    check(val == [texts["05.txt"]], f"only the longest file has {longest} tokens")
    flags[5] = longest + 1
    expect_error(
        f"only 0 of 6 files have at least {longest + 1} tokens (--min-tokens), the longest has {longest}",
        "bpe",
        "-o",
        f"{tmp}/x",
        *flags,
    )
    flags[5] = 99999  # more than the bytes of any file
    largest = max(map(len, texts.values()))
    expect_error(f"(--min-tokens), the largest has {largest} bytes; hold out fewer", "bpe", "-o", f"{tmp}/x", *flags)
    run_ok("bpe", "-o", f"{tmp}/held4", "--train-vocab", 300, "--val-documents", 5, f"{tmp}/whole")
    pieces, eot, _ = read_tokenizer(f"{tmp}/held4")
    train4 = decode_documents(read_shards(f"{tmp}/held4", "text", "train")[0], pieces, eot)
    check(len(train4) == 1 and train4[0] in texts.values(), f"{len(train4)} training files of 6 - 5")
    flags = ["--tokenizer", tokenizer, "--val-documents", 2, "--min-tokens", 1500, f"{tmp}/whole"]
    run_ok("bpe", "-o", f"{tmp}/every", "--every", 3, *flags)
    parts3 = [read_shards(f"{tmp}/every", "text", part)[0] for part in ("train", "val")]
    pieces, eot, _ = read_tokenizer(f"{tmp}/every")
    train3 = decode_documents(parts3[0], pieces, eot)
    check(parts3[1] == parts[1], "--every holds out the same files")
    check(train3 == train[::3] and len(train3) == 2, f"--every 3 takes {len(train3)} of {len(train)} files")
    expect_error("made with another value of 'every' (3, now null)", "bpe", "-o", f"{tmp}/every", *flags)
    # the state of an older version has no such settings
    with open(f"{tmp}/held4/text.json") as f:
        state = json.load(f)
    state["settings"]["val_documents"] = None
    del state["settings"]["min_tokens"], state["settings"]["every"]
    write(f"{tmp}/held4/text.json", json.dumps(state))
    out = run_ok("bpe", "-o", f"{tmp}/held4", "--train-vocab", 300, f"{tmp}/whole")
    check("nothing to do" in out, f"the state of an older version: {out}")


def test_trainer(tmp):
    """The trainer trains on the shards, encodes a prompt and prints a sample."""
    flags = ["-e", "recall", "-layers", "1", "-channels", "16", "-t", "32", "-b", "1", "-x", "1", "-g", "8"]
    r = subprocess.run(
        [
            CPU,
            *flags,
            "-i",
            f"{tmp}/t/text_train_*.bin",
            "-j",
            f"{tmp}/t/text_val_*.bin",
            "-v",
            "1",
            "-m",
            "1",
            "-s",
            "1",
            "-prompt",
            "don't “so” 漢字",
        ],
        capture_output=True,
        text=True,
        errors="replace",
    )
    check(
        r.returncode == 0 and "vocabulary 1000" in r.stdout and "don't “so” 漢字" in r.stdout,
        f"the trainer: {r.stderr} {r.stdout[-300:]}",
    )


def kill_and_resume(args, folder, wanted):
    """Stops a run by different signals, each time after it saved new progress. It runs on one core so that it
    is slow enough. After each signal, shards without .tmp must be complete and the workers must have ended.
    The final files must be those of an uninterrupted run, `wanted`."""
    rng, resumed = random.Random(SEED), 0
    state = os.path.join(folder, "text.json")

    def saved():
        return os.path.exists(state) and os.stat(state).st_mtime_ns

    for signum in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = saved()
        p = subprocess.Popen(
            command(*args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {rng.choice(sorted(os.sched_getaffinity(0)))}),
        )
        while p.poll() is None and saved() == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        workers = children(p.pid)
        p.send_signal(signum)
        p.wait()
        deadline = time.monotonic() + 10
        while any(map(is_running, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        alive = [pid for pid in workers if is_running(pid)]
        check(not alive, f"{signum}: workers keep running without the main process")
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        out, err = p.communicate()
        resumed += "resuming after" in out
        with open(state) as f:
            if json.load(f)["done"]:
                break
        if signum != signal.SIGKILL:
            check(p.returncode == 1 and err.count("\n") == 1 and "interrupted" in err, f"{signum}: {err!r}")
        check(len(workers) > 0, "found no workers")
        for path in glob.glob(f"{folder}/*.bin"):
            with open(path, "rb") as f:
                check(f.read() == wanted[os.path.basename(path)], f"{path} is incomplete after {signum}")
    out = run_ok(*args)
    resumed += "resuming after" in out
    check(resumed > 0, "no run resumed after a kill")
    check(read_folder(folder) == wanted, f"{args}: other files than those of an uninterrupted run")


def is_running(pid):
    """Returns whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_kills(tmp, tokenizer):
    write(f"{tmp}/k_text.txt", sentences(random.Random(SEED), 1_000_000) * 9)
    args = ["--tokenizer", tokenizer, "--shard", 200_000, f"{tmp}/k_text.txt"]
    run_ok("bpe", "-o", f"{tmp}/k_whole", *args)
    kill_and_resume(["bpe", "-o", f"{tmp}/k", *args], f"{tmp}/k", read_folder(f"{tmp}/k_whole"))


def children(pid):
    """Returns the ids of all descendants of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            direct = [int(x) for x in f.read().split()]
    except OSError:
        return []
    return direct + [c for d in direct for c in children(d)]


def test_disk(tmp, tokenizer):
    """A file size limit causes one line on stderr and no shard; the same command resumes. A link in the place
    of a temporary file is not followed."""
    write(f"{tmp}/d.txt", sentences(random.Random(1), 700_000))
    args = ["--tokenizer", tokenizer, f"{tmp}/d.txt"]
    run_ok("bpe", "-o", f"{tmp}/d_whole", *args)
    os.makedirs(f"{tmp}/d")
    victim = write(f"{tmp}/victim", "not ours")
    for name in ("text_train_000000.bin", "text_val_000000.bin", "text.json", "tokenizer.bin"):
        os.symlink(victim, f"{tmp}/d/{name}.tmp")
    r = run("bpe", "-o", f"{tmp}/d", *args, limit=200_000)
    check(
        r.returncode == 1 and r.stderr.count("\n") == 1 and "File too large" in r.stderr,
        f"file size limit: {r.stderr!r}",
    )
    check(not glob.glob(f"{tmp}/d/text_*.bin"), "a full disk leaves a shard")
    run_ok("bpe", "-o", f"{tmp}/d", *args)
    check(read_folder(f"{tmp}/d") == read_folder(f"{tmp}/d_whole"), "a full disk leads to other files")
    with open(victim) as f:
        check(f.read() == "not ours", "a temporary file follows a link")


def test_streams_and_lock(tmp, tokenizer):
    """A full, closed or unread stdout, and a folder that another process has locked, are errors of one line."""
    text, host = write(f"{tmp}/streams.txt", "some words here\n" * 100), socket.gethostname()
    args = ["--tokenizer", tokenizer, text]
    for number, (program_args, stream) in enumerate(
        itertools.product((["-o", f"{tmp}/streams", *args], ["-h"]), ("full", "pipe", "closed"))
    ):
        read_end, write_end = os.pipe()
        os.close(read_end)
        r = subprocess.run(
            command("bpe", *program_args),
            stdout=os.open("/dev/full", os.O_WRONLY) if stream == "full" else write_end,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: os.close(1)) if stream == "closed" else None,
        )
        os.close(write_end)
        wanted = {"full": "No space left on device", "pipe": "Broken pipe", "closed": "stdout is closed"}
        check(
            r.returncode == 1 and r.stderr.count("\n") == 1 and wanted[stream] in r.stderr,
            f"stdout {number} {stream}: code {r.returncode}, {r.stderr!r}",
        )
    run_ok("bpe", "-o", f"{tmp}/plain_streams", *args)
    subprocess.run(
        command("bpe", "-o", f"{tmp}/no_stderr", *args), stdout=subprocess.DEVNULL, preexec_fn=lambda: os.close(2)
    )
    check(read_folder(f"{tmp}/no_stderr") == read_folder(f"{tmp}/plain_streams"), "stderr closed")
    os.makedirs(f"{tmp}/locked")
    with open(f"{tmp}/locked/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write("process 1234 on host some-host.x\n")
        f.flush()
        expect_error("process 1234 on host some-host.x writes to", "bpe", "-o", f"{tmp}/locked", *args)
    run_ok("bpe", "-o", f"{tmp}/locked", *args)
    with open(f"{tmp}/locked/.lock") as f:
        check(re.fullmatch(rf"process \d+ on host {re.escape(host)}\n", f.read()), "the lock file has no owner")
    os.makedirs(f"{tmp}/link_lock")
    os.symlink(f"{tmp}/not_made", f"{tmp}/link_lock/.lock")
    expect_error("cannot write there: Too many levels of symbolic links", "bpe", "-o", f"{tmp}/link_lock", *args)
    check(not os.path.lexists(f"{tmp}/not_made"), "a lock follows a link")


def expect_exit(wanted, program, *args):
    """Runs a program of data/ in this process. It must end with one line that contains `wanted`. Any other
    exception is a failure."""
    argv, sys.argv = sys.argv, [program, *map(str, args)]
    try:
        load_program(program).main()
        message = "it ran"
    except SystemExit as e:
        message = str(e)
    except BaseException as e:
        message = f"traceback of {type(e).__name__}: {e}"
    finally:
        sys.argv = argv
    check(
        message.startswith("error: ") and wanted in message and "\n" not in message,
        f"{wanted!r} is not in {message[:300]!r} of {program} {' '.join(map(str, args))}",
    )


def test_malformed(tmp, tokenizer, shards):
    """Every malformed tokenizer.json or NAME.json, and every input that is no file, is an error of one line."""
    with open(tokenizer) as f:
        base = json.load(f)
    text = write(f"{tmp}/malformed.txt", "some words here\n" * 100)
    model, numbers = base["model"], itertools.count()
    deep = '{"model":' + "[" * 200_000

    def add(wanted, content):
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path = write(f"{tmp}/malformed/{next(numbers)}.json", content)
        expect_exit(wanted, "bpe", "-o", f"{tmp}/not_made", "--tokenizer", path, text)

    def with_model(**changes):
        return {**base, "model": {**model, **changes}}

    def with_added(*tokens):
        return {**base, "added_tokens": [*base["added_tokens"], *tokens]}

    invalid = "is not a valid tokenizer.json"
    for content in (deep, b"{\xff", "{" + "9" * 5000, {**base, "model": 3}, {**base, "model": [1]}, {"model": {}}):
        add(invalid, content)
    for vocab in (3, [1], {**model["vocab"], "zz": "7"}, {**model["vocab"], "zz": -1}, {**model["vocab"], "zz": 1.5}):
        add(invalid, with_model(vocab=vocab))
    for vocab in ({**model["vocab"], "zz": True}, {**model["vocab"], "zz": None}, {**model["vocab"], "zz": 5}):
        add(invalid, with_model(vocab=vocab))
    add(invalid, with_model(vocab={**model["vocab"], "\ud800": 9999}))
    for i in (1 << 20, 10**12, 10**30):
        add("at most 1048575 is possible", with_model(vocab={**model["vocab"], "zz": i}))
        add("at most 1048575 is possible", with_added({"content": "zz", "id": i, "special": True}))
    for merges in (3, None, {}, [1], [[1, 2]], ["a"], ["a b c"], [["a"]], [["a", None]], ["\ud800 a"]):
        add(invalid, with_model(merges=merges))
    for token in (3, {}, {"content": 3, "id": 9999}, {"content": "zz"}, {"content": "", "id": 9999}):
        add(invalid, with_added(token))
    add(invalid, {**base, "added_tokens": {"a": 1}})
    for part in (3, [1], {"type": "Sequence", "pretokenizers": 3}, {"type": "Sequence", "pretokenizers": [3]}):
        add(invalid, {**base, "pre_tokenizer": part})
    add(invalid, {**base, "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "pattern": 3}})
    add(invalid, {**base, "normalizer": 3})
    for depth in (400, 900):
        nested = '{"type": "Sequence", "pretokenizers": [' * depth + "]}" * depth
        wanted = "neither a byte-level nor" if depth == 400 else invalid
        add(wanted, json.dumps({**base, "pre_tokenizer": "NESTED"}).replace('"NESTED"', nested))

    state = json.loads(shards["text.json"])
    states = [3, [], {}, None, {**state, "extra": 1}, {**state, "settings": 3}, {**state, "done": 1}]
    for key in ("train", "val", "bytes", "documents"):
        states += [{**state, key: value} for value in ("7", -1, 1.5, None, True, 10**30)]
    states += [{**state, "train": 0, "val": 0}]
    for position in (3, "x", [], [1], [1, 2, 3], [-1, 0], [0, -1], [10**9, 0], [0, 10**15], ["0", 0], {"a": 1}):
        states += [{**state, "done": False, "position": position}]
    for number, content in enumerate([*map(json.dumps, states), "[" * 200_000, b"\xff\xfe"]):
        folder = f"{tmp}/states/{number}"
        write(f"{folder}/text.json", content)
        args = ["-o", folder, "--train-vocab", 1000, "--shard", 100_000, f"{tmp}/texts"]
        expect_exit("text.json is broken", "bpe", *args)

    os.makedirs(f"{tmp}/types")
    for name in ("a.json", "a.jsonl", "b/text.json", "c/tokenizer.bin"):
        os.makedirs(os.path.dirname(f"{tmp}/types/{name}"), exist_ok=True)
        os.mkfifo(f"{tmp}/types/{name}")
    flags = ["-o", f"{tmp}/not_made", "--tokenizer"]
    expect_exit("it is not a file but a FIFO", "bpe", *flags, f"{tmp}/types/a.json", text)
    expect_exit("it is not a file but a device", "bpe", *flags, "/dev/zero", text)
    expect_exit("it is a FIFO, neither", "bpe", *flags, tokenizer, f"{tmp}/types/a.json")
    expect_exit("a FIFO", "bpe", "-o", f"{tmp}/types/b", "--tokenizer", tokenizer, text)
    expect_exit("a FIFO", "bpe", "-o", f"{tmp}/types/c", "--tokenizer", tokenizer, text)
    expect_exit("a FIFO", "hub", *flags, tokenizer, f"{tmp}/types/a.jsonl")
    huge = f"{tmp}/types/huge.json"
    with open(huge, "wb") as f:
        f.truncate(1 << 40)  # without blocks on disk
    expect_exit("at most 268435456 expected", "bpe", *flags, huge, text)
    check(not os.path.exists(f"{tmp}/not_made"), "an error makes the output folder")


def test_vocabularies(tmp, tokenizer):
    """Tokens of all kinds of tokenizers equal those of their own libraries, and those of the C encoder."""
    import tiktoken
    import tokenizers
    import vocab

    with open(tokenizer) as f:
        base = json.load(f)
    rng = random.Random(SEED)
    pool = [
        "a",
        "b",
        "the",
        "ki",
        "lu",
        "'s",
        "'S",
        "'ll",
        "'LL",
        "'ſ",
        "don't",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "\u00a0",
        "1",
        "12",
        "1234",
        "٣",
        "½",
        "é",
        "e\u0301",
        "漢字",
        "🙂",
        "—",
        "“",
        "...",
        "!?",
        "/",
        "_",
        "\x85",
        "\x1c",
        "\x00",
        "Ⅳ",
        "ǅ",
        " <|endoftext|>",
        "\u2028",
        "x\n\n y",
    ]
    texts = ["".join(rng.choices(pool, k=rng.randint(1, 12))) for _ in range(700)]

    def with_pattern(pattern):
        j = json.loads(json.dumps(base))
        j["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }
        return j

    qwen = with_pattern(vocab.PATTERNS[2][0])
    qwen["normalizer"] = {"type": "NFC"}
    qwen["added_tokens"].append(
        {
            "id": 1000,
            "content": "the ki",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    other = with_pattern(r"\p{L}+|\s+|[^\s\p{L}]+")
    other["model"]["dropout"] = 0.5
    smollm = json.loads(json.dumps(base))
    smollm["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}],
    }
    odd = json.loads(json.dumps(base))  # the bytes of a token do not merge to that token
    odd["model"]["vocab"]["kilu1"] = 1000
    odd["model"]["merges"] = [m for m in odd["model"]["merges"] if "".join(m) not in ("kilu",)]
    odd["model"]["merges"] += [["k", "ilu1"], ["i", "lu1"], ["lu", "1"]]
    odd["model"]["vocab"].update({"ilu1": 1001, "lu1": 1002})
    pieces, _, _ = read_tokenizer(f"{tmp}/t")
    ranks = {piece: i for i, piece in enumerate(p for p in pieces if p != b"<|endoftext|>")}
    end = {"<|endoftext|>": len(ranks)}
    # (name, tokenizer.json or pattern, tiktoken's engine is used, the C encoder is equivalent)
    cases = [
        ("gpt2", base, True, True),
        ("llama3", with_pattern(vocab.PATTERNS[1][0]), True, True),
        ("qwen", qwen, True, False),
        ("other", other, False, False),
        ("smollm", smollm, True, True),
        ("odd", odd, False, True),
        ("cl100k", vocab.PATTERNS[3][0], True, True),
        ("r50k", vocab.PATTERNS[0][1], True, True),
    ]
    for name, source, use_tiktoken, c_equivalent in cases:
        if isinstance(source, dict):
            v = vocab.from_hf(json.dumps(source), name, None)
            source["model"]["dropout"] = None
            library = tokenizers.Tokenizer.from_str(json.dumps(source))
            library.encode_special_tokens = True
            wanted = [library.encode(t, add_special_tokens=False).ids for t in texts]
        else:
            v = vocab.from_tiktoken(source, ranks, end, "<|endoftext|>", len(ranks) + 1)
            library = tiktoken.Encoding(name, pat_str=source, mergeable_ranks=ranks, special_tokens=end)
            wanted = [library.encode_ordinary(t) for t in texts]
        bad = [t for t, w in zip(texts, wanted) if v.encode(t.encode(), False).tolist() != w]
        check(
            not bad,
            f"{name}: the library makes other tokens of {len(bad)} texts (seed {SEED}): {bad[:3]!r}",
        )
        check(
            (v.tiktoken is not None) == use_tiktoken, f"{name}: tiktoken's engine: {v.tiktoken is not None}"
        )
        check((v.note is None) == c_equivalent, f"{name}: note {v.note}")
        if c_equivalent:  # byte 255, which is not valid UTF-8, separates the texts
            write(f"{tmp}/{name}/tokenizer.bin", v.tokenizer_bin())
            joined, separator = [], [int(v.byte_id[255])]
            for w in wanted:
                joined += separator + w if joined else w
            check(
                encode_in_c(f"{tmp}/{name}", b"\xff".join(t.encode() for t in texts)) == joined,
                f"{name}: the C encoder makes other tokens (seed {SEED})",
            )


def printable(text):
    """Returns the bytes of text that the trainer prints."""
    return bytes(c for c in text.encode() if (c >= 32 and c != 127) or c in b"\n\r\t")


def random_texts(rng, count):
    """Texts of words, white space, special tokens and characters of all kinds."""
    pool = ["ba", "ki", "lu", "don't", " ", "  ", "    ", "\n", "\n\n", "\t", "\u3000", "1", "1984", "٣", "½", "é", "e\u0301"]
    pool += ["漢字", "🙂", "👩\u200d👧", "—", "...", "\u2581", "\x00", "<0x41>", "<s>", "</s>", "<unk>", "<user>", "<user>:"]
    pool += ["▁<fill>", " <fill>", "<strip>", "the ki", "한국어", "ﬁ", "\ufeff", "<|endoftext|>"]
    texts = ["", " ", "  a"] + ["".join(rng.choices(pool, k=rng.randint(1, 12))) for _ in range(count)]
    texts += [sentences(rng, 40).decode(errors="ignore") for _ in range(count // 4)]
    return texts + ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(10)) for _ in range(count // 4)]


def compare_encoders(tmp, name, json_object, texts, config=None):
    """Compares the tokens of the C encoder, of data/vocab.py and of the tokenizers library, with special tokens as
    ordinary text and as themselves, and the decoded texts. Returns the Vocabulary."""
    import tokenizers
    import vocab

    v = vocab.from_hf(json.dumps(json_object), name, None, config)
    check(v.note is None, f"{name}: note {v.note}")
    write(f"{tmp}/{name}/tokenizer.bin", v.tokenizer_bin())
    library = tokenizers.Tokenizer.from_str(json.dumps(json_object))
    normalized = any(t.get("normalized") for t in json_object["added_tokens"])
    for mode in ([], ["special"]):
        library.encode_special_tokens = not mode
        all_wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
        in_c = encode_all_in_c(f"{tmp}/{name}", [text.encode() for text in texts], *mode)
        decoded_in_c = decode_in_c(f"{tmp}/{name}", all_wanted)
        for text, wanted, got, decoded in zip(texts, all_wanted, in_c, decoded_in_c):
            check(got == wanted, f"{name} {mode}: {text!r} (seed {SEED}): C makes {got}, the library {wanted}")
            if not mode:
                got = v.encode(text.encode(), False).tolist()
                check(got == wanted, f"{name}: {text!r} (seed {SEED}): vocab makes {got}, the library {wanted}")
            # the library prints a normalized added token with the space of its normalized form
            want = library.decode(wanted, skip_special_tokens=False)
            if not normalized and "\ufffd" not in want:
                check(decoded == printable(want), f"{name}: C decodes {text!r} to {decoded!r}, the library to {want!r}")
    return v


def sentencepiece_json(rng):
    """Returns a small tokenizer.json of the kind of Llama 2's, trained on made-up words."""
    import tokenizers

    t = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    added = ["<unk>", "<s>", "</s>", "<user>", "<user>:", "\u2581<fill>", "<strip>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=added, initial_alphabet=["\u2581"], show_progress=False
    )
    t.train_from_iterator([sentences(rng, 100_000).decode(errors="ignore").replace("漢", ""), "     a        b"], trainer)
    j = json.loads(t.to_str())
    ids = j["model"]["vocab"]
    for token in [f"<0x{b:02X}>" for b in range(256)] + ["\u2581" * n for n in (2, 4, 8)] + ["\n\n"]:
        ids.setdefault(token, len(ids))
    spaces = [["\u2581" * n, "\u2581" * n] for n in (1, 2, 4)]
    j["model"]["merges"] = spaces + [m for m in j["model"]["merges"] if m not in spaces]
    j["model"]["byte_fallback"] = True
    for token in j["added_tokens"]:
        token["normalized"] = False
        token["lstrip"] = token["rstrip"] = token["content"] == "<strip>"
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    j["added_tokens"].append({"id": ids["\n\n"], "content": "\n\n", **fields})
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    j["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    j["pre_tokenizer"] = None
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    j["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    return j


def test_sentencepiece(tmp):
    """Llama 2's kind of tokenizer, in all forms of its files."""
    import tokenizers
    import vocab

    rng = random.Random(SEED)
    base = sentencepiece_json(rng)

    def changed(change):
        j = json.loads(json.dumps(base))
        change(j)
        return j

    def metaspace(scheme, split):
        def change(j):
            rule = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
            j.update(normalizer=None, pre_tokenizer=rule)
            if scheme == "never":
                j["decoder"]["decoders"].pop()

        return change

    def gemma(j):
        j["normalizer"] = j["normalizer"]["normalizers"][1]
        j["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        j["decoder"]["decoders"].pop()

    def normalized(j):
        for token in j["added_tokens"]:
            token["normalized"] = True

    def no_bytes(j):
        j["model"]["byte_fallback"] = False

    cases = {"llama2": lambda j: None, "gemma": gemma, "normalized": normalized, "no_bytes": no_bytes}
    cases.update({f"{s}_{p}": metaspace(s, p) for s in ("first", "always", "never") for p in (False, True)})
    for name, change in cases.items():
        compare_encoders(tmp, f"sp_{name}", changed(change), random_texts(rng, 100))
    check(bos_and_eos(f"{tmp}/sp_llama2")[1] == [base["model"]["vocab"]["</s>"]], "the end-of-sequence token")

    # shards decode to their text, also with bytes that are not UTF-8
    base["added_tokens"].pop()  # the library puts a space after each added token
    write(f"{tmp}/sp.json", json.dumps(base))
    texts = {
        "a.txt": sentences(rng, 60_000),
        "b.txt": bytes(rng.randrange(256) for _ in range(5000)) + b"\xff",
        "c.txt": "a\ufffd\U000f0041\U000f00ff".encode() + b"\xff\xff\x80 b\xe6\xbc",
    }
    for name, text in texts.items():
        write(f"{tmp}/sp_texts/{name}", text)
    run_ok("bpe", "-o", f"{tmp}/sp", "--tokenizer", f"{tmp}/sp.json", "--val", 0, f"{tmp}/sp_texts")
    pieces, eot, _ = read_tokenizer(f"{tmp}/sp")
    tokens = read_shards(f"{tmp}/sp", "text", "train")[0]
    check(decode_documents(tokens, pieces, eot) == [b" " + t for _, t in sorted(texts.items())], "SentencePiece shards")
    at = 0
    for name, text in sorted(texts.items()):
        end = tokens.index(eot, at)
        check(tokens[at:end] == encode_in_c(f"{tmp}/sp", text), f"the C encoder makes other tokens of {name}")
        at = end + 1

    # one pre-token of 1 MB
    text = b"ba" * 250_000 + b" do" * 160_000
    begin = time.monotonic()
    ids = encode_in_c(f"{tmp}/sp", text)
    check(time.monotonic() - begin < 20, f"1 MB takes {time.monotonic() - begin:.1f} s")
    library = tokenizers.Tokenizer.from_str(json.dumps(base))
    check(ids == library.encode(text.decode(), add_special_tokens=False).ids, "1 MB: other tokens")

    for name, change, wanted in (
        ("byte merge", lambda j: j["model"].update(merges=[["<0x41>", "<0x42>"]]), "does not have"),
        ("no unknown", lambda j: j["model"].update(byte_fallback=False, unk_token=None), "neither a token for each byte"),
        ("prefix", lambda j: j["normalizer"]["normalizers"][0].update(prepend="x"), "neither a byte-level nor a"),
    ):
        try:
            vocab.from_hf(json.dumps(changed(change)), name, None)
            check(False, f"{name}: loaded")
        except SystemExit as e:
            check(wanted in str(e), f"{name}: {e}")


def gguf_file(fields):
    """Returns the content of a GGUF file with this metadata."""

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(v):
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        kind, form = {str: (8, None), int: (5, "<i"), float: (6, "<f")}[type(v[0])]
        items = b"".join(string(x) if form is None else struct.pack(form, x) for x in v)
        return struct.pack("<IIQ", 9, kind, len(v)) + items

    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields))
    return out + b"".join(string(k) + value(v) for k, v in fields.items())


def gguf_fields(tokenizer):
    """Returns the metadata of a GGUF file with the tokens of a byte-level tokenizer.json."""
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t == "<|endoftext|>" else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in tokenizer["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": ids["<|endoftext|>"],
    }


def test_gguf(tmp, tokenizer):
    """The tokenizer of a GGUF file is that of the tokenizer.json from which it was made."""
    import vocab

    rng = random.Random(SEED)
    with open(tokenizer) as f:
        base = json.load(f)
    base["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}],
    }
    smollm = gguf_fields(base)
    sp = sentencepiece_json(rng)
    ids = sp["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    sp["added_tokens"].pop()
    for token in sp["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    rank = {}
    for i, (a, b) in enumerate(sp["model"]["merges"]):
        rank.setdefault(a + b, i)
    special = {t["content"] for t in sp["added_tokens"]}
    llama = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(t, 5000)) for t in tokens],
        "tokenizer.ggml.token_type": [3 if t in special else 6 if re.match("<0x..>", t) else 1 for t in tokens],
        "tokenizer.ggml.bos_token_id": ids["<s>"],
        "tokenizer.ggml.eos_token_id": ids["</s>"],
        "tokenizer.ggml.unknown_token_id": ids["<unk>"],
    }
    for name, fields, json_object, wanted in (
        ("smollm", smollm, base, (-1, [7, base["model"]["vocab"]["<|endoftext|>"]])),
        ("llama", llama, sp, (ids["<s>"], [ids["</s>"]])),
    ):
        path = write(f"{tmp}/{name}.gguf", gguf_file(fields) + b"tensors")
        v = vocab.load(path, None)
        made = compare_encoders(tmp, f"gguf_json_{name}", json_object, [])
        write(f"{tmp}/gguf_{name}/tokenizer.bin", v.tokenizer_bin())
        check(bos_and_eos(f"{tmp}/gguf_{name}") == wanted, f"{name}: {bos_and_eos(f'{tmp}/gguf_{name}')}")
        texts = random_texts(rng, 60)
        in_c = encode_all_in_c(f"{tmp}/gguf_{name}", [text.encode() for text in texts])
        for text, c in zip(texts, in_c):
            a, b = v.encode(text.encode(), True).tolist(), made.encode(text.encode(), True).tolist()
            check(a == b, f"{name}.gguf: other tokens of {text!r} (seed {SEED}): {a}, {b}")
            check(a[:-1] == c, f"{name}.gguf: C: {text!r}")
    whole = gguf_file(smollm)
    flags = ["bpe", "-o", f"{tmp}/not_made", "--tokenizer"]
    text = write(f"{tmp}/gguf.txt", "text\n")
    for cut in (4, 20, 100, len(whole) // 2, len(whole) - 1):
        expect_exit("is truncated", *flags, write(f"{tmp}/cut.gguf", whole[:cut]), text)
    for field, value, wanted in (
        ("model", "bert", "only gpt2 and llama"),
        ("pre", "new", "known are gpt-2"),
        ("tokens", ["a"], "two lists of the same length"),
        ("merges", ["a"], "does not merge two tokens"),
        ("eos_token_id", 10**6, "eos_token_id"),
    ):
        changed = gguf_file({**smollm, f"tokenizer.ggml.{field}": value})
        expect_exit(wanted, *flags, write(f"{tmp}/changed.gguf", changed), text)


def test_bos_and_eos(tmp, tokenizer):
    """BOS and the end-of-sequence tokens come from --bos, tokenizer_config.json, the post_processor and
    generation_config.json."""
    import vocab

    with open(tokenizer) as f:
        base = json.load(f)
    eot, n = base["added_tokens"][0]["id"], len(base["model"]["vocab"])
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    base["added_tokens"] += [{"id": n, "content": "<s>", **fields}, {"id": n + 1, "content": "<end>", **fields}]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [n], "tokens": ["<s>"]}},
    }
    processors = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    content = {"content": "<s>", "lstrip": False}
    # (post_processor, tokenizer_config, generation_config, BOS, end-of-sequence)
    cases = [
        (None, None, None, eot, [eot]),
        (template, None, None, n, [eot]),
        (processors, {"bos_token": "<end>"}, {"eos_token_id": n + 1}, n, [n + 1]),
        (None, {"bos_token": content, "add_bos_token": True}, {"eos_token_id": [n + 1, eot]}, n, [n + 1, eot]),
        (template, {"bos_token": "<s>", "add_bos_token": False, "eos_token": "<end>"}, {}, -1, [n + 1]),
        (None, {"bos_token": "<s>", "eos_token": None}, None, -1, [eot]),
    ]
    for number, (processor, config, generation, bos, eos) in enumerate(cases):
        folder = f"{tmp}/config{number}"
        write(f"{folder}/tokenizer.json", json.dumps({**base, "post_processor": processor}))
        for name, value in (("tokenizer_config", config), ("generation_config", generation)):
            if value is not None:
                write(f"{folder}/{name}.json", json.dumps(value))
        write(f"{folder}/tokenizer.bin", vocab.load(folder, None).tokenizer_bin())
        check(bos_and_eos(folder) == (bos, eos), f"BOS of case {number}: {bos_and_eos(folder)}, not {(bos, eos)}")
        for choice, wanted in (("none", -1), ("<end>", n + 1)):
            write(f"{folder}/tokenizer.bin", vocab.load(folder, None, choice).tokenizer_bin())
            check(bos_and_eos(folder) == (wanted, eos), f"--bos {choice}, case {number}: {bos_and_eos(folder)}")
    text = write(f"{tmp}/bos.txt", "some words\n" * 20)
    run_ok("bpe", "-o", f"{tmp}/bos", "--tokenizer", f"{tmp}/config1", "--bos", "<end>", text)
    check(bos_and_eos(f"{tmp}/bos") == (n + 1, [eot]), "data/bpe --bos")
    for name, value, wanted in (
        ("tokenizer_config", "[", "is not valid json"),
        ("tokenizer_config", "3", "is not a json object"),
        ("tokenizer_config", '{"add_bos_token": true, "bos_token": "<no>"}', "--bos <no>"),
        ("generation_config", '{"eos_token_id": 99999}', "eos_token_id [99999]"),
        ("generation_config", '{"eos_token_id": "a"}', "eos_token_id"),
        ("generation_config", json.dumps({"eos_token_id": [1] * 33}), "at most 32"),
    ):
        folder = f"{tmp}/bad_{name}"
        write(f"{folder}/tokenizer.json", json.dumps(base))
        write(f"{folder}/{name}.json", value)
        expect_exit(wanted, "bpe", "-o", f"{tmp}/not_made", "--tokenizer", folder, text)


def test_missing_bytes(tmp, tokenizer):
    """A byte-level BPE without some bytes encodes what it can; a missing byte is an error or the unknown token."""
    with open(tokenizer) as f:
        base = json.load(f)
    texts = ["some words", "1984 ki lu\n", "don't 漢字"]
    for name, byte, unknown, fuse in (("none", "z", None, False), ("each", "z", "Z", False), ("fused", "z", "Z", True)):
        j = json.loads(json.dumps(base))
        del j["model"]["vocab"][byte]
        j["model"].update(unk_token=unknown, fuse_unk=fuse)
        j["model"]["merges"] = [m for m in j["model"]["merges"] if byte not in "".join(m)]
        more = ["z", "azzz b zz", "zaz"] if unknown else []
        v = compare_encoders(tmp, f"missing_{name}", j, texts + more)
        if unknown:
            check(v.encode(b"a\xff", False).tolist() == encode_in_c(f"{tmp}/missing_{name}", b"a\xff"), "byte 255")
        else:
            try:
                v.encode(b"a z", False)
                check(False, "a missing byte is dropped")
            except SystemExit as e:
                check("no token for byte 0x7a" in str(e), f"a missing byte: {e}")
            r = subprocess.run([ENCODE, f"{tmp}/missing_none/tokenizer.bin"], input=b"\3\0\0\0a z", capture_output=True)
            check(r.returncode == 1 and b"no token for byte 0x7a" in r.stderr, f"a missing byte in C: {r.stderr}")


def test_special_tokens(tmp, tokenizer):
    """--special-tokens 1: special tokens in a text become their ids."""
    with open(tokenizer) as f:
        base = json.load(f)
    n = len(base["model"]["vocab"])
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    base["added_tokens"].append({"id": n, "content": "<|im_start|>", **fields})
    path, text = write(f"{tmp}/special.json", json.dumps(base)), b"<|im_start|>user\nsome words\n" * 30
    write(f"{tmp}/special.txt", text)
    for value, count in ((0, 0), (1, 30)):
        folder = f"{tmp}/special{value}"
        run_ok("bpe", "-o", folder, "--tokenizer", path, "--val", 0, "--special-tokens", value, f"{tmp}/special.txt")
        tokens = read_shards(folder, "text", "train")[0]
        check(tokens.count(n) == count, f"--special-tokens {value}: {tokens.count(n)} special tokens")
        check(decode_documents(tokens, *read_tokenizer(folder)[:2]) == [text], f"--special-tokens {value}: decoded")
        mode = ["special"] if value else []
        check(tokens[:-1] == encode_in_c(folder, text, *mode), f"--special-tokens {value}: C makes other tokens")


def test_wide(tmp, tokenizer):
    """A vocabulary of more than 65,536 tokens has 32-bit shards, which the trainer reads."""
    with open(tokenizer) as f:
        j = json.load(f)
    n = len(j["model"]["vocab"])
    j["model"]["vocab"].update({f"unused{i}": n + i for i in range(70000 - n - 1)})
    j["added_tokens"][0] = {**j["added_tokens"][0], "id": 69999, "content": "<eos>"}
    write(f"{tmp}/wide.json", json.dumps(j))
    text = b"Many words, few of them long.\n" * 300
    write(f"{tmp}/wide.txt", text)
    run_ok("bpe", "-o", f"{tmp}/w", "--name", "w", "--tokenizer", f"{tmp}/wide.json", f"{tmp}/wide.txt")
    tokens, widths = read_shards(f"{tmp}/w", "w", "train")
    pieces, eot, _ = read_tokenizer(f"{tmp}/w")
    check(widths == {4} and eot == 69999 and tokens[-1] == eot, f"32-bit shards: {widths}, end {eot}")
    check(
        decode_documents(tokens, pieces, eot) == [text[: val_start(text)]],
        "32-bit shards decode to another text",
    )
    r = subprocess.run(
        [
            CPU,
            "-e",
            "recall",
            "-layers",
            "1",
            "-channels",
            "16",
            "-t",
            "32",
            "-b",
            "1",
            "-x",
            "1",
            "-i",
            f"{tmp}/w/w_train_*.bin",
        ],
        capture_output=True,
        text=True,
    )
    check(
        r.returncode == 0 and "vocabulary 70000" in r.stdout,
        f"the trainer fails on 32-bit shards: {r.stderr}",
    )


def test_repeated_text(tmp):
    """dev/results/repeated_text.py counts planted copies: of training text, and within a held-out document."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    folder = os.path.join(tmp, "repeated")
    os.makedirs(folder)

    def write(name, tokens):
        header = np.zeros(256, "<i4")
        header[:3] = [20240520, 1, len(tokens)]
        with open(os.path.join(folder, name), "wb") as f:
            f.write(header.tobytes() + np.asarray(tokens, "<u2").tobytes())

    eot = 60000
    val, train = rng.integers(0, eot, 20000), rng.integers(0, eot, 50000)
    val[[0, 10000]] = eot
    val[2000:2018] = val[1000:1018]  # 1,000 tokens before: three passages of 16 tokens
    val[11000:11020] = val[9000:9020]  # in another document
    val[12000:12026] = np.resize(val[11990:12000], 26)  # 10 tokens before: 11 passages that overlap
    train[700:740] = val[3000:3040]
    train[30000:30016] = val[5000:5016]
    train[40000:40015] = val[6000:6015]
    write("x_val_000000.bin", val[:8000])
    write("x_val_000001.bin", val[8000:])
    write("x_train_000000.bin", train)
    with open(os.path.join(folder, "tokenizer.bin"), "wb") as f:
        f.write(np.array([0, 0, 65536, eot], "<i4").tobytes())
    program = os.path.join(ROOT, "dev/results/repeated_text.py")

    def measure(*arguments):
        return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)

    r = measure(folder)
    wanted = ["held-out tokens: 20,000, training tokens: 50,000"]
    wanted += ["in a passage of 32 tokens of the training text: 0.2%", "in a passage of 16 tokens of the training text: 0.3%"]
    shares = zip(("1 to 512", "513 to 6,144", "6,145 to 16,384", "16,385 to 65,536"), ("0.1", "0.0", "0.0", "0.0"))
    wanted += [f"end a passage of 16 tokens that stands {name} tokens before: {share}%" for name, share in shares]
    check((r.returncode, r.stderr, r.stdout.splitlines()) == (0, "", wanted), f"repeated text: {r.stdout} {r.stderr}")
    sys.path.insert(0, os.path.join(ROOT, "dev/results"))
    import repeated_text

    distances = repeated_text.copy_distances(val, eot, 16)
    check(sorted(distances.tolist()) == 11 * [10] + 3 * [1000], f"distances of copies: {distances}")
    covered = [repeated_text.share_covered(val, train, length) * 20000 for length in (32, 16)]
    check(covered == [40, 56], f"tokens in passages of the training text: {covered}")
    r = measure(os.path.join(tmp, "nothing"))
    check(r.returncode == 1 and "no such file; name the folder" in r.stderr and r.stderr.count("\n") == 1, r.stderr)


def test_tiktoken(tmp):
    """tiktoken vocabularies by name (of a plug-in, which needs no network) and as a file."""
    letters = [
        a.encode() + b.encode() for a in "abcdefghijklmnopqrstuvwxyz " for b in "abcdefghijklmnopqrstuvwxyz"
    ]
    write(
        f"{tmp}/plug/tiktoken_ext/small.py",
        f"""
def small():
    ranks = {{**{{bytes([b]): b for b in range(256)}}, **{{t: 256 + i for i, t in enumerate({letters!r})}}}}
    return {{"name": "small", "pat_str": r"\\p{{L}}+|\\s+|[^\\s\\p{{L}}]+", "mergeable_ranks": ranks,
            "special_tokens": {{"<|endoftext|>": 2000, "<|other|>": 2001}}}}
ENCODING_CONSTRUCTORS = {{"small": small}}
""",
    )
    env = {"PYTHONPATH": f"{tmp}/plug"}
    text = b"some words that are split otherwise 42\n" * 40
    write(f"{tmp}/tik.txt", text)
    out = run_ok("bpe", "-o", f"{tmp}/tik", "--tokenizer", "small", "--val", 0, f"{tmp}/tik.txt", env=env)
    check("note: this tokenizer splits text" in out, out)
    offline = {**dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9"), "TIKTOKEN_CACHE_DIR": f"{tmp}/none"}
    wanted = "cannot download tiktoken's vocabulary gpt2: Connection refused; connect to the network this once, or give --tokenizer"
    expect_error(wanted, "bpe", "-o", f"{tmp}/x", "--tokenizer", "gpt2", f"{tmp}/tik.txt", env=offline)
    pieces, eot, _ = read_tokenizer(f"{tmp}/tik")
    check(eot == 2000 and len(pieces) == 2002 and pieces[1999] == b"", f"end-of-text {eot} of {len(pieces)}")
    check(
        decode_documents(read_shards(f"{tmp}/tik", "text", "train")[0], pieces, eot) == [text],
        "tiktoken by name",
    )
    run_ok(
        "bpe", "-o", f"{tmp}/tik2", "--tokenizer", "small", "--eot", "<|other|>", f"{tmp}/tik.txt", env=env
    )
    check(read_tokenizer(f"{tmp}/tik2")[1] == 2001, "--eot with tiktoken")
    expect_error(
        "no end-of-text token <|no|>",
        "bpe",
        "-o",
        f"{tmp}/x",
        "--tokenizer",
        "small",
        "--eot",
        "<|no|>",
        f"{tmp}/tik.txt",
        env=env,
    )
    tokens = [bytes([b]) for b in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)][
        :50000
    ]
    lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)]
    write(f"{tmp}/gpt2.tiktoken", b"".join(lines))
    run_ok("bpe", "-o", f"{tmp}/tik3", "--tokenizer", f"{tmp}/gpt2.tiktoken", "--val", 0, f"{tmp}/tik.txt")
    pieces, eot, pretokenizer = read_tokenizer(f"{tmp}/tik3")
    tokens = read_shards(f"{tmp}/tik3", "text", "train")[0]
    check(
        (len(pieces), eot, pretokenizer) == (50257, 50256, 0),
        f"a tiktoken file: {len(pieces)}, {eot}, {pretokenizer}",
    )
    check(
        decode_documents(tokens, pieces, eot) == [text] and tokens[:-1] == encode_in_c(f"{tmp}/tik3", text),
        "a tiktoken file makes other tokens",
    )
    write(f"{tmp}/short.tiktoken", b"".join(lines[:300]))
    expect_error(
        "300 tokens", "bpe", "-o", f"{tmp}/x", "--tokenizer", f"{tmp}/short.tiktoken", f"{tmp}/tik.txt"
    )
    expect_error(
        "line 2",
        "bpe",
        "-o",
        f"{tmp}/x",
        "--tokenizer",
        write(f"{tmp}/bad.tiktoken", "YQ== 0\n!!\n"),
        f"{tmp}/tik.txt",
    )


def bad_input_tests(tmp, tokenizer):
    """Returns functions that each expect one error. They run in parallel."""
    with open(tokenizer) as f:
        base = json.load(f)

    def variant(name, **changes):
        return write(f"{tmp}/bad/{name}.json", json.dumps({**base, **changes}))

    def model(name, **changes):
        return variant(name, model={**base["model"], **changes})

    os.makedirs(f"{tmp}/emptyfolder")
    empty, text = write(f"{tmp}/empty.txt", ""), write(f"{tmp}/one.txt", "one line of text\n")
    write(f"{tmp}/emptyfiles/a.txt", "")
    plain = write(f"{tmp}/plain", "a file")
    write(f"{tmp}/stray/text_train_000000.bin", "not ours")
    write(f"{tmp}/broken/text.json", "{")
    missing = {k: v for k, v in base["model"]["vocab"].items() if k != "Ġ"}
    bpe = ["bpe", "-o", f"{tmp}/x", "--tokenizer"]
    cases = [
        (["bpe", "-o", f"{tmp}/x", text], "--tokenizer T"),
        (["bpe", "-o", f"{tmp}/x", "--tokenizer", tokenizer, "--train-vocab", 1000, text], "--tokenizer T"),
        (["bpe", "--train-vocab", 1000, text], "-o"),
        (["bpe", "-o", f"{tmp}/x", "--train-vocab", 1000], "FILE_OR_FOLDER"),
        (["bpe", "-o", f"{tmp}/x", "--train-vocab", 100, text], "from 258"),
        (["bpe", "-o", f"{tmp}/x", "--train-vocab", "12x", text], "'12x'"),
        (["bpe", "-o", f"{tmp}/x", "--train-vocab", 1000, "--eot", "e", text], "--eot"),
        ([*bpe, tokenizer, "--val", "0.95", text], "0.95"),
        ([*bpe, tokenizer, "--val", "nan", text], "nan"),
        ([*bpe, tokenizer, "--val-documents", "0", text], "--val-documents"),
        ([*bpe, tokenizer, "--val", "0.1", "--val-documents", "1", text], "not allowed with argument --val"),
        ([*bpe, tokenizer, "--min-tokens", "9", text], "--min-tokens 9: only for --val-documents"),
        ([*bpe, tokenizer, "--every", "4", text], "--every 4: only for --val-documents"),
        ([*bpe, tokenizer, "--val-documents", "1", text], "the input has 1 file, so none is left"),
        ([*bpe, tokenizer, "--val-documents", "99", text], "the input has 1 file, so none is left"),
        (
            ["bpe", "-o", f"{tmp}/x", "--train-vocab", 300, "--val-documents", 1, "--min-tokens", 9, text],
            "--min-tokens 9: not with --train-vocab",
        ),
        ([*bpe, tokenizer, "--shard", "1e3", text], "1024"),
        ([*bpe, tokenizer, "--shard", "3e9", text], "2147483647"),
        ([*bpe, tokenizer, "--name", "a/b", text], "a/b"),
        ([*bpe, tokenizer, "--nmae", "a", text], "--nmae"),
        ([*bpe, tokenizer, empty], "empty.txt is empty"),
        ([*bpe, tokenizer, f"{tmp}/emptyfolder"], "no text"),
        ([*bpe, tokenizer, f"{tmp}/emptyfiles"], "no text"),
        ([*bpe, tokenizer, f"{tmp}/nowhere"], "nowhere"),
        ([*bpe, tokenizer, "/dev/null"], "neither a file nor a folder"),
        (["bpe", "-o", f"{plain}/x", "--tokenizer", tokenizer, text], "plain"),
        (["bpe", "-o", f"{tmp}/stray", "--tokenizer", tokenizer, text], "exists without text.json"),
        (["bpe", "-o", f"{tmp}/broken", "--tokenizer", tokenizer, text], "broken"),
        (["bpe", "-o", f"{tmp}/t", "--name", "new", "--train-vocab", 300, text], "belongs to other data"),
        (["bpe", "-o", f"{tmp}/t", "--tokenizer", tokenizer, text], "made with another value of 'shard'"),
        ([*bpe, f"{tmp}/no.json", text], "no.json"),
        ([*bpe, "gpt17", text], "cl100k_base"),
        (["bpe", "-o", "/proc/b", "--tokenizer", tokenizer, text], "-o /proc/b: cannot write there"),
        ([*bpe, write(f"{tmp}/bad/e.json", ""), text], "is empty"),
        ([*bpe, write(f"{tmp}/bad/b.json", "{]"), text], "not a valid tokenizer.json"),
        ([*bpe, write(f"{tmp}/bad/k.json", "{}"), text], "not a valid tokenizer.json"),
        ([*bpe, variant("noend", added_tokens=[]), text], "no known end-of-text token"),
        ([*bpe, tokenizer, "--eot", "<|no|>", text], "--eot <|no|>"),
        ([*bpe, model("unigram", type="Unigram"), text], "Unigram"),
        ([*bpe, model("nobytes", vocab=missing, merges=[]), text], "no token for byte 0x20"),
        ([*bpe, model("merge", merges=[["q", "qqq"]]), text], "does not have"),
        ([*bpe, variant("words", pre_tokenizer={"type": "Whitespace"}), text], "neither a byte-level nor a"),
        ([*bpe, tokenizer, "--bos", "<|no|>", text], "--bos <|no|>"),
        ([*bpe, tokenizer, "--special-tokens", "2", text], "--special-tokens"),
        (["bpe", "-o", f"{tmp}/x", "--train-vocab", 1000, "--bos", "e", text], "--bos e: only for"),
        ([*bpe, write(f"{tmp}/bad/g.gguf", b"GGUF" + bytes(8)), text], "g.gguf is not a valid GGUF file"),
        (
            [*bpe, variant("prefix", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), text],
            "add_prefix_space",
        ),
        (["hub", "-o", f"{tmp}/x", text], "--tokenizer T"),
        (["hub", "-o", f"{tmp}/x", "--tokenizer", tokenizer, "--tokens", "0", text], "--tokens"),
        (["hub", "-o", f"{tmp}/x", "--tokenizer", tokenizer, text], "parquet"),
        (
            ["hub", "-o", f"{tmp}/x", "--tokenizer", tokenizer, f"{tmp}/emptyfolder"],
            "no parquet or json file",
        ),
    ]
    # the cases run at the same time, and a program locks its output folder
    for i, (command, _) in enumerate(cases):
        for j, argument in enumerate(command):
            if argument == f"{tmp}/x":
                command[j] = f"{tmp}/error{i}"
            elif argument == f"{tmp}/t":
                command[j] = f"{tmp}/t{i}"
                shutil.copytree(argument, command[j])
    return [lambda c=c, w=w: expect_error(w, *c) for c, w in cases]


# ---- hub ---------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files in `root` as the dataset org/name, with as much of the protocol as streaming needs."""

    protocol_version, root, commit = "HTTP/1.1", None, "c0ffee" + "0" * 34

    def log_message(self, *_):
        pass

    def respond(self, code, body, **headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        files = read_folder(self.root)
        if re.fullmatch(r"/api/datasets/org/name(/revision/\w+)?", path):
            answer = {
                "id": "org/name",
                "sha": self.commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": name} for name in files],
            }
            return self.respond(200, json.dumps(answer).encode(), Content_Type="application/json")
        tree = re.fullmatch(f"/api/datasets/org/name/tree/{self.commit}/?(.*)", path)
        if tree:
            folder = tree.group(1) + "/" if tree.group(1) else ""
            answer = {}
            for name in sorted(files):
                if name.startswith(folder):
                    child, below, _ = name[len(folder) :].partition("/")
                    answer[child] = {
                        "type": "directory" if below else "file",
                        "path": folder + child,
                        "oid": "0" * 40,
                        "size": 0 if below else len(files[name]),
                    }
            return self.respond(
                200 if answer else 404,
                json.dumps([*answer.values()]).encode(),
                Content_Type="application/json",
                **({} if answer else {"X-Error-Code": "EntryNotFound"}),
            )
        file = re.fullmatch(f"/datasets/org/name/resolve/{self.commit}/(.*)", path)
        if not file or file.group(1) not in files:
            return self.respond(404, b"{}", X_Error_Code="EntryNotFound")
        data = files[file.group(1)]
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": '"0"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if not wanted:
            return self.respond(200, data, **headers)
        first, last = int(wanted.group(1)), min(int(wanted.group(2) or len(data) - 1), len(data) - 1)
        return self.respond(
            206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers
        )

    do_HEAD = do_GET


def test_hub(tmp, tokenizer):
    """A dataset gives the same shards by name, as parquet and as json; kills and --tokens work."""
    import pyarrow
    import pyarrow.parquet

    rng = random.Random(SEED)
    text = sentences(rng, 600_000).decode()
    texts, at = [""], 0
    while at < len(text):
        n = rng.randint(1, 5000)
        texts.append(text[at : at + n])
        at += n
    texts *= 10
    half = len(texts) // 2
    os.makedirs(f"{tmp}/hub/data")
    for i, part in enumerate((texts[:half], texts[half:])):
        table = pyarrow.table({"id": list(range(len(part))), "text": part, "score": [0.5] * len(part)})
        pyarrow.parquet.write_table(table, f"{tmp}/hub/data/train-{i:05d}.parquet", row_group_size=100)
    lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts))
    write(f"{tmp}/json/all.jsonl.gz", gzip.compress(lines.encode(), 1))
    flags = ["--tokenizer", tokenizer, "--shard", 100_000, "--val", 0.05]
    out = run_ok("hub", "-o", f"{tmp}/h", *flags, f"{tmp}/hub")
    pieces, eot, _ = read_tokenizer(f"{tmp}/h")
    train = decode_documents(read_shards(f"{tmp}/h", "text", "train", 100_000)[0], pieces, eot)
    val = decode_documents(read_shards(f"{tmp}/h", "text", "val", 100_000)[0], pieces, eot)
    is_val = [int((i + 1) * 0.05) > int(i * 0.05) for i in range(len(texts))]
    check(train == [t.encode() for t, c in zip(texts, is_val) if t and not c], "other training documents")
    check(val == [t.encode() for t, c in zip(texts, is_val) if t and c], "other validation documents")
    check(f"{len(train) + len(val)} documents" in out, out)
    kill_and_resume(["hub", "-o", f"{tmp}/hk", *flags, f"{tmp}/hub"], f"{tmp}/hk", read_folder(f"{tmp}/h"))

    # by name, from a local hub
    Hub.root = f"{tmp}/hub"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": f"{tmp}/hf"}
    run_ok("hub", "-o", f"{tmp}/hn", *flags, "org/name", env=env)
    same = [
        name for name, data in read_folder(f"{tmp}/h").items() if read_folder(f"{tmp}/hn").get(name) == data
    ]
    check(len(same) == len(read_folder(f"{tmp}/h")) - 1, f"by name: only {same} are the same")
    with open(f"{tmp}/hn/text.json") as f:
        check(json.load(f)["settings"]["commit"] == Hub.commit, "the dataset's commit is not saved")
    expect_error("cannot read dataset other/name", "hub", "-o", f"{tmp}/x", *flags, "other/name", env=env)
    server.shutdown()
    for more in (["--column", "body", f"{tmp}/hub"], [f"{tmp}/nowhere"]):
        run("hub", "-o", f"{tmp}/none", *flags, *more)
        check(not os.path.exists(f"{tmp}/none"), f"hub {more}: leaves a folder after an error")

    # from json, up to a number of tokens
    run_ok("hub", "-o", f"{tmp}/hj", *flags, "--tokens", 50_000, f"{tmp}/json")
    tokens = read_shards(f"{tmp}/hj", "text", "train")[0]
    first_texts = decode_documents(tokens, pieces, eot)
    check(
        first_texts == train[: len(first_texts)]
        and len(tokens) - len(encode_in_c(f"{tmp}/h", first_texts[-1])) - 1 < 50_000 <= len(tokens),
        f"--tokens: {len(first_texts)} documents, {len(tokens)} tokens",
    )


def bad_hub_tests(tmp, tokenizer):
    flags = ["hub", "-o", f"{tmp}/x", "--tokenizer", tokenizer]
    null = write(f"{tmp}/null/a.jsonl", '{"text": "fine", "n": 1}\n{"text": null, "n": 2}\n')
    broken = write(f"{tmp}/broken/a.parquet", "PAR1 and no more")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    return [
        lambda: expect_error(
            "--column body: the dataset has no such column; it has text, n", *flags, "--column", "body", null
        ),
        lambda: expect_error("document 1", *flags, null),
        lambda: expect_error("a.parquet", *flags, broken),
        *[
            lambda path=path: expect_error(f"{path}: no such file or folder; check the path", *flags, path)
            for path in (f"{tmp}/nowhere/a.jsonl", "nowhere.jsonl", "./nowhere", "a/b/c")
        ],
        lambda: expect_error("cannot read dataset some/name", *flags, "some/name", env=nowhere),
    ]


def main():
    global forks
    needed = ("numpy", "tokenizers", "tiktoken", "datasets", "pyarrow")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    forks = Forks(*(name for name in needed[:3] if name not in missing))
    tmp = tempfile.mkdtemp(prefix="test_bpe.")
    try:
        test_get(tmp)
        test_corpus(tmp)
        if missing:
            skip(
                f"data/bpe and data/hub need the Python packages {', '.join(missing)}: "
                f"pip install -r requirements.txt"
            )
        else:
            shards = test_text(tmp, random.Random(SEED))
            tokenizer = f"{tmp}/t/tokenizer.json"
            test_malformed(tmp, tokenizer, shards)
            tests = [
                lambda: test_kills(tmp, tokenizer),
                lambda: test_hub(tmp, tokenizer),
                lambda: test_trainer(tmp),
                lambda: test_val_documents(tmp, tokenizer),
                lambda: test_disk(tmp, tokenizer),
                lambda: test_vocabularies(tmp, tokenizer),
                lambda: test_sentencepiece(tmp),
                lambda: test_gguf(tmp, tokenizer),
                lambda: test_bos_and_eos(tmp, tokenizer),
                lambda: test_missing_bytes(tmp, tokenizer),
                lambda: test_special_tokens(tmp, tokenizer),
                lambda: test_wide(tmp, tokenizer),
                lambda: test_tiktoken(tmp),
                lambda: test_repeated_text(tmp),
                *bad_hub_tests(tmp, tokenizer),
                *bad_input_tests(tmp, tokenizer),
                lambda: test_streams_and_lock(tmp, tokenizer),
            ]
            with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count())) as pool:
                for future in [pool.submit(test) for test in tests]:
                    try:
                        future.result()
                    except Exception as e:
                        check(False, f"{type(e).__name__}: {e}\n{traceback.format_exc()}")
            check(read_folder(f"{tmp}/t") == shards, "a failed run changes the files of another run")
    finally:
        shutil.rmtree(tmp)
    finish()


if __name__ == "__main__":
    main()
