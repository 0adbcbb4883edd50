"""Reads and writes the trainers' checkpoints (llmc/checkpoint.h), one piece of a tensor at a time."""

import os
import struct
from collections import namedtuple

import numpy as np
from output import Output
from shards import create_file, die, open_input, report_output_errors, sync_folder

MAGIC = 0x54504B4341534E0A
VERSION = 4  # versions 1 to 3 can be read, too
HEADER_BYTES = 4096
CHUNK_BYTES = 1 << 20  # bytes per checksum
CHUNK_FLOATS = CHUNK_BYTES // 4
BATCH_CHUNKS = 256  # chunks whose checksums are computed together
TRAIN_STATE_FIELDS = 9  # before TrainState's member `data`
SEQ_LEN_FIELD = 6
NSA, FULL, WINDOW = 0, 1, 2
ATTN_NAMES = ("nsa", "full", "window")
PHI_MEAN, PHI_LINEAR = 0, 1
NSA_TENSORS = ("wgate", "bgate", "phi_wk", "phi_pe", "phi_wv")

# The model's fields in the order of the header: name and range (model_fields in llmc/config.h).
FIELDS = {
    "vocab": (1, 1 << 30),
    "padded-vocab": (1, 1 << 30),
    "layers": (1, 10000),
    "channels": (1, 1 << 20),
    "hidden": (1, 1 << 24),
    "attn": (0, 2),
    "heads": (1, 65536),
    "kv-heads": (1, 65536),
    "head-dim": (2, 512),
    "tied": (0, 1),
    "qkv-bias": (0, 1),
    "qk-norm": (0, 1),
    "norm-eps": (1e-20, 1),
    "theta": (1, 1e15),
    "rope-factor": (0, 1e6),
    "rope-low-freq": (0, 1e6),
    "rope-high-freq": (0, 1e6),
    "rope-original-len": (1, 1e12),
    "cmp-len": (1, 65536),
    "cmp-stride": (1, 65536),
    "block": (16, 1 << 20),
    "topk": (1, 4096),
    "init-blocks": (0, 1 << 20),
    "local-blocks": (0, 1 << 20),
    "window": (1, 1 << 30),
    "phi": (0, 1),
    "gate-per-token": (0, 1),
    "scale": (0, 1e6),
    "full-every": (0, 10000),
}
REAL_FIELDS = ("norm-eps", "theta", "rope-factor", "rope-low-freq", "rope-high-freq", "scale")

# A tensor of the model. layer is -1 outside the layers; a vector has 1 row.
Tensor = namedtuple("Tensor", "name layer rows cols")


def padded_vocab(vocab):
    """Returns the rows of wte and lm_head: vocab rounded up to a multiple of 128."""
    return (vocab + 127) // 128 * 128


def num_fields(version):
    """Returns how many of FIELDS a checkpoint of this version has; the others are 0 in its model."""
    return len(FIELDS) if version >= 4 else list(FIELDS).index("full-every")


def is_nsa(model, layer):
    """Returns whether a layer has native sparse attention: no layer that full-every makes full has."""
    every = model["full-every"]
    return model["attn"] == NSA and not (every and (layer + 1) % every == 0)


def num_gate_logits(model):
    return 3 if model["gate-per-token"] else 3 * model["heads"]


def gate_bias_size(model):
    """Returns the elements of bgate: num_gate_logits, rounded up to a multiple of 8."""
    return (num_gate_logits(model) + 7) // 8 * 8


def check_field(field, value, name):
    """Dies with one line that begins with `name` if no model can have this value of a field."""
    low, high = FIELDS[field]
    if not low <= value <= high:
        die(f"{name}: {field} {value:.12g}: must be from {low:g} to {high:g}")
    if field not in REAL_FIELDS and value != int(value):
        die(f"{name}: {field} {value:.12g}: must be a whole number")


def check_model(model, name):
    """Dies with one line that begins with `name` if no trainer could run the model (config_check in
    llmc/config.h, fsa_config_check)."""

    def need(condition, text):
        if not condition:
            die(f"{name}: {text}")

    for field in FIELDS:
        check_field(field, model[field], name)
    m = {key.replace("-", "_"): value for key, value in model.items()}
    need(
        m["padded_vocab"] % 128 == 0 and m["padded_vocab"] >= m["vocab"],
        f"padded-vocab {m['padded_vocab']}: must be a multiple of 128 and at least vocab {m['vocab']}",
    )
    heads, kv_heads = m["heads"], m["kv_heads"]
    need(heads % kv_heads == 0, f"heads {heads}: must be a multiple of kv-heads {kv_heads}")
    need(heads // kv_heads <= 16, f"heads {heads}: must be at most 16 times kv-heads {kv_heads}")
    need(m["head_dim"] % 2 == 0, f"head-dim {m['head_dim']}: must be even")
    need(
        m["rope_factor"] == 0 or m["rope_factor"] >= 1,
        f"rope-factor {m['rope_factor']:g}: must be 0 (no scaling) or at least 1",
    )
    need(
        m["rope_factor"] == 0 or 0 < m["rope_low_freq"] < m["rope_high_freq"],
        f"rope-low-freq {m['rope_low_freq']:g}: must be above 0 and below "
        f"rope-high-freq {m['rope_high_freq']:g}",
    )
    every, layers = m["full_every"], m["layers"]
    need(
        every == 0 or m["attn"] != FULL,
        f"full-every {every}: with attn full all layers have full attention; it must be 0",
    )
    need(
        every == 0 or 2 <= every <= layers,
        f"full-every {every}: must be 0 (off), or from 2 to layers {layers}",
    )
    length, stride, block = m["cmp_len"], m["cmp_stride"], m["block"]
    need(block % 16 == 0, f"block {block}: must be a multiple of 16")
    need(length % stride == 0, f"cmp-stride {stride}: must divide cmp-len {length}")
    need(block % stride == 0, f"cmp-stride {stride}: must divide block {block}")
    need(length <= block, f"cmp-len {length}: must be at most block {block}")
    need(
        m["topk"] >= m["init_blocks"] + m["local_blocks"],
        f"topk {m['topk']}: must be at least init-blocks {m['init_blocks']} + "
        f"local-blocks {m['local_blocks']}",
    )


def param_table(model, version=VERSION):
    """Returns the Tensors of a model in the order in which a checkpoint of this version has them (param_table
    in llmc/config.h): in version 1, wgate is right before wo."""
    channels, d, heads, kv_heads = (model[f] for f in ("channels", "head-dim", "heads", "kv-heads"))
    qkv, window_rows = (heads + 2 * kv_heads) * d, kv_heads * model["cmp-len"]
    table = [Tensor("wte", -1, model["padded-vocab"], channels)]
    for layer in range(model["layers"]):
        nsa = is_nsa(model, layer)

        def add(name, rows, cols, layer=layer):
            table.append(Tensor(name, layer, rows, cols))

        add("ln1", 1, channels)
        add("wqkv", qkv, channels)
        if nsa and version > 1:
            add("wgate", num_gate_logits(model), channels)
        if model["qkv-bias"]:
            add("bqkv", 1, qkv)
        if nsa:
            add("bgate", 1, gate_bias_size(model))
        if model["qk-norm"]:
            add("qnorm", 1, d)
            add("knorm", 1, d)
        if nsa and model["phi"] == PHI_LINEAR:
            add("phi_wk", window_rows * d, d)
            add("phi_pe", window_rows, d)
            add("phi_wv", window_rows * d, d)
        if nsa and version == 1:
            add("wgate", num_gate_logits(model), channels)
        add("wo", channels, heads * d)
        add("ln2", 1, channels)
        add("wgu", 2 * model["hidden"], channels)
        add("wdown", channels, model["hidden"])
    table.append(Tensor("lnf", -1, 1, channels))
    if not model["tied"]:
        table.append(Tensor("lm_head", -1, model["padded-vocab"], channels))
    return table


# ----------------------------------------------------------------------------
# Checksums

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEPS = 32  # steps whose words are transposed together


def _mix(z):
    """rng_mix of llmc/rand.h, of an int."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def checksums(chunks, seeds):
    """Returns the checksums (`checksum` in llmc/checkpoint.h) of chunks of equal length.

    Each chunk's checksum is a chain of steps of 32 bytes. NumPy does one step of all chunks at a time.

    Args:
        chunks: uint8 [number, bytes].
        seeds: the seed of each chunk, [number] ints.
    """
    number, size = chunks.shape
    steps = size // 32
    lane = np.array([_mix((s + k + 1) & _MASK) for s in seeds for k in range(4)], np.uint64)
    words = chunks[:, : 32 * steps].view("<u8").reshape(number, steps, 4)
    golden, shift = np.uint64(_GOLDEN), (np.uint64(29), np.uint64(35))
    high = np.empty_like(lane)
    # Rows that are a power of two apart would share few sets of the cache: rows of the copy are not.
    rows = np.empty((number, _STEPS + 1, 4), np.uint64)
    block = np.empty((_STEPS, number, 4), np.uint64)
    for begin in range(0, steps, _STEPS):
        count = min(_STEPS, steps - begin)
        rows[:, :count] = words[:, begin : begin + count]
        block[:count] = rows[:, :count].transpose(1, 0, 2)
        for word in block[:count].reshape(count, 4 * number):
            np.bitwise_xor(lane, word, out=lane)
            np.multiply(lane, golden, out=lane)
            np.left_shift(lane, shift[0], out=high)
            np.right_shift(lane, shift[1], out=lane)
            np.bitwise_or(lane, high, out=lane)
    sums = []
    for i, seed in enumerate(seeds):
        h = _mix(seed ^ size)
        for k in range(4):
            h = (_mix(h ^ int(lane[4 * i + k])) + _GOLDEN) & _MASK
        tail = chunks[i, 32 * steps :].tobytes()
        for begin in range(0, len(tail), 8):
            word = int.from_bytes(tail[begin : begin + 8], "little")
            h = (_mix(h ^ word) + _GOLDEN) & _MASK
        sums.append(h)
    return sums


def checksum(data, seed=0):
    return checksums(np.frombuffer(data, np.uint8)[None], [seed])[0]


def _chunk_sums(data, first_chunk):
    """Returns the checksums of the parameters data [floats], which begin with chunk number first_chunk."""
    whole = data.size // CHUNK_FLOATS
    chunks = data[: whole * CHUNK_FLOATS].view(np.uint8).reshape(whole, CHUNK_BYTES)
    sums = checksums(chunks, range(first_chunk, first_chunk + whole)) if whole else []
    rest = data[whole * CHUNK_FLOATS :]
    if rest.size:
        sums += checksums(rest.view(np.uint8)[None], [first_chunk + whole])
    return sums


# ----------------------------------------------------------------------------
# Files


class Writer:
    """Writes a checkpoint of weights alone: path.tmp first, which becomes `path` once it is whole. Used with
    `with`: an error removes path.tmp.

    Args:
        path: of the checkpoint.
        model: {field: value}, all of FIELDS.
        seq_len: default sequence length of the trainers.
    """

    def __init__(self, path, model, seq_len):
        self.path, self.model = path, model
        self.total = sum(t.rows * t.cols for t in param_table(model))
        self.buffer = np.empty(min(BATCH_CHUNKS * CHUNK_FLOATS, self.total), "<f4")
        self.used = self.written = 0  # floats in the buffer, and in the file
        self.sums = []
        state = [0] * TRAIN_STATE_FIELDS
        state[SEQ_LEN_FIELD] = seq_len
        header = struct.pack("<6q", MAGIC, VERSION, self.total, len(FIELDS), TRAIN_STATE_FIELDS, 1)
        header = header.ljust(64, b"\0")
        header += struct.pack(f"<{len(FIELDS)}d", *(model[field] for field in FIELDS))
        header += struct.pack(f"<{len(state)}q", *state)
        header = header.ljust(HEADER_BYTES - 8, b"\0")
        self.header = header + struct.pack("<Q", checksum(header))

    def __enter__(self):
        with report_output_errors(self.path):
            self.file = create_file(self.path + ".tmp")
        self.output = Output(self.file, self.path, 4 * self.total)
        self.output.write(self.header)
        return self

    def write(self, values):
        """Appends values, which are the next in the order of param_table, as fp32."""
        values = values.reshape(-1)
        while values.size:
            count = min(values.size, self.buffer.size - self.used)
            self.buffer[self.used : self.used + count] = values[:count]
            self.used += count
            values = values[count:]
            if self.used == self.buffer.size:
                self._flush()

    def _flush(self):
        data = self.buffer[: self.used]
        self.sums += _chunk_sums(data, self.written // CHUNK_FLOATS)
        self.output.write(data)
        self.written += self.used
        self.used = 0

    def __exit__(self, error, *_):
        try:
            if error is None:
                self._flush()
                assert self.written == self.total
                self.output.write(struct.pack(f"<{len(self.sums)}Q", *self.sums))
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.rename(self.path + ".tmp", self.path)
                sync_folder(os.path.dirname(self.path) or ".")
        finally:
            self.file.close()
            if os.path.lexists(self.path + ".tmp"):
                os.unlink(self.path + ".tmp")


class Reader:
    """Reads the parameters of a checkpoint of any version, and verifies their checksums.

    Attributes:
        model: {field: value}.
        seq_len: tokens per training sequence; 0 if unknown.
        table: the Tensors of the model, in the order of the file.
    """

    def __init__(self, path):
        self.path = path
        self.file = open_input(path)
        header = self.file.read(HEADER_BYTES)
        size = os.fstat(self.file.fileno()).st_size
        if len(header) < 16 or header[:8] != struct.pack("<q", MAGIC):
            die(f"{path}: not a checkpoint; give a ckpt_*.bin")
        if len(header) < HEADER_BYTES:
            die(f"{path}: truncated: {size} bytes, less than its header; choose another checkpoint")
        _, version, n, fields, num_state, arrays = struct.unpack("<6q", header[:48])
        if struct.unpack("<Q", header[-8:])[0] != checksum(header[:-8]):
            die(f"{path}: damaged: its header has a wrong checksum; choose another checkpoint")
        if not 1 <= version <= VERSION or (fields, num_state) != (num_fields(version), TRAIN_STATE_FIELDS):
            die(f"{path}: checkpoint version {version}, this program reads versions 1 to {VERSION}")
        values = struct.unpack(f"<{fields}d", header[64 : 64 + 8 * fields])
        values += (0.0,) * (len(FIELDS) - fields)
        self.model = {
            field: value if field in REAL_FIELDS or not value.is_integer() else int(value)
            for field, value in zip(FIELDS, values)
        }
        check_model(self.model, path)
        state = struct.unpack_from(f"<{num_state}q", header, 64 + 8 * fields)
        self.seq_len = state[SEQ_LEN_FIELD]
        self.table = param_table(self.model, version)
        self.has_gate_bias = version >= 3
        self.total = sum(t.rows * t.cols for t in self.table if self._is_stored(t))
        arrays = arrays if version >= 3 else 3
        if n != self.total:
            die(f"{path}: {n} parameters found, its model has {self.total}; choose another checkpoint")
        if arrays not in (1, 3):
            die(f"{path}: {arrays} arrays found, 1 or 3 expected; choose another checkpoint")
        chunks = (n + CHUNK_FLOATS - 1) // CHUNK_FLOATS
        self.sums_offset = HEADER_BYTES + 4 * n * arrays
        expected = self.sums_offset + 8 * chunks * arrays
        if size != expected:
            what = "truncated" if size < expected else "too long"
            die(f"{path}: {what}: {size} bytes found, {expected} expected; choose another checkpoint")
        self.file.seek(self.sums_offset)
        self.sums = np.fromfile(self.file, "<u8", chunks)
        self.batches, self.left = self._batches(), np.empty(0, "<f4")

    def _is_stored(self, tensor):
        return self.has_gate_bias or tensor.name != "bgate"

    def read(self, tensor):
        """Yields the elements of the next tensor of the table, in pieces whose checksums are verified. The next
        piece can take the memory of a piece."""
        count = tensor.rows * tensor.cols
        if not self._is_stored(tensor):
            yield np.zeros(count, "<f4")  # a gate of an older version has no bias
            return
        while count > 0:
            if not self.left.size:
                self.left = next(self.batches)
            piece, self.left = self.left[:count], self.left[count:]
            count -= piece.size
            yield piece

    def _batches(self):
        """Yields the verified parameters, BATCH_CHUNKS chunks at a time, in the same memory."""
        buffer = np.empty(min(BATCH_CHUNKS * CHUNK_FLOATS, self.total), "<f4")
        for first in range(0, len(self.sums), BATCH_CHUNKS):
            begin = first * CHUNK_FLOATS
            count = min(BATCH_CHUNKS * CHUNK_FLOATS, self.total - begin)
            self.file.seek(HEADER_BYTES + 4 * begin)
            data = buffer[:count]
            if self.file.readinto(data) != data.nbytes:
                die(f"{self.path}: cannot read the checkpoint: it is truncated; choose another")
            for i, value in enumerate(_chunk_sums(data, first)):
                if value != self.sums[first + i]:
                    die(
                        f"{self.path}: damaged: wrong checksum of the parameters in the 1 MiB chunk at byte "
                        f"{HEADER_BYTES + (first + i) * CHUNK_BYTES}; choose another checkpoint"
                    )
            yield data
