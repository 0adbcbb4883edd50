"""Shards: from documents to files of tokens, by all cores, in runs that can be broken off at any moment and
go on to the same bits. A folder holds, for one NAME, NAME_train_*.bin, NAME_val_*.bin, and NAME.json, which
says what they were made of and how far the work is; and tokenizer.bin. Formats: data/README.md."""

import argparse
import collections
import concurrent.futures.process
import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import threading
import time

HEADER_BYTES = 1024
FORMATS = {2: (20240520, 1), 4: (20240801, 7)}  # bytes a token: magic, version
SAVE_EVERY = 0.5  # seconds of work that a kill can lose
MAX_SHARD = 2**31 - 1


def die(message):
    """One line on stderr, exit code 1; also from within a worker, whose main process prints it."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """An exception's message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def write_file(path, content):
    """Puts the file in its place in one step, on the disk."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.rename(path + ".tmp", path)
    sync_folder(os.path.dirname(path) or ".")


@contextlib.contextmanager
def writing(folder):
    """Says, where the disk is full, which file is the last straw."""
    try:
        yield
    except OSError as e:
        die(
            f"cannot write {e.filename or folder}: {e.strerror}; once that is mended the same command goes on"
        )


def sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line and exit code 1."""

    def error(self, message):
        die(f"{message}; {os.path.basename(self.prog)} -h lists the flags")


def number(low, high, kind=int):
    """An argparse type: a number from low to high; 1e9 is a whole number too."""

    def parse(text):
        try:
            value = float(text)
            if kind is int:
                value = int(value) if value.is_integer() else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"a {what} from {low} to {high} is needed, not {text!r}")
        return value

    return parse


def common_flags(parser, val):
    parser.add_argument(
        "-o", metavar="DIR", required=True, dest="folder", help="the folder for shards and tokenizer.bin"
    )
    parser.add_argument("--name", default="text", help="shards are DIR/NAME_train_000000.bin, ... (text)")
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        help="a tokenizer.json, a tiktoken file, or tiktoken's name for a "
        "vocabulary (gpt2, cl100k_base, ...)",
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="the tokenizer's end-of-text token, where it is not a usual one"
    )
    parser.add_argument(
        "--val",
        metavar="SHARE",
        type=number(0, 0.9, float),
        default=val,
        help=f"held out for validation, 0 to 0.9 ({val})",
    )
    parser.add_argument(
        "--shard",
        metavar="N",
        type=number(1024, MAX_SHARD),
        default=10**8,
        help="most tokens in a shard (100000000)",
    )


def check_name(name):
    if not name or "/" in name or any(c in name for c in "*?[]"):
        die(f"--name takes a name without / * ? [ ], not {name!r}")


# ---- the files ---------------------------------------------------------------------------------------------


class Series:
    """The training or the validation shards. A shard is NAME.tmp until it is full, on the disk, and counted
    in the saved state; only then it gets its name."""

    def __init__(self, folder, name, part, token_type, shard_tokens, tokens, done):
        self.prefix = os.path.join(folder, f"{name}_{part}_")
        self.width, self.shard_tokens, self.tokens = token_type.itemsize, shard_tokens, tokens
        self.file = None
        if tokens % shard_tokens and not done:
            path, size = (
                self.path(tokens // shard_tokens) + ".tmp",
                HEADER_BYTES + tokens % shard_tokens * self.width,
            )
            if not os.path.exists(path) or os.path.getsize(path) < size:
                die(
                    f"{path}, the unfinished shard of an earlier run, is missing or too short: remove "
                    f"{name}.json and the shards beside it, and start again"
                )
            self.file = open(path, "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def path(self, shard):
        return f"{self.prefix}{shard:06d}.bin"

    def add(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.path(self.tokens // self.shard_tokens) + ".tmp", "wb")
                self.file.write(bytes(HEADER_BYTES))
            some = tokens[: self.shard_tokens - self.tokens % self.shard_tokens]
            self.file.write(some.tobytes())
            self.tokens += len(some)
            tokens = tokens[len(some) :]
            if self.tokens % self.shard_tokens == 0:
                self.complete(self.shard_tokens)

    def sync(self):
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def complete(self, count):
        """Writes the header of the open shard."""
        self.file.seek(0)
        header = [*FORMATS[self.width], count]
        self.file.write(b"".join(v.to_bytes(4, "little") for v in header))
        self.sync()
        self.file.close()
        self.file = None

    def finish(self):
        if self.file is not None:
            self.complete(self.tokens % self.shard_tokens)

    def shards(self, done):
        """How many shards are complete."""
        return -(-self.tokens // self.shard_tokens) if done else self.tokens // self.shard_tokens

    def settle(self, done):
        """Gives complete shards their names; the saved state counts them."""
        waiting = []
        for shard in range(self.shards(done) - 1, -1, -1):
            path = self.path(shard)
            if os.path.exists(path + ".tmp"):
                waiting.append(path)
            elif os.path.exists(path):
                break  # and so have all before it
            else:
                die(f"{path} is missing: remove the .json file beside it to make the shards again")
        for path in reversed(waiting):
            os.rename(path + ".tmp", path)
        if waiting:
            sync_folder(os.path.dirname(self.prefix) or ".")


class Output:
    """What one run makes in a folder, and the state in NAME.json that a later run goes on from."""

    def __init__(self, folder, name, settings):
        check_name(name)
        self.folder, self.name, self.settings = folder, name, settings
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            die(f"cannot make folder {folder}: a file of that name is in the way")
        self.lock = os.open(folder, os.O_RDONLY)  # held until the process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die(f"another run is making shards in {folder}: wait for it, or choose another folder with -o")
        self.state_path = os.path.join(folder, name + ".json")
        self.state = {
            "settings": settings,
            "done": False,
            "position": None,
            "train": 0,
            "val": 0,
            "bytes": 0,
            "documents": 0,
        }
        self.resumed = os.path.exists(self.state_path)
        if self.resumed:
            self._load()
        else:
            in_the_way = [
                f
                for f in sorted(os.listdir(folder))
                if f.startswith((f"{name}_train_", f"{name}_val_")) and f.endswith(".bin")
            ]
            if in_the_way:
                die(
                    f"{os.path.join(folder, in_the_way[0])} is in the way, and there is no {name}.json that "
                    f"says what it was made of: remove it, or choose another --name or -o"
                )

    def _load(self):
        try:
            with open(self.state_path) as f:
                state = json.load(f)
            old = state["settings"]
            assert state.keys() == self.state.keys() and isinstance(old, dict)
        except (ValueError, KeyError, TypeError, AssertionError):
            die(f"{self.state_path} is broken: remove it and the shards beside it, and start again")
        for key in [*self.settings, *old]:
            if self.settings.get(key) != old.get(key):
                die(
                    f"{self.folder} holds shards '{self.name}' made with other {key} "
                    f"({short(old.get(key))}; now {short(self.settings.get(key))}): choose another -o, or "
                    f"remove {self.state_path} and its shards"
                )
        self.state = state

    def tokenizer(self, vocabulary):
        """Writes tokenizer.bin; a folder has one."""
        path, content = os.path.join(self.folder, "tokenizer.bin"), vocabulary.tokenizer_bin()
        if os.path.exists(path):
            with open(path, "rb") as f:
                if f.read() == content:
                    return
            die(f"{path} belongs to other data: choose another folder with -o, or remove it")
        write_file(path, content)

    def open(self, token_type):
        self.train, self.val = (
            Series(
                self.folder,
                self.name,
                part,
                token_type,
                self.settings["shard"],
                self.state[part],
                self.state["done"],
            )
            for part in ("train", "val")
        )
        self.settle()

    def settle(self):
        self.train.settle(self.state["done"])
        self.val.settle(self.state["done"])

    def save(self, position, done=False):
        with writing(self.folder):
            if done:
                self.train.finish()
                self.val.finish()
            self.train.sync()
            self.val.sync()
            self.state.update(position=position, done=done, train=self.train.tokens, val=self.val.tokens)
            write_file(self.state_path, (json.dumps(self.state, indent=1) + "\n").encode())
            self.settle()

    def add(self, part, tokens):
        with writing(self.folder):
            (self.train if part == "train" else self.val).add(tokens)


# ---- the work ----------------------------------------------------------------------------------------------

_vocabulary = None  # in a worker


def _start_worker(vocabulary):
    global _vocabulary
    _vocabulary = vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(items):
    return [_vocabulary.encode(data, ends) for _, data, ends in items]


class Stop:
    """SIGINT and SIGTERM ask for a stop after the batch in hand; a second one does not wait for it."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Progress:
    """A line on stdout: rewritten on a terminal, else anew every 10 seconds."""

    def __init__(self):
        self.start = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def show(self, text):
        now = time.monotonic()
        if now - self.last >= (0.2 if self.terminal else 10):
            self.last = now
            print(f"\r{text}\033[K" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def run(output, vocabulary, batches, total_bytes=None, most_tokens=None):
    """Tokenizes batches and writes their tokens. `batches(position)` is an iterator, from a saved position on
    (None: from the start), over (items, position after them), an item being (part, bytes, whether its
    document ends with it). Ends after the document with which training tokens reach most_tokens."""
    state = output.state
    output.open(vocabulary.token_type)
    if state["done"]:
        print(f"nothing to do: {summary(output)}")
        return
    if state["position"] is not None:
        print(f"going on after {state['bytes'] / 1e6:.1f} MB and {state['train'] + state['val']} tokens")
    workers = len(os.sched_getaffinity(0))
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (vocabulary,)
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the workers, which the first task starts
    pool.submit(_encode, [])
    stop = Stop()
    progress, saved = Progress(), time.monotonic()
    bytes_before, position = state["bytes"], state["position"]
    source, waiting, full = batches(position), collections.deque(), False
    try:
        while not full and not stop.asked:
            while len(waiting) < 2 * workers + 2:
                batch = next(source, None)
                if batch is None:
                    break
                waiting.append((pool.submit(_encode, batch[0]), *batch))
            if not waiting:
                break
            future, items, after = waiting.popleft()
            for (part, data, ends), tokens in zip(items, future.result()):
                output.add(part, tokens)
                state["bytes"] += len(data)
                state["documents"] += ends
                full = ends and most_tokens is not None and output.train.tokens >= most_tokens
                if full:
                    break
            position = after
            now = time.monotonic()
            progress.show(
                f"{state['bytes'] / 1e6:.1f} MB"
                + (f" of {total_bytes / 1e6:.1f}" if total_bytes else "")
                + f", {output.train.tokens + output.val.tokens} tokens, "
                f"{(state['bytes'] - bytes_before) / 1e6 / (now - progress.start):.1f} MB/s"
            )
            if now - saved >= SAVE_EVERY and not full:
                output.save(position)
                saved = now
    except concurrent.futures.process.BrokenProcessPool:
        if not stop.asked:
            die("a worker process died (was memory short?); the same command goes on from the last save")
    finally:
        progress.clear()
        for future, *_ in waiting:
            future.cancel()
        pool.shutdown()
    if stop.asked:
        output.save(position)
        die("interrupted; the same command goes on from here")
    if output.train.tokens + output.val.tokens == 0:
        die("there is no text in the input")
    output.save(position, done=True)
    seconds = time.monotonic() - progress.start
    megabytes = (state["bytes"] - bytes_before) / 1e6
    print(
        f"{summary(output)}; {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s on "
        f"{workers} cores"
    )


def summary(output):
    state = output.state
    return (
        f"{output.folder}: {state['documents']} documents, {state['train']} training tokens in "
        f"{output.train.shards(True)} shards, {state['val']} validation tokens in {output.val.shards(True)}, "
        f"{state['bytes'] / (state['train'] + state['val']):.2f} bytes a token"
    )


def short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def call(main):
    """Runs a program's main(); whatever its surroundings do to it ends in one line."""

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted; the same command goes on from the last saved place")
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        die(f"{where}{e.strerror or e}")
    except ImportError as e:
        die(f"the Python package {e.name} is missing: pip install -r requirements.txt")
    except MemoryError:
        die("out of memory")
