"""Byte-level BPE vocabularies: loads a Hugging Face tokenizer.json or a tiktoken vocabulary, or trains one;
encodes text; writes the tokenizer.bin that the trainer reads (format: data/README.md)."""

import base64
import contextlib
import json
import os
import re
import struct
import unicodedata
from collections import namedtuple

import numpy as np
import tiktoken
import tokenizers

from shards import die, one_line, read_input

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
PATTERNS = [
    [
        _GPT2,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ],
    [_LLAMA3],
    [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    [_CL100K],
]
# Patterns that mean the same to the regular expression engines of tokenizers and of tiktoken.
HF_PATTERNS = [_GPT2, PATTERNS[0][2], _LLAMA3, PATTERNS[2][0]]

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
MAX_TRAINED_TOKEN_BYTES = 128  # longer ones would be lines of dashes and the like
_LONG_WORD = re.compile(r"\S{512}|\s{512}")  # training time is quadratic in the length of a word

BYTE_OF = _byte_characters()
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's decoder escapes single bytes


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
    """A byte-level BPE vocabulary and its encoder.

    Args:
        pieces: pieces[id] has the bytes of a token; b"" for an unused id.
        ranks: ranks[id] is the merge priority of a token, lowest first; -1 for a token that no merge makes.
        eot: id of the end-of-text token.
        pattern: regular expression of the pre-tokenizer; None if it is not a single known one.
        ignore_merges: a pre-token that is itself a token is that token, whatever the merges give.
        hf_json: text of the tokenizer.json, if the vocabulary comes from one.
        added: texts of the added tokens that are not special.
        nfc: normalize text to NFC first.
        use_tiktoken: tiktoken's engine gives the same tokens as the tokenizer's own library.

    Attributes:
        pretokenizer: index of `pattern` in PATTERNS, or None.
        dtype: NumPy type of a token in a shard.
        byte_id: [256] the token of each single byte.
        note: how the trainer's tokens of -prompt can differ from this tokenizer's; None if they do not.
    """

    def __init__(
        self, pieces, ranks, eot, pattern, ignore_merges, hf_json=None, added=(), nfc=False, use_tiktoken=True
    ):
        self.pieces, self.ranks, self.eot, self.pattern = pieces, ranks, eot, pattern
        self.ignore_merges = ignore_merges
        self.hf_json, self.added, self.nfc = hf_json, list(added), nfc
        self.pretokenizer = next((i for i, s in enumerate(PATTERNS) if pattern in s), None)
        self.dtype = np.dtype("<u2") if len(pieces) <= 65536 else np.dtype("<u4")
        self.byte_id = np.full(256, -1, np.int64)
        for i in range(len(pieces) - 1, -1, -1):  # the first of equal pieces counts
            if len(pieces[i]) == 1 and i != eot:
                self.byte_id[pieces[i][0]] = i
        if (self.byte_id < 0).any():
            missing = int(np.argmin(self.byte_id))
            die(f"not a byte-level BPE: no token for byte 0x{missing:02x}; choose another tokenizer")
        self.note = None
        if self.pretokenizer is None:
            self.note = (
                "splits text in a way that the trainer does not implement; -prompt is split as by Llama 3"
            )
        elif not use_tiktoken:
            self.note = "normalizes text or merges in its own way; tokens of -prompt can differ"
        elif added or nfc:
            self.note = "normalizes to NFC or has added tokens in text; -prompt supports neither"
        self.use_tiktoken = use_tiktoken
        self.use_hf = hf_json is not None and (not use_tiktoken or bool(added))
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
        if self.use_hf:
            self._make_hf()

    def _make_tiktoken(self):
        merged = [i for i in range(len(self.pieces)) if self.ranks[i] >= 0 and len(self.pieces[i]) > 1]
        merged.sort(key=lambda i: (self.ranks[i], i))
        ranks = {bytes([b]): b for b in range(256)}
        ids = [*self.byte_id]
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
        self.hf.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as ordinary text

    def _encode_text(self, text):
        if self.tiktoken is None or any(word in text for word in self.added):
            encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoding.ids, dtype=self.dtype)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return self.tiktoken_ids[self.tiktoken.encode_to_numpy(text, disallowed_special=())]

    def encode(self, data, ends):
        """Encodes bytes to an array of tokens. ends=True appends end-of-text. A byte that is not
        valid UTF-8 becomes the token of that byte."""
        parts = [np.empty(0, self.dtype)]
        for i, part in enumerate(_NOT_UTF8.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2 == 0 and part:
                parts.append(self._encode_text(part))
            elif part:
                parts.append(self.byte_id[[ord(c) - 0xDC00 for c in part]].astype(self.dtype))
        if ends:
            parts.append(np.array([self.eot], self.dtype))
        return np.concatenate(parts)

    def tokenizer_bin(self):
        """Returns the content of tokenizer.bin, of kind 2 (llmc/tokenizer.h)."""
        header = np.zeros(256, "<i4")
        pretokenizer = 1 if self.pretokenizer is None else self.pretokenizer
        header[:7] = [20260801, 1, len(self.pieces), self.eot, 2, pretokenizer, int(self.ignore_merges)]
        out = [header.tobytes()]
        for piece, rank in zip(self.pieces, self.ranks):
            if len(piece) > 65535:
                die(
                    f"a token has {len(piece)} bytes: tokenizer.bin stores at most 65535; choose another "
                    f"tokenizer"
                )
            out.append(struct.pack("<H", len(piece)) + piece + struct.pack("<i", rank))
        return b"".join(out)


def _patterns(part):
    """Returns the regular expressions of a pre_tokenizer of a tokenizer.json, None for each other rule."""
    kind = (part or {}).get("type")
    if kind == "Sequence":
        return [p for child in part["pretokenizers"] for p in _patterns(child)]
    if kind == "ByteLevel":
        return [_GPT2] if part.get("use_regex", True) else []
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return [part["pattern"].get("Regex")]
    return [None]


def _adds_prefix_space(part):
    return (
        any(_adds_prefix_space(child) for child in part.get("pretokenizers", []))
        if part.get("type") == "Sequence"
        else part.get("type") == "ByteLevel" and part.get("add_prefix_space", True)
    )


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
        children = (part or {}).get("pretokenizers", [])
        need(isinstance(children, list), "'pretokenizers' is not a list")
        split = (part or {}).get("type") == "Split"
        need(not split or isinstance(part.get("pattern"), dict), "a Split has no pattern")
        for child in children:
            need(isinstance(child, dict), "one of 'pretokenizers' is not an object")
            check_pre_tokenizer(child)

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
    try:
        check_pre_tokenizer(j.get("pre_tokenizer"))
    except RecursionError:
        need(False, "'pre_tokenizer' is nested too deeply")
    need(isinstance(j.get("normalizer") or {}, dict), "'normalizer' is not an object")
    return j, {t["content"]: t for t in added}, merges, ids


def from_hf(source, name, eot_text):
    """Returns the Vocabulary of a tokenizer.json.

    Args:
        source: text of the file.
        name: path of the file, for messages.
        eot_text: the end-of-text token; None takes the first of EOT_TOKENS that the file has.
    """
    j, added, merges, ids = _parse_hf(source, name)
    model = j["model"]
    vocab = model["vocab"]
    pre_tokenizer_json = j.get("pre_tokenizer") or {}
    normalizer = (j.get("normalizer") or {}).get("type")
    if any(c not in vocab for c in BYTE_OF):
        missing = next(b for c, b in BYTE_OF.items() if c not in vocab)
        die(f"{name} is not a byte-level BPE: no token for byte 0x{missing:02x}; choose another tokenizer")
    if _adds_prefix_space(pre_tokenizer_json):
        die(f"{name} puts a space before every text; set add_prefix_space to false in the file")
    special = [text for text, t in added.items() if t.get("special")]
    if eot_text is None:
        eot_text = next((text for text in EOT_TOKENS if text in special), None)
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

    def as_bytes(text):
        return (
            bytes(BYTE_OF[c] for c in text)
            if text not in added and all(c in BYTE_OF for c in text)
            else text.encode()
        )

    pieces, ranks = [b""] * (max(ids.values()) + 1), [-1] * (max(ids.values()) + 1)
    for text, i in ids.items():
        pieces[i] = as_bytes(text)
    rank_of = {}
    for rank, (a, b) in enumerate(merges):
        if a + b not in vocab:
            die(f"{name} merges {a!r} and {b!r} to a token that it does not have; repair the file")
        if ranks[vocab[a + b]] < 0:
            ranks[vocab[a + b]] = rank
        rank_of.setdefault((as_bytes(a), as_bytes(b)), rank)
    if model.get("dropout"):  # dropout would make the tokens random
        model["dropout"] = None
        source = json.dumps(j)
    ignore_merges = bool(model.get("ignore_merges"))
    must_merge = [
        i
        for text, i in vocab.items()
        if text not in added and len(pieces[i]) > 1 and (ignore_merges or ranks[i] >= 0)
    ]
    # The list of merges is equivalent to "merge the pair that spells the token of lowest rank" if the bytes
    # of each token merge to that token. Only then do tiktoken's engine and the trainer give the same tokens.
    patterns = _patterns(pre_tokenizer_json)
    pattern = patterns[0] if len(patterns) == 1 and patterns[0] in HF_PATTERNS else None
    use_tiktoken = (
        pattern is not None
        and normalizer in (None, "NFC")
        and not model.get("byte_fallback")
        and not model.get("end_of_word_suffix")
        and not model.get("continuing_subword_prefix")
        and all(
            len(pieces[i]) <= 8 * MAX_TRAINED_TOKEN_BYTES and len(_merge(pieces[i], rank_of)) == 1
            for i in must_merge
        )
    )
    ordinary = [text for text, t in added.items() if not t.get("special")]
    return Vocabulary(
        pieces,
        ranks,
        added[eot_text]["id"],
        pattern,
        ignore_merges,
        hf_json=source,
        added=ordinary,
        nfc=normalizer == "NFC",
        use_tiktoken=use_tiktoken,
    )


def from_tiktoken(pattern, mergeable, special, eot_text, vocab_size):
    """Returns the Vocabulary of a tiktoken encoding.

    Args:
        pattern: regular expression of the pre-tokenizer.
        mergeable: {bytes: rank}; a rank is also the id.
        special: {text: id} of the special tokens.
        eot_text: the end-of-text token, one of `special`.
        vocab_size: number of ids.
    """
    pieces, ranks = [b""] * vocab_size, [-1] * vocab_size
    for piece, i in mergeable.items():
        pieces[i], ranks[i] = piece, i if len(piece) > 1 else -1
    for text, i in special.items():
        pieces[i] = text.encode()
    return Vocabulary(pieces, ranks, special[eot_text], pattern, ignore_merges=True)


def _from_tiktoken_name(name, eot_text):
    try:
        e = tiktoken.get_encoding(name)
    except ValueError:
        die(
            f"--tokenizer {name}: neither a file nor a tiktoken vocabulary; tiktoken has "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    except Exception as error:  # whatever the network library raises
        die(f"cannot load tiktoken's vocabulary {name}: {one_line(error)}; tiktoken downloads it once")
    special = e._special_tokens
    eot_text = eot_text or next((text for text in EOT_TOKENS if text in special), None)
    if eot_text not in special:
        die(
            f"tiktoken's vocabulary {name} has no end-of-text token {eot_text or 'that is known'}; name one "
            f"with --eot (its special tokens: {', '.join(special) or 'none'})"
        )
    return from_tiktoken(e._pat_str, e._mergeable_ranks, special, eot_text, e.n_vocab)


def _from_tiktoken_file(lines, name, eot_text):
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
        known.pattern, mergeable, {known.eot_text: known.eot_id}, known.eot_text, known.vocab_size
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


def load(name, eot_text):
    """Returns a Vocabulary.

    Args:
        name: a tokenizer.json, a folder with one, a tiktoken file, or the name of a tiktoken vocabulary.
        eot_text: the end-of-text token; None takes the first of EOT_TOKENS that the tokenizer has.
    """
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if os.sep in name or name.endswith((".json", ".tiktoken", ".model")):
            die(f"cannot read tokenizer {path}: no such file")
        return _from_tiktoken_name(name, eot_text)
    content = read_input(path)
    if not content.strip():
        die(f"tokenizer {path} is empty; choose another")
    if content.lstrip()[:1] == b"{":
        try:
            with _without_stderr():
                return from_hf(content.decode("utf-8", "replace"), path, eot_text)
        except (SystemExit, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as e:  # whatever the libraries raise for a file that they cannot use
            die(f"{path} is not a valid tokenizer.json: {one_line(e)}")
    return _from_tiktoken_file(content.splitlines(), path, eot_text)


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

    t.train_from_iterator(
        parts(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=EOT_TOKENS[:1],
            initial_alphabet=alphabet,
            max_token_length=MAX_TRAINED_TOKEN_BYTES,
            show_progress=False,
        ),
    )
    return from_hf(t.to_str(pretty=True), "the trained tokenizer", None)
