"""BPE vocabularies: loads a Hugging Face tokenizer.json, a GGUF file's tokenizer or a tiktoken vocabulary, or
trains one; encodes text; writes the tokenizer.bin that the trainer reads (format: llmc/tokenizer.h).

    load(name, eot_text)              a file or folder by its path, or tiktoken's vocabulary by its name
    from_hf(source, name, eot_text)   the text of a tokenizer.json, with its tokenizer_config.json
    from_gguf(fields, name, eot_text) the metadata of a GGUF file, as read_gguf(path) returns them
    from_tiktoken(...)                the tables of a tiktoken encoding
    train(texts, vocab_size)          a new byte-level BPE

Each returns a Vocabulary; its tokenizer_bin() is the content of tokenizer.bin. Each error is SystemExit with
one line."""

import base64
import contextlib
import json
import os
import re
import struct
import sys
import threading
import unicodedata
import zlib
from collections import namedtuple

import numpy as np
import tiktoken
import tokenizers

from shards import die, one_line, open_input, read_input

# Usual end-of-text tokens.
EOT_TOKENS = ["<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|im_end|>"]

# A pre-tokenizer splits text into pre-tokens, which merges do not cross. PATTERNS[pretokenizer] has the
# equivalent regular expressions of one value of `pretokenizer` in llmc/tokenizer.h.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_SMOLLM = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
PATTERNS = [
    [
        _GPT2,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ],
    [_LLAMA3],
    [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    [_CL100K],
    [_SMOLLM],
]
# The pattern of each known pre_tokenizer of a tokenizer.json, by the patterns of its parts. They mean the
# same to the regular expression engines of tokenizers and of tiktoken.
HF_PATTERNS = {
    **{(p,): p for p in (_GPT2, PATTERNS[0][2], _LLAMA3, PATTERNS[2][0])},
    (_DIGITS, _GPT2): _SMOLLM,
}

# tokenizer.bin, as in llmc/tokenizer.h
BPE, SENTENCEPIECE = 2, 3
PREFIX_NONE, PREFIX_ALWAYS, PREFIX_UNLESS_SPACE, PREFIX_FIRST = range(4)
TOKEN_VOCAB, TOKEN_BYTE, TOKEN_ADDED, TOKEN_SPECIAL, TOKEN_NORMALIZED = 1, 2, 4, 8, 16
TOKEN_LSTRIP, TOKEN_RSTRIP, TOKEN_METASPACE = 32, 64, 128
MAX_EOS = 32
METASPACE = "\u2581"  # how SentencePiece writes a space

# A tiktoken file lists only ordinary tokens. The number of tokens identifies a known file, and with it the
# pattern, the end-of-text token and the vocabulary size with special tokens.
TiktokenFile = namedtuple("TiktokenFile", "pattern eot_text eot_id vocab_size")
TIKTOKEN_FILES = {
    50256: TiktokenFile(PATTERNS[0][1], "<|endoftext|>", 50256, 50257),  # GPT-2
    100256: TiktokenFile(_CL100K, "<|endoftext|>", 100257, 100277),  # cl100k_base: GPT-4
    128000: TiktokenFile(_LLAMA3, "<|end_of_text|>", 128001, 128256),  # Llama 3
    151643: TiktokenFile(PATTERNS[2][0], "<|endoftext|>", 151643, 151646),  # Qwen
}


def _byte_characters():
    """Returns GPT-2's map of bytes to printable characters, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


MAX_VOCAB_SIZE = 1 << 20  # bounds the memory for a file with huge ids
MAX_TOKEN = 1024  # characters; the time to find the merges of a token is quadratic in them
MAX_TRAINED_TOKEN_BYTES = 128  # longer ones would be lines of dashes and the like
_LONG_WORD = re.compile(r"\S{512}|\s{512}")  # training time is quadratic in the length of a word

BYTE_OF = _byte_characters()
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's decoder escapes single bytes
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _merge(piece, rank):
    """Applies BPE merges to the bytes of one pre-token and returns the resulting pieces. `rank` maps pairs of
    pieces to ranks; the adjacent pair with the lowest rank is merged first, until no pair has a rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        ranks = [rank.get(pair, 1 << 62) for pair in zip(parts, parts[1:])]
        lowest = min(ranks)
        if lowest == 1 << 62:
            break
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class Vocabulary:
    """A BPE vocabulary and its encoder.

    Args:
        pieces: pieces[id] has the bytes of a token; b"" for an unused id.
        ranks: ranks[id] is the merge priority of a token, lowest first; -1 for a token that no merge makes.
        eot: id of the end-of-text token.
        pattern: regular expression of the pre-tokenizer; None if it is not a single known one.
        ignore_merges: a pre-token that is itself a token is that token, whatever the merges give.
        flags: flags[id] of each token, TOKEN_VOCAB and following.
        hf_json: text of the tokenizer.json, if the vocabulary comes from one.
        merges: [(left, right, merged id)], lowest rank first; empty: merge by the ranks of the tokens.
        kind: BPE (byte-level) or SENTENCEPIECE.
        nfc: normalize text to NFC first.
        use_tiktoken: tiktoken's engine gives the same tokens as the tokenizer's own library.
        differs: what this tokenizer does that the trainer does not; None if they do the same.
        bos: id of the token before a prompt; None: there is none.
        eos: ids of the tokens that end a generated text.
        unknown: id of the unknown token; None: there is none.
        fuse_unknown: several unknown tokens in a row become one.
        prefix, split_spaces: of SENTENCEPIECE, as in llmc/tokenizer.h.

    Attributes:
        pretokenizer: index of `pattern` in PATTERNS, or None.
        dtype: NumPy type of a token in a shard.
        byte_id: [256] the token of each single byte, or -1.
        note: how the trainer's tokens of -prompt can differ from this tokenizer's; None if they do not.
    """

    def __init__(
        self,
        pieces,
        ranks,
        eot,
        pattern,
        ignore_merges,
        flags,
        hf_json=None,
        merges=(),
        kind=BPE,
        nfc=False,
        use_tiktoken=True,
        differs=None,
        bos=None,
        eos=(),
        unknown=None,
        fuse_unknown=False,
        prefix=PREFIX_NONE,
        split_spaces=False,
    ):
        self.pieces, self.ranks, self.eot, self.pattern = pieces, ranks, eot, pattern
        self.ignore_merges, self.flags, self.merges, self.kind = ignore_merges, flags, merges, kind
        self.hf_json, self.nfc, self.bos, self.eos = hf_json, nfc, bos, list(eos)
        self.unknown, self.fuse_unknown = unknown, fuse_unknown
        self.prefix, self.split_spaces = prefix, split_spaces
        self.pretokenizer = next((i for i, s in enumerate(PATTERNS) if pattern in s), None)
        self.dtype = np.dtype("<u2") if len(pieces) <= 65536 else np.dtype("<u4")
        self.byte_id = np.full(256, -1, np.int64)
        single = TOKEN_VOCAB if kind == BPE else TOKEN_BYTE
        for i in range(len(pieces) - 1, -1, -1):  # the first of equal pieces counts
            if len(pieces[i]) == 1 and flags[i] & single:
                self.byte_id[pieces[i][0]] = i
        self.missing = {b for b in range(256) if self.byte_id[b] < 0}
        self.added = self._added_texts(TOKEN_ADDED, TOKEN_ADDED | TOKEN_SPECIAL)
        self.note = None
        if self.pretokenizer is None and kind == BPE:
            self.note = (
                "splits text in a way that the trainer does not implement; -prompt is split as by Llama 3"
            )
        elif differs:
            self.note = f"{differs}, which the trainer does not do; tokens of -prompt can differ"
        self.use_tiktoken = use_tiktoken
        self.use_special = False
        self._make_engines()

    def _added_texts(self, wanted, mask):
        """Returns the texts of the added tokens whose flags are `wanted`."""
        texts = [(self.pieces[i].decode(), f) for i, f in enumerate(self.flags) if f & mask == wanted]
        return [t.replace(" ", METASPACE) if f & TOKEN_METASPACE else t for t, f in texts]

    def use_special_tokens(self):
        """From now on, special tokens in a text become their ids instead of ordinary text."""
        if self.hf_json is None:
            die("--special-tokens 1: a tiktoken vocabulary does not support it; use a tokenizer.json")
        self.use_special = True
        self.added = self._added_texts(TOKEN_ADDED, TOKEN_ADDED)
        self._make_engines()

    def __getstate__(self):
        engines = ("tiktoken", "hf", "tiktoken_ids")  # cannot be pickled
        return {key: value for key, value in self.__dict__.items() if key not in engines}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_engines()

    def _make_engines(self):
        # tiktoken's engine is seven times as fast as that of tokenizers with the same vocabulary
        self.tiktoken = self.hf = None
        if self.use_tiktoken:
            self._make_tiktoken()
        if self.hf_json is not None and (not self.use_tiktoken or self.added):
            self._make_hf()

    def _make_tiktoken(self):
        merged = [i for i in range(len(self.pieces)) if self.ranks[i] >= 0 and len(self.pieces[i]) > 1]
        merged.sort(key=lambda i: (self.ranks[i], i))
        ranks = {bytes([b]): b for b in range(256)}
        ids = [max(int(i), 0) for i in self.byte_id]  # _encode_text refuses a byte without a token
        for i in merged:
            if ranks.setdefault(self.pieces[i], len(ids)) == len(ids):
                ids.append(i)
        self.tiktoken = tiktoken.Encoding(
            "shards", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.tiktoken_ids = np.array(ids, dtype=self.dtype)  # [rank in the engine] -> id

    def _make_hf(self):
        self.hf = tokenizers.Tokenizer.from_str(self.hf_json)
        self.hf.no_padding()
        self.hf.no_truncation()
        # "<|endoftext|>" in a text is encoded as ordinary text
        self.hf.encode_special_tokens = not self.use_special

    def _encode_text(self, text):
        normal = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.missing and self.kind == BPE and self.unknown is None:
            for byte in self.missing.intersection(normal.encode()):
                self._die_missing(byte)
        if self.tiktoken is None or any(word in text for word in self.added):
            encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoding.ids, dtype=self.dtype)
        return self.tiktoken_ids[self.tiktoken.encode_to_numpy(normal, disallowed_special=())]

    def _die_missing(self, byte):
        die(f"the vocabulary has no token for byte 0x{byte:02x}: leave it out of the text")

    def _encode_bytes(self, data):
        """Returns the tokens of single bytes."""
        ids = self.byte_id[list(data)]
        if (ids < 0).any():
            if self.unknown is None:
                self._die_missing(data[int(np.argmin(ids))])
            ids[ids < 0] = self.unknown
        return ids.astype(self.dtype)

    def _encode_sentencepiece(self, text):
        """Encodes text with bytes that are not UTF-8. Each is encoded as a character that is no token, so that
        the text is not split there; the tokens of the character become the token of the byte."""
        ids = {self.pieces[i] for i, f in enumerate(self.flags) if f & TOKEN_VOCAB}
        for base in range(0xF0000, 0x10FF00, 256):  # private characters
            stand_ins = [chr(base + b) for b in range(256)]
            if not any(c in text or c.encode() in ids for c in stand_ins):
                break
        tokens = {c: self._encode_bytes(c.encode()).tolist() for c in stand_ins}
        out, encoded = (
            [],
            self._encode_text(
                re.sub(_NOT_UTF8, lambda m: "".join(stand_ins[ord(c) - 0xDC00] for c in m.group()), text)
            ).tolist(),
        )
        byte_of = {tuple(t): b for b, t in enumerate(tokens[c] for c in stand_ins)}
        at = 0
        while at < len(encoded):
            byte = byte_of.get(tuple(encoded[at : at + 4]))
            out.append(encoded[at] if byte is None else int(self._encode_bytes([byte])[0]))
            at += 1 if byte is None else 4
        return np.array(out, dtype=self.dtype)

    def encode(self, data, ends):
        """Encodes bytes to an array of tokens. ends=True appends end-of-text. A byte that is not
        valid UTF-8 becomes the token of that byte."""
        parts = [np.empty(0, self.dtype)]
        text = data.decode("utf-8", "surrogateescape")
        if self.kind == SENTENCEPIECE and _NOT_UTF8.search(text):
            parts.append(self._encode_sentencepiece(text))
            text = ""
        for i, part in enumerate(_NOT_UTF8.split(text)):
            if i % 2 == 0 and part:
                parts.append(self._encode_text(part))
            elif part:
                parts.append(self._encode_bytes([ord(c) - 0xDC00 for c in part]))
        if ends:
            parts.append(np.array([self.eot], self.dtype))
        return np.concatenate(parts)

    def checksum(self):
        """Returns tokenizer_checksum() of llmc/tokenizer.h, as an int32."""
        tokens = (
            struct.pack("<I", i) + piece
            for i, (piece, rank, flags) in enumerate(zip(self.pieces, self.ranks, self.flags))
            if flags & (TOKEN_VOCAB | TOKEN_ADDED) == TOKEN_VOCAB and (len(piece) == 1 or rank >= 0)
        )
        return int(np.uint32(zlib.crc32(b"".join(tokens))).astype(np.int32))

    def tokenizer_bin(self):
        """Returns the content of tokenizer.bin, version 2 (llmc/tokenizer.h)."""
        header = np.zeros(256, "<i4")
        pretokenizer = self.pretokenizer
        if pretokenizer is None:
            pretokenizer = 1 if self.kind == BPE else 0
        bos, unknown = (-1 if i is None else i for i in (self.bos, self.unknown))
        header[:9] = [
            20260801,
            2,
            len(self.pieces),
            self.eot,
            self.kind,
            pretokenizer,
            int(self.ignore_merges),
            bos,
            unknown,
        ]
        header[9:14] = [
            int(self.fuse_unknown),
            len(self.merges),
            self.prefix,
            int(self.split_spaces),
            len(self.eos),
        ]
        header[14 : 14 + len(self.eos)] = self.eos
        out = [header.tobytes()]
        for piece, rank, flags in zip(self.pieces, self.ranks, self.flags):
            if len(piece) > 65535:
                die(
                    f"a token has {len(piece)} bytes: tokenizer.bin stores at most 65535; choose another "
                    f"tokenizer"
                )
            out.append(struct.pack("<H", len(piece)) + piece + struct.pack("<iB", rank, flags))
        out.append(np.array(self.merges, "<i4").tobytes())
        return b"".join(out)


def _parts(part, children):
    """Returns the parts of a normalizer, pre_tokenizer or post_processor, out of its nested Sequences."""
    if not part:
        return []
    if part.get("type") == "Sequence":
        return [p for child in part.get(children) or [] for p in _parts(child, children)]
    return [part]


def _patterns(parts):
    """Returns the regular expressions of the parts of a pre_tokenizer, None for each unknown rule."""
    patterns = []
    for part in parts:
        kind = part.get("type")
        if kind == "ByteLevel":
            patterns += [_GPT2] if part.get("use_regex", True) else []
        elif kind == "Digits" and part.get("individual_digits"):
            patterns.append(_DIGITS)
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            patterns.append(part["pattern"].get("Regex"))
        else:
            patterns.append(None)
    return patterns


def _sentencepiece_rules(normalizers, pre_tokenizers):
    """Returns (prefix, split_spaces) of a SentencePiece BPE by the parts of its normalizer and
    pre_tokenizer, or None for other parts."""
    replaces, prefix, split = False, PREFIX_NONE, False
    for part in normalizers:
        if part.get("type") == "Prepend" and part.get("prepend") == METASPACE and not prefix and not replaces:
            prefix = PREFIX_ALWAYS
        elif (
            part.get("type") == "Replace"
            and part.get("pattern") == {"String": " "}
            and part.get("content") == METASPACE
        ):
            replaces = True
        else:
            return None
    for part in pre_tokenizers:
        if part.get("type") == "Metaspace" and part.get("replacement") == METASPACE and not replaces:
            old = "always" if part.get("add_prefix_space", True) else "never"
            schemes = {"always": PREFIX_UNLESS_SPACE, "first": PREFIX_FIRST, "never": PREFIX_NONE}
            scheme = part.get("prepend_scheme", old)
            if scheme not in schemes:
                return None
            replaces, prefix, split = True, schemes[scheme], bool(part.get("split", True))
        elif not (part.get("type") == "Split" and part.get("pattern") == {"String": " "} and replaces):
            return None  # Gemma's Split finds no space, since all are replaced
    return (prefix, split) if replaces else None


def _parse_hf(source, name):
    """Parses a tokenizer.json and checks the fields that from_hf reads.

    Returns:
        (the parsed file, {text: added token}, list of merges [left, right], {text: id} of all tokens)
    """

    def need(condition, what):
        if not condition:
            die(f"{name} is not a valid tokenizer.json: {what}")

    def is_text(value):
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)

    def check_ids(tokens):
        for text, i in tokens:
            need(is_text(text), f"the token {str(text)[:40]!a} is not text")
            need(type(i) is int and i >= 0, f"the token {text[:40]!r} has no id")
            if i >= MAX_VOCAB_SIZE:
                die(f"{name}: the token {text[:40]!r} has id {i}, at most {MAX_VOCAB_SIZE - 1} is possible")

    def check_pre_tokenizer(part):
        need(part is None or isinstance(part, dict), "'pre_tokenizer' is not an object")
        split = (part or {}).get("type") == "Split"
        need(not split or isinstance(part.get("pattern"), dict), "a Split has no pattern")
        check_children(part, "pretokenizers", check_pre_tokenizer)

    def check_children(part, key, check):
        children = (part or {}).get(key) or []
        need(isinstance(children, list), f"'{key}' is not a list")
        for child in children:
            need(isinstance(child, dict), f"one of '{key}' is not an object")
            check(child)

    try:
        j = json.loads(source)
    except (ValueError, RecursionError) as e:
        die(f"{name} is not a valid tokenizer.json: {one_line(e)}")
    need(isinstance(j, dict), "not an object")
    model = j.get("model")
    need(isinstance(model, dict), "no 'model'")
    if model.get("type", "BPE") != "BPE":
        die(f"{name} is a {str(model['type'])[:40]} tokenizer; choose a byte-level BPE")
    vocab, added = model.get("vocab"), j.get("added_tokens") or []
    need(isinstance(vocab, dict), "no 'vocab'")
    check_ids(vocab.items())
    need(
        isinstance(added, list) and all(isinstance(t, dict) for t in added),
        "'added_tokens' is not a list of objects",
    )
    check_ids((t.get("content"), t.get("id")) for t in added)
    need(all(t["content"] for t in added), "an added token has no text")
    ids = {**vocab, **{t["content"]: t["id"] for t in added}}
    need(len(set(ids.values())) == len(ids), "two tokens have the same id")
    need(isinstance(model.get("merges"), list), "no 'merges'")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    for m in merges:
        need(
            isinstance(m, list) and len(m) == 2 and is_text(m[0]) and is_text(m[1]),
            f"{str(m)[:40]!a} does not merge two tokens",
        )
    for key, children in (("normalizer", "normalizers"), ("post_processor", "processors")):
        need(isinstance(j.get(key) or {}, dict), f"'{key}' is not an object")
        check_children(
            j.get(key), children, lambda child: need(child.get("type") != "Sequence", f"nested '{key}'")
        )
    try:
        check_pre_tokenizer(j.get("pre_tokenizer"))
    except RecursionError:
        need(False, "'pre_tokenizer' is nested too deeply")
    unknown = model.get("unk_token")
    need(unknown is None or is_text(unknown), "'unk_token' is not text")
    need(not unknown or unknown in vocab, f"it has no token for its 'unk_token' {str(unknown)[:40]!r}")
    return j, {t["content"]: t for t in added}, merges, ids


def _token_text(value):
    """Returns the text of a token in a tokenizer_config.json, which is a string or an object; None if it has
    none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _find_bos(j, config, ids, bos_text, eot, name):
    """Returns the id of the token before a prompt, or None."""
    text = bos_text
    if bos_text == "none":
        return None
    if bos_text is None:
        template = next(
            (
                p
                for p in _parts(j.get("post_processor"), "processors")
                if p.get("type") == "TemplateProcessing"
            ),
            {},
        )
        single = template.get("single")
        first = single[0] if isinstance(single, list) and single and isinstance(single[0], dict) else {}
        special = first.get("SpecialToken")
        if isinstance(config.get("add_bos_token"), bool):
            text = _token_text(config.get("bos_token")) if config["add_bos_token"] else None
        elif template:
            text = special.get("id") if isinstance(special, dict) else None
        elif not config:  # nothing says what the model uses: as if each document began after another one
            return eot
        if text is None:
            return None
    if not isinstance(text, str) or text not in ids:
        die(f"--bos {str(text)[:40]}: {name} has no such token; name one of its special tokens, or none")
    return ids[text]


def _find_eos(config, generation_config, ids, eot, name):
    """Returns the ids of the tokens that end a generated text."""
    eos = generation_config.get("eos_token_id")
    if eos is None:
        text = _token_text(config.get("eos_token"))
        eos = ids[text] if text in ids else eot
    eos = eos if isinstance(eos, list) else [eos]
    known = set(ids.values())
    if len(eos) > MAX_EOS or any(type(i) is not int or i not in known for i in eos):
        die(f"{name}: eos_token_id {str(eos)[:60]}: must be at most {MAX_EOS} ids of tokens; repair the file")
    return eos


def from_hf(source, name, eot_text, config=None, generation_config=None, bos_text=None):
    """Returns the Vocabulary of a tokenizer.json.

    Args:
        source: text of the file.
        name: path of the file, for messages.
        eot_text: the end-of-text token; None takes the first of EOT_TOKENS that the file has.
        config: the content of tokenizer_config.json, as an object; None: there is none.
        generation_config: likewise of generation_config.json.
        bos_text: the token before a prompt; "none": there is none; None takes what config or the file says,
            or end-of-text if neither says anything.
    """
    config, generation_config = config or {}, generation_config or {}
    j, added, merges, ids = _parse_hf(source, name)
    model = j["model"]
    vocab = model["vocab"]
    normalizers = _parts(j.get("normalizer"), "normalizers")
    pre_tokenizers = _parts(j.get("pre_tokenizer"), "pretokenizers")
    byte_level = any(p.get("type") == "ByteLevel" for p in pre_tokenizers)
    rules = None if byte_level else _sentencepiece_rules(normalizers, pre_tokenizers)
    if not byte_level and rules is None:
        parts = [str(p.get("type"))[:40] for p in normalizers + pre_tokenizers]
        die(
            f"{name} is neither a byte-level nor a SentencePiece BPE (it has "
            f"{', '.join(parts[:12]) or 'no rules'}); choose another tokenizer"
        )
    if any(p.get("type") == "ByteLevel" and p.get("add_prefix_space", True) for p in pre_tokenizers):
        die(f"{name} puts a space before every text; set add_prefix_space to false in the file")
    special = [text for text, t in added.items() if t.get("special")]
    if eot_text is None:
        eot_text = next((text for text in EOT_TOKENS if text in special), None)
        if eot_text is None and _token_text(config.get("eos_token")) in added:
            eot_text = _token_text(config["eos_token"])
        if eot_text is None:
            die(
                f"{name} has no known end-of-text token; name one with --eot (its special tokens: "
                f"{', '.join(special[:12]) or 'none'})"
            )
    if eot_text not in added:
        die(
            f"--eot {eot_text}: {name} has no such special token; its special tokens: "
            f"{', '.join(special[:12]) or 'none'}"
        )
    byte_fallback = not byte_level and bool(model.get("byte_fallback"))

    def as_piece(text):
        """Returns the bytes of a token, and its flags."""
        flags = 0
        if text in added:
            t = added[text]
            flags = TOKEN_ADDED | (TOKEN_SPECIAL if t.get("special") else 0)
            flags |= TOKEN_NORMALIZED if t.get("normalized", not t.get("special")) else 0
            flags |= (TOKEN_LSTRIP if t.get("lstrip") else 0) | (TOKEN_RSTRIP if t.get("rstrip") else 0)
        if byte_level:
            if text in vocab and all(c in BYTE_OF for c in text):
                piece = bytes(BYTE_OF[c] for c in text)
                if text not in added or piece == text.encode():
                    return piece, flags | TOKEN_VOCAB
            return text.encode(), flags
        if byte_fallback and text not in added and _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)]), TOKEN_BYTE
        if " " in text:
            return text.encode(), flags
        if METASPACE in text and flags:
            flags |= TOKEN_METASPACE
        ordinary = text in vocab and not flags & TOKEN_SPECIAL and text != model.get("unk_token")
        return text.replace(METASPACE, " ").encode(), flags | (TOKEN_VOCAB if ordinary else 0)

    n = max(ids.values()) + 1
    pieces, ranks, flags = [b""] * n, [-1] * n, [0] * n
    for text, i in ids.items():
        pieces[i], flags[i] = as_piece(text)
    rank_of, merge_ids = {}, {}
    for rank, (a, b) in enumerate(merges):
        if a + b not in vocab or a not in vocab or b not in vocab:
            die(
                f"{name} merges {a!r} and {b!r}, but does not have one of them or the result; repair the file"
            )
        if (flags[vocab[a]] | flags[vocab[b]]) & TOKEN_BYTE:
            die(f"{name} merges {a!r} and {b!r}: a byte token is never merged; repair the file")
        if ranks[vocab[a + b]] < 0:
            ranks[vocab[a + b]] = rank
        rank_of.setdefault((as_piece(a)[0], as_piece(b)[0]), rank)
        merge_ids.pop((vocab[a], vocab[b]), None)  # the last of equal merges counts
        merge_ids[vocab[a], vocab[b]] = vocab[a + b]
    if model.get("dropout"):  # dropout would make the tokens random
        model["dropout"] = None
        source = json.dumps(j)
    ignore_merges = bool(model.get("ignore_merges"))
    # The list of merges is equivalent to "merge the pair that spells the token of lowest rank" if the bytes
    # of each token merge to that token. Only then does tiktoken's engine give the same tokens.
    pattern = HF_PATTERNS.get(tuple(_patterns(pre_tokenizers))) if byte_level else None
    nfc = [p.get("type") for p in normalizers] == ["NFC"]
    differs = None
    if byte_level and normalizers:
        differs = "normalizes text to NFC" if nfc else "normalizes text"
    if any(model.get(key) for key in ("end_of_word_suffix", "continuing_subword_prefix")):
        differs = "marks the parts of words"
    if any(t.get("single_word") for t in added.values()):
        differs = "has added tokens that must be whole words"
    unknown = vocab.get(model.get("unk_token"))
    use_tiktoken = (
        pattern is not None
        and differs in (None, "normalizes text to NFC")
        and unknown is None
        and not model.get("byte_fallback")
        and all(
            len(pieces[i]) <= 8 * MAX_TRAINED_TOKEN_BYTES and len(_merge(pieces[i], rank_of)) == 1
            for text, i in vocab.items()
            if text not in added and len(pieces[i]) > 1 and (ignore_merges or ranks[i] >= 0)
        )
    )
    if not byte_level and unknown is None and sum(f & TOKEN_BYTE > 0 for f in flags) < 256:
        die(f"{name} has neither a token for each byte nor an unknown token; choose another tokenizer")
    eot = added[eot_text]["id"]
    return Vocabulary(
        pieces,
        ranks,
        eot,
        pattern,
        ignore_merges,
        flags,
        hf_json=source,
        merges=[(a, b, i) for (a, b), i in merge_ids.items()],
        kind=BPE if byte_level else SENTENCEPIECE,
        nfc=nfc,
        use_tiktoken=use_tiktoken,
        differs=differs,
        bos=_find_bos(j, config, ids, bos_text, eot, name),
        eos=_find_eos(config, generation_config, ids, eot, name),
        unknown=unknown,
        fuse_unknown=bool(model.get("fuse_unk")),
        prefix=rules[0] if rules else PREFIX_NONE,
        split_spaces=bool(rules and rules[1]),
    )


def from_tiktoken(pattern, mergeable, special, eot_text, vocab_size, bos_text=None):
    """Returns the Vocabulary of a tiktoken encoding.

    Args:
        pattern: regular expression of the pre-tokenizer.
        mergeable: {bytes: rank}; a rank is also the id.
        special: {text: id} of the special tokens.
        eot_text: the end-of-text token, one of `special`.
        vocab_size: number of ids.
        bos_text: the token before a prompt; "none": there is none; None: end-of-text.
    """
    pieces, ranks = [b""] * vocab_size, [-1] * vocab_size
    flags, eot = [0] * vocab_size, special[eot_text]
    for piece, i in mergeable.items():
        pieces[i], ranks[i], flags[i] = piece, i if len(piece) > 1 else -1, TOKEN_VOCAB
    for text, i in special.items():
        pieces[i], flags[i] = text.encode(), TOKEN_ADDED | TOKEN_SPECIAL
    if not bos_text:
        bos = eot
    elif bos_text == "none":
        bos = None
    elif bos_text in special:
        bos = special[bos_text]
    else:
        die(f"--bos {bos_text}: the tokenizer's special tokens are {', '.join(special)}; name one, or none")
    return Vocabulary(pieces, ranks, eot, pattern, True, flags, bos=bos, eos=[eot])


def _from_tiktoken_name(name, eot_text, bos_text):
    try:
        e = tiktoken.get_encoding(name)
    except ValueError:
        what = "a folder without tokenizer.json" if os.path.isdir(name) else "neither a file nor a tiktoken vocabulary"
        die(
            f"--tokenizer {name}: {what}; give a tokenizer.json, the folder of one, or a GGUF file, or one of tiktoken: "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    except Exception as error:  # whatever the network library raises
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        die(
            f"cannot download tiktoken's vocabulary {name}: {getattr(cause, 'strerror', None) or one_line(cause)}; "
            f"connect to the network this once, or give --tokenizer a tokenizer.json, GGUF or tiktoken file"
        )
    special = e._special_tokens
    eot_text = eot_text or next((text for text in EOT_TOKENS if text in special), None)
    if eot_text not in special:
        die(
            f"tiktoken's vocabulary {name} has no end-of-text token {eot_text or 'that is known'}; name one "
            f"with --eot (its special tokens: {', '.join(special) or 'none'})"
        )
    return from_tiktoken(e._pat_str, e._mergeable_ranks, special, eot_text, e.n_vocab, bos_text)


def _from_tiktoken_file(lines, name, eot_text, bos_text):
    mergeable = {}
    for number, line in enumerate(lines, 1):
        try:
            piece, rank = line.split()
            mergeable[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError:
            die(
                f"{name} is neither a tokenizer.json nor a tiktoken file: line {number} is not a base64 "
                f"token and a rank"
            )
    n = len(mergeable)
    if n not in TIKTOKEN_FILES or sorted(mergeable.values()) != list(range(n)):
        die(
            f"{name} has {n} tokens: known tiktoken files have {', '.join(map(str, TIKTOKEN_FILES))}; use a "
            f"tokenizer.json or the name of a tiktoken vocabulary"
        )
    known = TIKTOKEN_FILES[n]
    if eot_text not in (None, known.eot_text):
        die(f"--eot {eot_text}: the end-of-text token of {name} is {known.eot_text}; leave out --eot")
    return from_tiktoken(
        known.pattern, mergeable, {known.eot_text: known.eot_id}, known.eot_text, known.vocab_size, bos_text
    )


@contextlib.contextmanager
def _without_stderr():
    """Discards what is written to stderr: the tokenizers' libraries print many lines before they raise."""
    saved, null = os.dup(2), os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# The pre_tokenizer of a tokenizer.json for each tokenizer.ggml.pre of a GGUF file.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split_json(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


_SMOLLM_JSON = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
GGUF_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _SMOLLM_JSON),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), _split_json(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split_json(PATTERNS[2][0])),
}


def read_gguf(path):
    """Returns {key: value} of the metadata of a GGUF file. Does not read its tensors."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    string, array = 8, 9

    def invalid(what):
        die(f"{path} is not a valid GGUF file: {what}")

    with open_input(path) as f:
        size = os.fstat(f.fileno()).st_size

        def take(n):
            if n > size - f.tell():
                invalid("it is truncated")
            return f.read(n)

        def number(kind):
            return struct.unpack("<" + kind, take(struct.calcsize(kind)))[0]

        def value(kind):
            if kind in numbers:
                return number(numbers[kind])
            if kind == string:
                return take(number("Q")).decode("utf-8", "replace")
            if kind != array:
                invalid(f"a value has type {kind}")
            kind, n = number("I"), number("Q")
            if kind in numbers:
                width = struct.calcsize(numbers[kind])
                return np.frombuffer(take(n * width), "<" + numbers[kind]).tolist()
            if kind != string or n > size:
                invalid(f"an array of {n} values has type {kind}")
            return [value(string) for _ in range(n)]

        if take(4) != b"GGUF":
            invalid("it does not begin with GGUF")
        version, _, keys = number("I"), number("Q"), number("Q")
        if version not in (2, 3):
            invalid(f"version {version}, 2 or 3 expected")
        fields = {}
        for _ in range(keys):
            key = value(string)
            fields[key] = value(number("I"))
        return fields


def _merges_by_score(tokens, scores, mergeable):
    """Returns the merges of a SentencePiece BPE: all pairs of tokens that spell a token, highest score
    first. They are in the order of the tokenizer.json files that transformers converts from SentencePiece: of
    equal scores, the longest left token first."""
    ids = {text: i for i, text in enumerate(tokens) if i in mergeable}
    merges = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], -cut, cut - len(text), left, right))
    return [[tokens[left], tokens[right]] for *_, left, right in sorted(merges)]


def from_gguf(fields, name, eot_text, bos_text=None):
    """Returns the Vocabulary of a GGUF file.

    Args:
        fields: {key: value} of the file's metadata (read_gguf).
        name: path of the file, for messages.
        eot_text: the end-of-text token; None takes the first of EOT_TOKENS that the file has, or its eos
            token.
        bos_text: the token before a prompt; "none": there is none; None takes what the file says.
    """
    control, user_defined, byte = 3, 4, 6  # types of tokens
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    tokens, types = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if model not in ("gpt2", "llama"):
        die(f"{name} has the tokenizer {str(model)[:40]!r}; only gpt2 and llama are supported")
    if model == "gpt2" and pre not in GGUF_PRE_TOKENIZERS:
        die(
            f"{name} splits text as {str(pre)[:40]!r}; known are {', '.join(GGUF_PRE_TOKENIZERS)}; use the "
            f"model's tokenizer.json"
        )

    def is_list(value, kind):
        return isinstance(value, list) and len(value) == len(tokens) and all(type(v) is kind for v in value)

    scores = fields.get("tokenizer.ggml.scores")
    if not (
        isinstance(tokens, list)
        and is_list(tokens, str)
        and is_list(types, int)
        and len(set(tokens)) == len(tokens)
    ):
        die(
            f"{name} is not a valid GGUF file: its tokens and their types are not two lists of the same length"
        )
    if model == "llama" and not is_list(scores, float):
        die(f"{name} is not a valid GGUF file: its tokens have no scores")

    def token(key):
        i = fields.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[i] if type(i) is int and 0 <= i < len(tokens) else None

    added = [
        {
            "id": i,
            "content": text,
            "special": types[i] == control,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, text in enumerate(tokens)
        if types[i] in (control, user_defined) and text
    ]
    special = {t["content"] for t in added if t["special"]}
    if eot_text is None and not special.intersection(EOT_TOKENS):
        eot_text = token("eos")
    j = {"version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None, "decoder": None}
    bpe = {
        "type": "BPE",
        "vocab": {text: i for i, text in enumerate(tokens)},
        "unk_token": None,
        "fuse_unk": False,
    }
    if model == "gpt2":
        bpe["merges"] = fields.get("tokenizer.ggml.merges")
        bpe["ignore_merges"] = pre in ("llama-bpe", "llama3", "llama-v3")
        j["pre_tokenizer"] = GGUF_PRE_TOKENIZERS[pre]
        adds_bos = bpe["ignore_merges"]
    else:
        mergeable = {
            i for i in range(len(tokens)) if types[i] not in (control, byte) and tokens[i] != token("unknown")
        }
        longest = max(map(len, tokens))
        if longest > MAX_TOKEN:
            die(f"{name} has a token of {longest} characters: must have at most {MAX_TOKEN}; use the model's tokenizer.json")
        bpe["merges"] = _merges_by_score(tokens, scores, mergeable)
        bpe.update(byte_fallback=True, unk_token=token("unknown"), fuse_unk=True)
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
        prepend = {"type": "Prepend", "prepend": METASPACE}
        adds_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
        j["normalizer"] = {
            "type": "Sequence",
            "normalizers": [prepend, replace] if adds_prefix else [replace],
        }
        j["pre_tokenizer"] = None
        adds_bos = True
    j["model"] = bpe
    config = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", adds_bos)),
        "bos_token": token("bos"),
    }
    ends = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    generation_config = {"eos_token_id": [i for i in dict.fromkeys(ends) if i is not None] or None}
    return from_hf(json.dumps(j), name, eot_text, config, generation_config, bos_text)


def _read_config(folder, name):
    """Returns the object in a json file of a model's folder; None if there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return None
    try:
        content = json.loads(read_input(path))
    except (ValueError, RecursionError) as e:
        die(f"{path} is not valid json: {one_line(e)}")
    if not isinstance(content, dict):
        die(f"{path} is not a json object; repair the file")
    return content


def load(name, eot_text, bos_text=None):
    """Returns a Vocabulary.

    Args:
        name: a tokenizer.json, a folder with one, a GGUF file, a tiktoken file, or the name of a tiktoken
            vocabulary. tokenizer_config.json and generation_config.json beside a tokenizer.json name BOS and
            the end-of-sequence tokens.
        eot_text: the end-of-text token; None takes the first of EOT_TOKENS that the tokenizer has.
        bos_text: the token before a prompt; "none": there is none; None takes what the tokenizer says.
    """
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if os.sep in name or name.endswith((".json", ".tiktoken", ".model", ".gguf")):
            die(f"cannot read tokenizer {path}: no such file")
        return _from_tiktoken_name(name, eot_text, bos_text)
    with open_input(path) as f:
        is_gguf = f.read(4) == b"GGUF"
    content = b"" if is_gguf else read_input(path)
    if not is_gguf and not content.strip():
        die(f"tokenizer {path} is empty; choose another")
    if not is_gguf and content.lstrip()[:1] != b"{":
        return _from_tiktoken_file(content.splitlines(), path, eot_text, bos_text)
    try:
        with _without_stderr():
            if is_gguf:
                return from_gguf(read_gguf(path), path, eot_text, bos_text)
            folder = os.path.dirname(path)
            config, generation = (
                _read_config(folder, n) for n in ("tokenizer_config.json", "generation_config.json")
            )
            return from_hf(content.decode("utf-8", "replace"), path, eot_text, config, generation, bos_text)
    except (SystemExit, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as e:  # whatever the libraries raise for a file that they cannot use
        die(f"{path} is not a valid {'GGUF file' if is_gguf else 'tokenizer.json'}: {one_line(e)}")


def train(texts, vocab_size):
    """Trains a byte-level BPE of `vocab_size` tokens with GPT-2's pattern.

    Args:
        texts: iterator over bytes objects.

    Returns:
        A Vocabulary. It is smaller than vocab_size if the text has too few pairs to merge.
    """
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())

    def parts():
        for text in texts:
            text, start = text.decode("utf-8", "ignore"), 0
            for word in _LONG_WORD.finditer(text):
                yield text[start : word.end()]
                start = word.end()
            yield text[start:]

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=EOT_TOKENS[:1],
        initial_alphabet=alphabet,
        max_token_length=MAX_TRAINED_TOKEN_BYTES,
        show_progress=False,
    )
    failed = []

    def work():
        try:
            t.train_from_iterator(parts(), trainer)
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work, daemon=True)  # so that a signal ends the program at once
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was saved", file=sys.stderr, flush=True)
        os._exit(1)  # Python would wait for the thread, or abort
    if failed:
        raise failed[0]
    return from_hf(t.to_str(pretty=True), "the trained tokenizer", None)
