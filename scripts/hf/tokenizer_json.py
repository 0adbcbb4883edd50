"""Makes the tokenizer files of a Hugging Face folder from tokenizer.bin (llmc/tokenizer.h)."""

import json
import struct

import numpy as np
import vocab
from shards import die

BYTES, WORDS = 0, 1
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CHARACTER_OF = {b: c for c, b in vocab.BYTE_OF.items()}


class _TokenizerBin:
    """The content of a tokenizer.bin. Version 1 has no flags: there, a token that no merge makes is
    special."""

    def __init__(self, data, path):
        self.kind = None
        try:
            self._parse(data)
        except (struct.error, ValueError, IndexError):
            die(f"{path}: not a valid tokenizer.bin; repair it, or name a tokenizer with --tokenizer")

    def _parse(self, data):
        header = struct.unpack_from("<256i", data)
        if header[0] != 20260801 or header[1] not in (1, 2) or not 0 < header[2] <= vocab.MAX_VOCAB_SIZE:
            raise ValueError
        version, size, self.eot, self.kind, self.pretokenizer, self.ignore_merges = header[1:7]
        self.bos, self.unknown, self.fuse_unknown, num_merges, self.prefix, self.split_spaces, num_eos = (
            header[7:14]
        )
        self.eos = list(header[14 : 14 + num_eos])
        ranked, position = self.kind >= vocab.BPE, 1024
        self.pieces, self.ranks, self.flags = [], [], []
        for _ in range(size):
            (length,) = struct.unpack_from("<H", data, position)
            position += 2
            self.pieces.append(bytes(data[position : position + length]))
            position += length
            self.ranks.append(struct.unpack_from("<i", data, position)[0] if ranked else -1)
            position += 4 * ranked
            self.flags.append(data[position] if version == 2 else None)
            position += version == 2
        merges = np.frombuffer(data, "<i4", 3 * num_merges if version == 2 else 0, position)
        self.merges = merges.reshape(-1, 3).tolist()
        if position + merges.nbytes != len(data):
            raise ValueError
        if version == 1:
            self.bos, self.unknown, self.fuse_unknown = self.eot, -1, 0
            self.eos = [self.eot] if self.eot >= 0 else []
            special = vocab.TOKEN_ADDED | vocab.TOKEN_SPECIAL
            self.flags = [
                vocab.TOKEN_VOCAB if i != self.eot and (len(piece) == 1 or rank >= 0) else special
                for i, (piece, rank) in enumerate(zip(self.pieces, self.ranks))
            ]
        ids = [*self.eos, *(i for merge in self.merges for i in merge)]
        if (
            not all(0 <= i < size for i in ids)
            or not all(-1 <= i < size for i in (self.eot, self.bos, self.unknown))
            or self.kind not in (BYTES, WORDS, vocab.BPE, vocab.SENTENCEPIECE)
            or not 0 <= self.pretokenizer < len(vocab.PATTERNS)
        ):
            raise ValueError

    def is_added(self, i):
        return self.flags[i] & vocab.TOKEN_ADDED

    def text(self, i):
        """Returns the text of a token in tokenizer.json."""
        piece, flags = self.pieces[i], self.flags[i]
        if flags & vocab.TOKEN_ADDED:
            text = piece.decode("utf-8", "replace")
            return text.replace(" ", vocab.METASPACE) if flags & vocab.TOKEN_METASPACE else text
        if self.kind != vocab.SENTENCEPIECE:
            return "".join(_CHARACTER_OF[b] for b in piece)
        if flags & vocab.TOKEN_BYTE:
            return f"<0x{piece[0]:02X}>"
        return piece.decode("utf-8", "replace").replace(" ", vocab.METASPACE)

    def merges_by_rank(self):
        """Returns the merges [(left, right)] of a file that has the ranks of tokens alone: a token is made of
        the two parts to which the tokens of lower rank merge its bytes."""
        rank = {
            p: r for p, r, f in zip(self.pieces, self.ranks, self.flags) if r >= 0 and f & vocab.TOKEN_VOCAB
        }
        merges = []
        for piece, r in sorted(rank.items(), key=lambda item: item[1]):
            parts = [piece[i : i + 1] for i in range(len(piece))]
            while len(parts) > 2:
                ranks = [rank.get(a + b, 1 << 62) for a, b in zip(parts, parts[1:])]
                lowest = min(ranks)
                if lowest >= r:
                    break
                i = ranks.index(lowest)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append(tuple("".join(_CHARACTER_OF[b] for b in part) for part in parts))
        return merges


def _pre_tokenizer(t):
    if t.kind == BYTES:
        return {**_BYTE_LEVEL, "use_regex": False}
    if t.kind == vocab.SENTENCEPIECE:
        if t.prefix == vocab.PREFIX_ALWAYS:
            return None
        scheme = {vocab.PREFIX_UNLESS_SPACE: "always", vocab.PREFIX_FIRST: "first"}.get(t.prefix, "never")
        return {
            **{"type": "Metaspace", "replacement": vocab.METASPACE, "prepend_scheme": scheme},
            "split": bool(t.split_spaces),
        }
    if t.pretokenizer == 0:
        return _BYTE_LEVEL
    if t.pretokenizer == 4:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, _BYTE_LEVEL]}
    pattern = {"Regex": vocab.PATTERNS[t.pretokenizer][0]}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


def _decoder(t):
    if t.kind != vocab.SENTENCEPIECE:
        return _BYTE_LEVEL
    replace = {"type": "Replace", "pattern": {"String": vocab.METASPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parts = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": parts + [strip] * (t.prefix != vocab.PREFIX_NONE)}


def _normalizer(t):
    if t.kind != vocab.SENTENCEPIECE or t.prefix != vocab.PREFIX_ALWAYS:
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": vocab.METASPACE}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": vocab.METASPACE}, replace]}


def _added(t, i):
    flags = t.flags[i]
    return {
        **{"id": i, "content": t.text(i), "single_word": False, "lstrip": bool(flags & vocab.TOKEN_LSTRIP)},
        **{"rstrip": bool(flags & vocab.TOKEN_RSTRIP), "normalized": bool(flags & vocab.TOKEN_NORMALIZED)},
        "special": bool(flags & vocab.TOKEN_SPECIAL),
    }


def _bos_template(bos):
    """Returns the post_processor that puts the token `bos` before a text."""

    def part(kind, name, sequence):
        return {kind: {"id": name, "type_id": sequence}}

    return {
        "type": "TemplateProcessing",
        "single": [part("SpecialToken", bos[0], 0), part("Sequence", "A", 0)],
        "pair": [part("SpecialToken", bos[0], 0), part("Sequence", "A", 0), part("Sequence", "B", 1)],
        "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}},
    }


def from_bin(data, path):
    """Returns {name: content} of tokenizer.json, tokenizer_config.json and generation_config.json; {} for a
    tokenizer of words, because a tokenizer.json cannot have it.

    Args:
        data: content of a tokenizer.bin.
        path: its path, for messages.
    """
    t = _TokenizerBin(data, path)
    if t.kind == WORDS:
        return {}
    ids = [i for i, piece in enumerate(t.pieces) if piece]
    texts = {}
    for i in sorted(ids, key=lambda i: (bool(t.is_added(i)), i)):  # of equal texts, the ordinary token counts
        texts.setdefault(t.text(i), i)
    merges = [(t.text(left), t.text(right)) for left, right, _ in t.merges]
    if t.kind == vocab.BPE and not merges:
        merges = t.merges_by_rank()
    byte_fallback = any(flags & vocab.TOKEN_BYTE for flags in t.flags)
    model = {
        **{"type": "BPE", "dropout": None, "unk_token": t.text(t.unknown) if t.unknown >= 0 else None},
        **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": bool(t.fuse_unknown)},
        **{"byte_fallback": byte_fallback, "ignore_merges": bool(t.ignore_merges)},
        **{"vocab": texts, "merges": merges},
    }
    added = [_added(t, i) for i in ids if t.is_added(i) and texts[t.text(i)] == i]
    bos = (t.text(t.bos), t.bos) if t.bos >= 0 else None
    tokenizer = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added},
        **{"normalizer": _normalizer(t), "pre_tokenizer": _pre_tokenizer(t), "decoder": _decoder(t)},
        **{"post_processor": _bos_template(bos) if bos else None, "model": model},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    generation = {}
    if bos:
        config["bos_token"], generation["bos_token_id"] = bos
    if t.eos:
        config["eos_token"], generation["eos_token_id"] = t.text(t.eos[0]), t.eos
    contents = {
        **{"tokenizer.json": tokenizer, "tokenizer_config.json": config, "generation_config.json": generation}
    }
    return {
        name: (json.dumps(c, ensure_ascii=False, indent=2) + "\n").encode() for name, c in contents.items()
    }
