"""Tokenizes documents on all cores and writes shards. A run can be interrupted at any time; the resumed run
produces the same bits. For one NAME, a folder holds NAME_train_*.bin, NAME_val_*.bin and NAME.json, which
records the input and the progress. All names of a folder share tokenizer.bin. Formats: data/README.md."""

import argparse
import collections
import concurrent.futures.process
import contextlib
import errno
import fcntl
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request

HEADER_BYTES = 1024
FORMATS = {2: (20240520, 1), 4: (20240801, 7)}  # bytes per token: (magic, version)
WORKER_BYTES = 1 << 19  # of text for each further worker: one starts about as fast as a core tokenizes this
SAVE_INTERVAL = 0.5  # seconds; a kill loses at most this much work
MAX_SHARD_TOKENS = 2**31 - 1
MAX_INPUT_BYTES = 1 << 28  # of a file that is read as a whole
MAX_DOWNLOAD_BYTES = 1 << 26  # five times the longest file


def die(message):
    """Ends the program with one line on stderr and exit code 1. In a worker, the main process ends."""
    raise SystemExit("error: " + message.replace("\n", "\\n"))


def one_line(error):
    """Returns an exception's type and message as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def plural(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def open_input(path):
    """Opens a regular file, or a link to one, for reading. Dies for a folder, a FIFO, a device or a socket,
    because opening these can block or have side effects."""
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        # O_NONBLOCK: does not block if a FIFO has replaced the file since stat
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode):
            return open(fd, "rb")
    die(f"cannot read {path}: it is not a file but {file_type_name(mode)}; check the path")


def file_type_name(mode):
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def read_input(path):
    """Returns the bytes of a file. Dies if it is not a regular file, or too long to be read as a whole."""
    with open_input(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_INPUT_BYTES:
            die(f"{path} has {size} bytes, at most {MAX_INPUT_BYTES} expected; check the path")
        return f.read()


def download(url):
    """Returns the content of a URL; dies if it is longer than MAX_DOWNLOAD_BYTES, or cannot be read."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as e:  # urllib's errors are OSErrors too
        reason = e if isinstance(e, urllib.error.HTTPError) else getattr(e, "reason", e)
        die(f"cannot download {url}: {reason}; check the network, or name a mirror with --from")
    if len(data) > MAX_DOWNLOAD_BYTES:
        die(
            f"{url}: more than {MAX_DOWNLOAD_BYTES} bytes, not the expected text; not saved; try another "
            f"mirror with --from"
        )
    return data


def create_file(path):
    """Opens a new file for writing. Removes an older file or link of that name, so that a link is never
    followed."""
    if os.path.lexists(path):
        os.unlink(path)
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def write_file(path, content):
    """Writes a file atomically and syncs it to disk."""
    try:
        with create_file(path + ".tmp") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.rename(path + ".tmp", path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise OSError(e.errno, os.strerror(e.errno), path) from e
    sync_folder(os.path.dirname(path) or ".")


@contextlib.contextmanager
def report_write_errors(folder):
    """Turns a failed write (a full disk, say) into one line that names the file."""
    try:
        yield
    except OSError as e:
        die(f"cannot write {e.filename or folder}: {e.strerror}; fix this and run the same command to resume")


@contextlib.contextmanager
def report_output_errors(path):
    """Turns an output that cannot be created into one line that names -o."""
    try:
        yield
    except OSError as e:
        die(f"-o {path}: cannot write there: {e.strerror}; check the disk, or choose another folder")


def sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and exit code 1."""

    def error(self, message):
        die(f"{message}; {os.path.basename(self.prog)} -h lists the flags")

    def _print_message(self, message, file=None):
        (file or sys.stderr).write(message)  # argparse's own function ignores failed writes


def number_type(low, high, kind=int):
    """Returns an argparse type for numbers from low to high. kind=int takes whole numbers, also as 1e9."""

    def parse(text):
        try:
            value = float(text)
            if kind is int:
                value = int(value) if value.is_integer() else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {what} from {low} to {high}, not {text!r}")
        return value

    return parse


def add_tokenizer_flags(parser):
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        help="a tokenizer.json, a GGUF file, a tiktoken file, or the name of a tiktoken vocabulary (gpt2, ...)",
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="the tokenizer's end-of-text token, if it is not a usual one"
    )
    parser.add_argument(
        "--bos", metavar="TOKEN", help="the token before a prompt, or none (what the tokenizer says)"
    )


def add_common_flags(parser, val):
    """Adds the flags that bpe and hub share; val is the default of --val. Returns the group of --val, for flags
    that exclude it."""
    parser.add_argument(
        "-o", metavar="DIR", required=True, dest="folder", help="folder for the shards and tokenizer.bin"
    )
    parser.add_argument("--name", default="text", help="shards are DIR/NAME_train_000000.bin, ... (text)")
    add_tokenizer_flags(parser)
    parser.add_argument(
        "--special-tokens",
        metavar="0|1",
        type=number_type(0, 1),
        default=0,
        help="1: special tokens in the text become their ids instead of ordinary text (0)",
    )
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val",
        metavar="X",
        type=number_type(0, 0.9, float),
        default=val,
        help=f"fraction held out for validation, 0 to 0.9 ({val})",
    )
    parser.add_argument(
        "--shard",
        metavar="N",
        type=number_type(1024, MAX_SHARD_TOKENS),
        default=10**8,
        help="maximum number of tokens in a shard (100000000)",
    )
    return held_out


def check_name(name):
    if not name or "/" in name or any(c in name for c in "*?[]"):
        die(f"--name {name}: must not be empty or contain / * ? [ ]")


# ---- the files ---------------------------------------------------------------------------------------------


class ShardSet:
    """The training or the validation shards. A shard has the suffix .tmp until it is full, synced to disk and
    counted in the saved state.

    Args:
        part: "train" or "val".
        dtype: NumPy type of a token.
        max_shard_tokens: tokens of a full shard.
        tokens: tokens that the saved state counts; the open shard is cut to them.
        done: whether the saved state is that of a finished run.
    """

    def __init__(self, folder, name, part, dtype, max_shard_tokens, tokens, done):
        self.prefix = os.path.join(folder, f"{name}_{part}_")
        self.token_bytes, self.max_shard_tokens, self.tokens = dtype.itemsize, max_shard_tokens, tokens
        self.file = None
        if tokens % max_shard_tokens and not done:
            path, size = (
                self.path(tokens // max_shard_tokens) + ".tmp",
                HEADER_BYTES + tokens % max_shard_tokens * self.token_bytes,
            )
            if not os.path.isfile(path) or os.path.islink(path) or os.path.getsize(path) < size:
                die(
                    f"{path}: unfinished shard of an earlier run is missing or too short; remove {name}.json "
                    f"and its shards, then start again"
                )
            self.file = open(path, "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def path(self, shard):
        return f"{self.prefix}{shard:06d}.bin"

    def add(self, tokens):
        """Appends tokens, an array. Starts a new shard when one is full."""
        while len(tokens):
            if self.file is None:
                self.file = create_file(self.path(self.tokens // self.max_shard_tokens) + ".tmp")
                self.file.write(bytes(HEADER_BYTES))
            chunk = tokens[: self.max_shard_tokens - self.tokens % self.max_shard_tokens]
            self.file.write(chunk.tobytes())
            self.tokens += len(chunk)
            tokens = tokens[len(chunk) :]
            if self.tokens % self.max_shard_tokens == 0:
                self.close_shard(self.max_shard_tokens)

    def sync(self):
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close_shard(self, count):
        """Writes the header of the open shard and closes it, still with the suffix .tmp."""
        self.file.seek(0)
        header = [*FORMATS[self.token_bytes], count]
        self.file.write(b"".join(v.to_bytes(4, "little") for v in header))
        self.sync()
        self.file.close()
        self.file = None

    def finish(self):
        if self.file is not None:
            self.close_shard(self.tokens % self.max_shard_tokens)

    def num_complete(self, done):
        """Returns the number of complete shards; in a finished run the last one may be short."""
        return -(-self.tokens // self.max_shard_tokens) if done else self.tokens // self.max_shard_tokens

    def rename_complete(self, done):
        """Removes the suffix .tmp of complete shards. The saved state must count them already."""
        unnamed = []
        for shard in range(self.num_complete(done) - 1, -1, -1):
            path = self.path(shard)
            if os.path.exists(path + ".tmp"):
                unnamed.append(path)
            elif os.path.exists(path):
                break  # all earlier shards have their names too
            else:
                die(f"{path} is missing; remove the .json file beside it to make the shards again")
        for path in reversed(unnamed):
            os.rename(path + ".tmp", path)
        if unnamed:
            sync_folder(os.path.dirname(self.prefix) or ".")


def lock_output_folder(folder):
    """Locks a folder until the process ends; dies if another process holds the lock. llmc/utils.h
    describes the lock. Returns the descriptor, which must stay open."""
    path = os.path.join(folder, ".lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.05)  # the owner may have the lock, but not yet have written its pid
        owner = os.pread(fd, 320, 0).decode("ascii", "replace").strip()
        owner = re.fullmatch(r"process \d+ on host [\w.-]+", owner)
        die(
            f"-o {folder}: {owner[0] if owner else 'another process'} writes to this folder; wait until it "
            f"ends, or choose another folder"
        )
    except OSError as e:
        print(
            f"warning: cannot lock {path}: {e.strerror}; make sure that no other program writes to {folder}",
            file=sys.stderr,
        )
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    except OSError:  # for the message of the other process only, so a full disk is no error
        pass
    return fd


class Output:
    """The shards and the tokenizer that a run writes to a folder, and the state in NAME.json that a later run
    resumes from.

    Args:
        settings: dict of whatever determines the shards. A later run must have the same settings.
        is_position: function that says whether a position, which is not None, is valid for this input.
    """

    def __init__(self, folder, name, settings, is_position):
        check_name(name)
        self.folder, self.name, self.settings = folder, name, settings
        self.is_position = is_position
        with report_output_errors(folder):
            try:
                os.makedirs(folder, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                die(f"-o {folder}: cannot create the folder, a file has this name or that of a parent folder")
            self.lock = lock_output_folder(folder)  # held until the process ends
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
            existing = [
                f
                for f in sorted(os.listdir(folder))
                if f.startswith((f"{name}_train_", f"{name}_val_")) and f.endswith(".bin")
            ]
            if existing:
                die(
                    f"{os.path.join(folder, existing[0])} exists without {name}.json, which would record its "
                    f"input; remove the shard, or choose another --name or -o"
                )

    def _load(self):
        try:
            state = json.loads(read_input(self.state_path))
        except (ValueError, RecursionError):
            state = None
        if not self._is_state(state):
            self.die_broken()
        old = state["settings"]
        for key in [*self.settings, *old]:
            if self.settings.get(key) != old.get(key):
                die(
                    f"{self.folder}: shards '{self.name}' were made with another value of '{key}' "
                    f"({shorten(old.get(key))}, now {shorten(self.settings.get(key))}); choose another -o, "
                    f"or remove {self.state_path} and its shards"
                )
        self.state = state
        if state["position"] is not None and not self.is_position(state["position"]):
            self.die_broken()

    def die_broken(self):
        die(f"{self.state_path} is broken; remove it and its shards, then start again")

    def _is_state(self, state):
        """Returns whether a state that was read from a file has the right fields and types."""
        counts = ("train", "val", "bytes", "documents")
        return (
            isinstance(state, dict)
            and state.keys() == self.state.keys()
            and isinstance(state["settings"], dict)
            and isinstance(state["done"], bool)
            and all(type(state[key]) is int and 0 <= state[key] < 1 << 62 for key in counts)
            and (not state["done"] or state["train"] + state["val"] > 0)
        )

    def write_tokenizer(self, vocabulary):
        """Writes tokenizer.bin. Dies if the folder has another one already."""
        path, content = os.path.join(self.folder, "tokenizer.bin"), vocabulary.tokenizer_bin()
        if os.path.exists(path):
            if read_input(path) == content:
                return
            die(f"{path} belongs to other data; choose another folder with -o, or remove the file")
        write_file(path, content)

    def open_shards(self, dtype):
        """Opens both shard sets where the saved state ends."""
        self.train, self.val = (
            ShardSet(
                self.folder,
                self.name,
                part,
                dtype,
                self.settings["shard"],
                self.state[part],
                self.state["done"],
            )
            for part in ("train", "val")
        )
        self.rename_complete()

    def rename_complete(self):
        self.train.rename_complete(self.state["done"])
        self.val.rename_complete(self.state["done"])

    def save(self, position, done=False):
        """Syncs the shards, then saves the state: all input before `position` is tokenized."""
        with report_write_errors(self.folder):
            if done:
                self.train.finish()
                self.val.finish()
            self.train.sync()
            self.val.sync()
            self.state.update(position=position, done=done, train=self.train.tokens, val=self.val.tokens)
            write_file(self.state_path, (json.dumps(self.state, indent=1) + "\n").encode())
            self.rename_complete()

    def add(self, part, tokens):
        with report_write_errors(self.folder):
            (self.train if part == "train" else self.val).add(tokens)


# ---- workers -----------------------------------------------------------------------------------------------

_vocabulary = None  # of a worker process


def _start_worker(vocabulary):
    global _vocabulary
    _vocabulary = vocabulary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode(items):
    return [_vocabulary.encode(data, ends) for _, data, ends in items]


class StopRequest:
    """The first SIGINT or SIGTERM requests a stop after the current batch; the second one stops at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Progress:
    """A progress line on stdout. A terminal rewrites it; elsewhere a new line comes every 10 seconds."""

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


def tokenize(output, vocabulary, batches, total_bytes=None, max_train_tokens=None):
    """Tokenizes batches, a long text on all cores, and writes their tokens in order.

    Args:
        output: an Output.
        vocabulary: a vocab.Vocabulary.
        batches: a function. batches(position) returns an iterator over (items, position after the items) that
            starts at a saved position, or at the beginning for None. An item is (part, bytes, ends), where
            part is "train" or "val" and `ends` says whether its document ends with it.
        total_bytes: bytes of the whole input, for the progress line and the number of workers; None if unknown.
        max_train_tokens: stops after the document with which the training tokens reach this number.
    """
    state = output.state
    output.open_shards(vocabulary.dtype)
    if state["done"]:
        print(f"nothing to do: {summary(output)}")
        return
    if state["position"] is not None:
        print(f"resuming after {state['bytes'] / 1e6:.1f} MB and {state['train'] + state['val']} tokens")
    workers = len(os.sched_getaffinity(0))
    if total_bytes is not None:
        workers = min(workers, 1 + total_bytes // WORKER_BYTES)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (vocabulary,)
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first task starts the workers, which inherit this
    pool.submit(_encode, [])
    stop = StopRequest()
    progress, saved = Progress(), time.monotonic()
    bytes_before, position = state["bytes"], state["position"]
    source, pending, full = batches(position), collections.deque(), False
    try:
        while not full and not stop.requested:
            while len(pending) < 2 * workers + 2:
                batch = next(source, None)
                if batch is None:
                    break
                pending.append((pool.submit(_encode, batch[0]), *batch))
            if not pending:
                break
            future, items, end_position = pending.popleft()
            for (part, data, ends), tokens in zip(items, future.result()):
                output.add(part, tokens)
                state["bytes"] += len(data)
                state["documents"] += ends
                full = ends and max_train_tokens is not None and output.train.tokens >= max_train_tokens
                if full:
                    break
            position = end_position
            now = time.monotonic()
            progress.show(
                f"{state['bytes'] / 1e6:.1f} MB"
                + (f" of {total_bytes / 1e6:.1f}" if total_bytes else "")
                + f", {output.train.tokens + output.val.tokens} tokens, "
                f"{(state['bytes'] - bytes_before) / 1e6 / (now - progress.start):.1f} MB/s"
            )
            if now - saved >= SAVE_INTERVAL and not full:
                output.save(position)
                saved = now
    except concurrent.futures.process.BrokenProcessPool:
        if not stop.requested:
            die("a worker process died (out of memory?); run the same command to resume from the last save")
    finally:
        progress.clear()
        for future, *_ in pending:
            future.cancel()
        pool.shutdown()
    if stop.requested:
        output.save(position)
        die("interrupted; run the same command to resume")
    if output.train.tokens + output.val.tokens == 0:
        die("the input has no text; name an input with text")
    output.save(position, done=True)
    seconds = time.monotonic() - progress.start
    megabytes = (state["bytes"] - bytes_before) / 1e6
    print(
        f"{summary(output)}; {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s on "
        f"{plural(workers, 'core')}"
    )


def summary(output):
    """Returns one line about a finished run."""
    state = output.state
    return (
        f"{output.folder}: {plural(state['documents'], 'document')}, {state['train']} training tokens in "
        f"{plural(output.train.num_complete(True), 'shard')}, {state['val']} validation tokens in "
        f"{output.val.num_complete(True)}, "
        f"{state['bytes'] / (state['train'] + state['val']):.2f} bytes per token"
        + (
            ""
            if state["val"]
            else "; nothing is held out for validation: use a larger --val or more documents"
        )
    )


def shorten(value):
    """Returns a setting's value as JSON of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def run_main(main, interrupted="run the same command to resume from the last save"):
    """Runs a program's main(). Signals, system errors and missing packages end it with one line on stderr.

    Args:
        interrupted: what the line says when a signal ends it.
    """

    def stop(*_):
        raise KeyboardInterrupt

    if sys.stdout is None:
        die("stdout is closed; redirect it to a file or to /dev/null")
    for fd in (0, 2):  # a file that is opened later must not take the number of a closed stream
        try:
            os.fstat(fd)
        except OSError:
            null = os.open("/dev/null", os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop)
    try:
        _run(main, interrupted)
    finally:
        try:
            sys.stdout.flush()
        except OSError as e:
            os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # for the interpreter's own flush
            die(f"cannot write to stdout: {e.strerror}; check the free disk space, or what reads it")


def _run(main, interrupted):
    try:
        main()
    except KeyboardInterrupt:
        die(f"interrupted; {interrupted}")
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        die(f"{where}{e.strerror or e}" + "; check the free disk space" * full)
    except ImportError as e:
        die(f"Python package {e.name} is missing; run pip install -r requirements.txt")
    except MemoryError:
        die("out of memory; free host memory, or use smaller inputs")
    except SystemExit:
        raise
    except BaseException as e:  # also panics of the tokenizers' libraries
        frames = traceback.extract_tb(e.__traceback__)
        where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown"
        die(f"{one_line(e)} ({where}); this is a defect of the program: please report it")
