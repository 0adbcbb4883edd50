"""Writes evaluation files for the trainer: multiple choice and needles. llmc/eval_file.h has the formats.
hellaswag, mc and needle use it."""

import collections
import json
import os
import re
import struct

from shards import add_tokenizer_flags, die, open_input, report_output_errors, write_file

MAGIC, VERSION = 20260803, 1
LLMC_MAGIC, LLMC_VERSION, LLMC_START = 20240522, 1, 65535
CHOICE, NEEDLE = 0, 1  # kinds of files

# An example: the tokens of its context, [(tokens, length in characters)] of its choices, the index of the right
# one, and the depth of a needle in thousandths of the context.
Example = collections.namedtuple("Example", "context choices label depth", defaults=(0,))


def header(*values):
    return struct.pack("<256i", *values, *[0] * (256 - len(values)))


def eval_file(examples, kind, vocabulary, keys=0):
    """Returns the content of a file in our format."""
    import numpy as np

    values = []
    for e in examples:
        values += [e.label, len(e.choices), e.depth, len(e.context), *e.context]
        for tokens, length in e.choices:
            values += [length, len(tokens), *tokens]
    fields = (kind, len(examples), len(vocabulary.pieces), keys, vocabulary.checksum())
    return header(MAGIC, VERSION, *fields) + np.array(values, "<i4").tobytes()


def llmc_file(examples, vocabulary):
    """Returns the content of a file in llm.c's format, which has 16-bit tokens."""
    import numpy as np

    out, longest = [], 0
    for i, e in enumerate(examples):
        values = [LLMC_START, 0, i, e.label, len(e.choices), len(e.context), *e.context]
        for tokens, _ in e.choices:
            values += [len(tokens), *tokens]
        values[1] = 2 * len(values)
        longest = max(longest, values[1])
        if max(values[1:]) >= LLMC_START:
            die(f"example {i} has {values[1]} bytes, at most 65534 fit into llm.c's format; leave it out")
        out += values
    fields = (len(examples), longest, 0, 0, vocabulary.checksum())
    return header(LLMC_MAGIC, LLMC_VERSION, *fields) + np.array(out, "<u2").tobytes()


def encode(vocabulary, text):
    return vocabulary.encode(text.encode("utf-8", "surrogatepass"), False).tolist()


def encode_within(vocabulary, text):
    """Returns the tokens of a text that stands behind another one, without what a tokenizer puts before the
    first one."""
    return encode(vocabulary, "." + text)[len(encode(vocabulary, ".")) :]


def begin_text(vocabulary):
    """Returns the tokens before a text: BOS, if the tokenizer has one."""
    return [] if vocabulary.bos is None else [vocabulary.bos]


def encode_pair(vocabulary, context, choice):
    """Returns the tokens of a context, which begins with BOS, and of its continuation. They are those of the
    whole text, and spaces between both belong to the choice, as in lm-eval. An empty context of a tokenizer
    without BOS is end-of-text."""
    rest = len(context) - len(context.rstrip())
    if rest:
        context, choice = context[:-rest], context[-rest:] + choice
    whole, first = encode(vocabulary, context + choice), encode(vocabulary, context) if context else []
    return begin_text(vocabulary) + first or [vocabulary.eot], whole[len(first) :]


def read_json_lines(path):
    """Iterates over (line number, object) of a file of JSON objects, one per line."""
    with open_input(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                die(f"{path}, line {number}: not a JSON object; name a file with one object per line")
            yield number, row


def text_field(row, name, where):
    if not isinstance(row.get(name), str):
        die(f"{where}: has no text {name!r}; check the file")
    return row[name]


def text_list(value, name, where):
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v for v in value):
        die(f"{where}: {name!r} is not a list of two or more texts; check the file")
    return value


def label_of(value, count, where):
    """Returns the index of the right choice, from a number or its digits."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int or not 0 <= value < count:
        die(f"{where}: the right choice is {value!r:.60}, but must be from 0 to {count - 1}; check the file")
    return value


def hellaswag_row(row, where):
    """Returns (context, choices, label) of a row of HellaSwag, as llm.c reads it: a choice is behind a space."""
    endings = text_list(row.get("endings"), "endings", where)
    return text_field(row, "ctx", where), endings, label_of(row.get("label"), len(endings), where)


def add_flags(parser, output):
    parser.add_argument("-o", metavar="FILE", required=True, dest="output", help=output)
    add_tokenizer_flags(parser)


def load_vocabulary(args):
    if args.tokenizer is None:
        die("--tokenizer T is missing; give that of the model's training data")
    import vocab  # here, so that run_main() reports a missing package

    return vocab.load(args.tokenizer, args.eot, args.bos)


def write_output(path, content):
    if os.path.isdir(path):
        die(f"-o {path}: is a folder; give the name of a file, such as {os.path.join(path, 'eval.bin')}")
    with report_output_errors(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_file(path, content)
