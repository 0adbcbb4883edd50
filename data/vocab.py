"""What token ids mean: byte-level BPE vocabularies out of Hugging Face's tokenizer.json or tiktoken's files,
or freshly trained; from text to ids, and to the tokenizer.bin that the trainer reads (data/README.md)."""

import base64
import json
import os
import re
import struct
import unicodedata
from collections import namedtuple

import numpy as np
import tiktoken
import tokenizers

from shards import die, first_line

ENDS = ["<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|im_end|>"]

# How text is split into stretches that merges do not cross: the ways that llmc/tokenizer.h knows, by the
# number they have there, with the regular expressions that say the same.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = [
    [
        _GPT2,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ],
    [_LLAMA3],
    [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    [_CL100K],
]
# Those that mean the same to tokenizers' engine of regular expressions and to tiktoken's.
HF_PATTERNS = [_GPT2, SPLITS[0][2], _LLAMA3, SPLITS[2][0]]

# tiktoken's files list tokens alone. Of those in use the number of tokens tells the rest: the way of
# splitting, the end-of-text token, and the size of the vocabulary with its special tokens.
TiktokenFile = namedtuple("TiktokenFile", "pattern eot_text eot_id vocab_size")
TIKTOKEN_FILES = {
    50256: TiktokenFile(SPLITS[0][1], "<|endoftext|>", 50256, 50257),  # GPT-2
    100256: TiktokenFile(_CL100K, "<|endoftext|>", 100257, 100277),  # cl100k_base: GPT-4
    128000: TiktokenFile(_LLAMA3, "<|end_of_text|>", 128001, 128256),  # Llama 3
    151643: TiktokenFile(SPLITS[2][0], "<|endoftext|>", 151643, 151646),  # Qwen
}


def _byte_characters():
    """GPT-2's way to write bytes as printable characters: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


LONGEST = 128  # bytes of a trained token; a line of dashes needs no more
_LONG_RUN = re.compile(r"\S{512}|\s{512}")  # training takes time quadratic in a word

BYTE_OF = _byte_characters()
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how Python's decoder escapes single bytes


def _merged(piece, rank):
    """The tokens of one stretch: single bytes, of which the adjacent pair with the lowest rank is merged
    until no pair has one. `rank` maps pairs of pieces to ranks."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        ranks = [rank.get(pair, 1 << 62) for pair in zip(parts, parts[1:])]
        best = min(ranks)
        if best == 1 << 62:
            break
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class Vocabulary:
    """pieces[id] is a token's bytes (b"" for an id without a token), ranks[id] its merge priority or -1, eot
    the end-of-text token's id; `split` is an index of SPLITS or None; `whole`: a stretch that is itself a
    token is taken as it is; `note` says, where it is not None, what prompts do not reproduce exactly."""

    def __init__(self, pieces, ranks, eot, pattern, whole, hf_json=None, added=(), nfc=False, fast=True):
        self.pieces, self.ranks, self.eot, self.pattern, self.whole = pieces, ranks, eot, pattern, whole
        self.hf_json, self.added, self.nfc = hf_json, list(added), nfc
        self.split = next((i for i, s in enumerate(SPLITS) if pattern in s), None)
        self.token_type = np.dtype("<u2") if len(pieces) <= 65536 else np.dtype("<u4")
        self.byte_id = np.full(256, -1, np.int64)
        for i in range(len(pieces) - 1, -1, -1):  # of equal pieces the first counts
            if len(pieces[i]) == 1 and i != eot:
                self.byte_id[pieces[i][0]] = i
        if (self.byte_id < 0).any():
            lacking = int(np.argmin(self.byte_id))
            die(f"this tokenizer is no byte-level BPE: it has no token for byte 0x{lacking:02x}")
        self.note = None
        if self.split is None:
            self.note = (
                "splits text in a way that the trainer does not know: -prompt is split as Llama 3 does"
            )
        elif not fast:
            self.note = "normalizes text or merges in its own way: the tokens of -prompt can differ"
        elif added or nfc:
            self.note = "normalizes to NFC or finds added tokens in text, which -prompt does not"
        self.use_fast, self.use_hf = fast, hf_json is not None and (not fast or bool(added))
        self._make_engines()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("fast", "hf", "fast_ids")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_engines()

    def _make_engines(self):
        # tiktoken's engine is seven times as fast as tokenizers' on the same vocabulary
        self.fast = self.hf = None
        if self.use_fast:
            self._make_fast()
        if self.use_hf:
            self._make_hf()

    def _make_fast(self):
        bytes_first = {bytes([b]): b for b in range(256)}
        merged = [i for i in range(len(self.pieces)) if self.ranks[i] >= 0 and len(self.pieces[i]) > 1]
        merged.sort(key=lambda i: (self.ranks[i], i))
        ranks = dict(bytes_first)
        ids = [*self.byte_id]
        for i in merged:
            if ranks.setdefault(self.pieces[i], len(ids)) == len(ids):
                ids.append(i)
        self.fast = tiktoken.Encoding(
            "shards", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.fast_ids = np.array(ids, dtype=self.token_type)

    def _make_hf(self):
        self.hf = tokenizers.Tokenizer.from_str(self.hf_json)
        self.hf.no_padding()
        self.hf.no_truncation()
        self.hf.encode_special_tokens = True  # "<|endoftext|>" spelled out in a text is text

    def _encode_text(self, text):
        if self.fast is None or any(word in text for word in self.added):
            encoding = self.hf.encode_batch_fast([text], add_special_tokens=False)[0]
            return np.array(encoding.ids, dtype=self.token_type)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        return self.fast_ids[self.fast.encode_to_numpy(text, disallowed_special=())]

    def encode(self, data, ends):
        """The tokens of some bytes, and end-of-text where the document ends with them. Bytes that are no
        UTF-8 become their own single-byte tokens."""
        parts = [np.empty(0, self.token_type)]
        for i, part in enumerate(_NOT_UTF8.split(data.decode("utf-8", "surrogateescape"))):
            if i % 2 == 0 and part:
                parts.append(self._encode_text(part))
            elif part:
                parts.append(self.byte_id[[ord(c) - 0xDC00 for c in part]].astype(self.token_type))
        if ends:
            parts.append(np.array([self.eot], self.token_type))
        return np.concatenate(parts)

    def tokenizer_bin(self):
        """The bytes of tokenizer.bin, kind 2 (llmc/tokenizer.h)."""
        header = np.zeros(256, "<i4")
        split = 1 if self.split is None else self.split
        header[:7] = [20260801, 1, len(self.pieces), self.eot, 2, split, int(self.whole)]
        out = [header.tobytes()]
        for piece, rank in zip(self.pieces, self.ranks):
            if len(piece) > 65535:
                die(f"a token of {len(piece)} bytes: tokenizer.bin holds at most 65,535")
            out.append(struct.pack("<H", len(piece)) + piece + struct.pack("<i", rank))
        return b"".join(out)


def _patterns(part):
    """The regular expressions of a tokenizer.json's pre_tokenizer, None for what cannot be read as one."""
    kind = (part or {}).get("type")
    if kind == "Sequence":
        return [p for child in part["pretokenizers"] for p in _patterns(child)]
    if kind == "ByteLevel":
        return [_GPT2] if part.get("use_regex", True) else []
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return [part["pattern"].get("Regex")]
    return [None]


def _prefix_space(part):
    return (
        any(_prefix_space(child) for child in part.get("pretokenizers", []))
        if part.get("type") == "Sequence"
        else part.get("type") == "ByteLevel" and part.get("add_prefix_space", True)
    )


def from_hf(source, name, eot_text):
    """From the text of a tokenizer.json; `eot_text` names the end-of-text token, None looks for a usual
    one."""
    try:
        j = json.loads(source)
        model = j["model"]
        if model.get("type", "BPE") != "BPE":
            die(f"{name} is a {model['type']} tokenizer: a byte-level BPE is needed")
        vocab, added = model["vocab"], {t["content"]: t for t in j.get("added_tokens", [])}
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        ids = {**vocab, **{t["content"]: t["id"] for t in j.get("added_tokens", [])}}
        before = j.get("pre_tokenizer") or {}
        normalizer = (j.get("normalizer") or {}).get("type")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"{name} is no tokenizer.json: {type(e).__name__}: {e}")
    if any(c not in vocab for c in BYTE_OF):
        lacking = next(b for c, b in BYTE_OF.items() if c not in vocab)
        die(
            f"{name} is no byte-level BPE: it has no token for byte 0x{lacking:02x}; choose another tokenizer"
        )
    if _prefix_space(before):
        die(f"{name} puts a space before every text (add_prefix_space): set that to false in the file")
    special = [text for text, t in added.items() if t.get("special")]
    if eot_text is None:
        eot_text = next((text for text in ENDS if text in special), None)
        if eot_text is None:
            die(
                f"{name} has no end-of-text token that is known: name one with --eot; its special tokens are "
                f"{', '.join(special[:12]) or 'none'}"
            )
    if eot_text not in added:
        die(f"{name} has no special token {eot_text!r} (--eot); it has {', '.join(special[:12]) or 'none'}")

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
            die(f"{name} merges {a!r} and {b!r} to a token that it does not have")
        if ranks[vocab[a + b]] < 0:
            ranks[vocab[a + b]] = rank
        rank_of.setdefault((as_bytes(a), as_bytes(b)), rank)
    if model.get("dropout"):  # tokens by chance are no shards to come back to
        model["dropout"] = None
        source = json.dumps(j)
    whole = bool(model.get("ignore_merges"))
    must_merge = [
        i
        for text, i in vocab.items()
        if text not in added and len(pieces[i]) > 1 and (whole or ranks[i] >= 0)
    ]
    # Where each token's own bytes merge to it, "merge the pair that spells the token of lowest rank" is the
    # same as this list of merges, and the fast engine and the trainer's may be used.
    patterns = _patterns(before)
    pattern = patterns[0] if len(patterns) == 1 and patterns[0] in HF_PATTERNS else None
    fast = (
        pattern is not None
        and normalizer in (None, "NFC")
        and not model.get("byte_fallback")
        and not model.get("end_of_word_suffix")
        and not model.get("continuing_subword_prefix")
        and all(len(pieces[i]) <= 8 * LONGEST and len(_merged(pieces[i], rank_of)) == 1 for i in must_merge)
    )
    ordinary = [text for text, t in added.items() if not t.get("special")]
    return Vocabulary(
        pieces,
        ranks,
        added[eot_text]["id"],
        pattern,
        whole,
        hf_json=source,
        added=ordinary,
        nfc=normalizer == "NFC",
        fast=fast,
    )


def from_tiktoken(pattern, mergeable, special, eot_text, vocab_size):
    """From tiktoken's parts: bytes to ranks, which are ids too, and special tokens to ids."""
    pieces, ranks = [b""] * vocab_size, [-1] * vocab_size
    for piece, i in mergeable.items():
        pieces[i], ranks[i] = piece, i if len(piece) > 1 else -1
    for text, i in special.items():
        pieces[i] = text.encode()
    return Vocabulary(pieces, ranks, special[eot_text], pattern, whole=True)


def _from_tiktoken_name(name, eot_text):
    try:
        e = tiktoken.get_encoding(name)
    except ValueError:
        die(
            f"there is no tokenizer file and no tiktoken vocabulary {name!r}: tiktoken has "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    except Exception as error:  # whatever the network library raises
        die(f"cannot get tiktoken's vocabulary {name}: {first_line(error)}")
    special = e._special_tokens
    eot_text = eot_text or next((text for text in ENDS if text in special), None)
    if eot_text not in special:
        die(
            f"tiktoken's vocabulary {name} has no end-of-text token {eot_text or 'that is known'}: name "
            f"one with --eot; its special tokens are {', '.join(special) or 'none'}"
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
                f"{name} is neither a tokenizer.json nor a tiktoken vocabulary: line {number} is not a "
                f"token in base64 and its rank"
            )
    n = len(mergeable)
    if n not in TIKTOKEN_FILES or sorted(mergeable.values()) != list(range(n)):
        die(
            f"{name} has {n} tokens: how text is split is known for tiktoken files of "
            f"{', '.join(map(str, TIKTOKEN_FILES))}; give the vocabulary's name or a tokenizer.json instead"
        )
    known = TIKTOKEN_FILES[n]
    if eot_text not in (None, known.eot_text):
        die(f"{name} has no special token {eot_text!r} (--eot): its end-of-text token is {known.eot_text}")
    return from_tiktoken(
        known.pattern, mergeable, {known.eot_text: known.eot_id}, known.eot_text, known.vocab_size
    )


def load(name, eot_text):
    """From a file (tokenizer.json, or a tiktoken vocabulary), a folder with a tokenizer.json, or tiktoken's
    name for a vocabulary."""
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if os.sep in name or name.endswith((".json", ".tiktoken", ".model")):
            die(f"cannot read tokenizer {path}: no such file")
        return _from_tiktoken_name(name, eot_text)
    with open(path, "rb") as f:
        content = f.read()
    if not content.strip():
        die(f"tokenizer {path} is empty")
    if content.lstrip()[:1] == b"{":
        return from_hf(content.decode("utf-8", "replace"), path, eot_text)
    return _from_tiktoken_file(content.splitlines(), path, eot_text)


def train(texts, vocab_size):
    """A byte-level BPE of `vocab_size` tokens with GPT-2's splitting, trained on an iterator of bytes."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())

    def parts():
        for text in texts:
            text, start = text.decode("utf-8", "ignore"), 0
            for run in _LONG_RUN.finditer(text):
                yield text[start : run.end()]
                start = run.end()
            yield text[start:]

    t.train_from_iterator(
        parts(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=ENDS[:1],
            initial_alphabet=alphabet,
            max_token_length=LONGEST,
            show_progress=False,
        ),
    )
    return from_hf(t.to_str(pretty=True), "the trained tokenizer", None)
