"""Reads and writes the safetensors files of a Hugging Face folder, one piece of a tensor at a time."""

import json
import math
import os
import struct
from collections import namedtuple

import ml_dtypes
import numpy as np
from output import Output
from shards import create_file, die, one_line, open_input, read_input, sync_folder

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_SHARD_BYTES = 5 * 10**9
PIECE_FLOATS = 1 << 16  # elements that are converted at a time: they fit in a core's cache
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_BYTES = {  # all types of the format; those that are not in DTYPES hold no weights that we can read
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8},
}

# Where a tensor is: file is open, begin and end are offsets in it.
Entry = namedtuple("Entry", "file path dtype shape begin end")


def _unique_keys(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def parse_json(content, path):
    """Returns the parsed JSON object of a file. Dies if it is not one."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as e:
        die(f"{path}: not valid JSON: {one_line(e)}; repair the file")
    if not isinstance(value, dict):
        die(f"{path}: not a JSON object; repair the file")
    return value


def _is_size(value):
    return type(value) is int and 0 <= value < 1 << 62


def _read_header(path):
    """Returns {name: Entry} of a safetensors file. Dies if its header is not valid: unknown types, sizes that
    differ from the shapes, tensors that overlap, gaps between them, or bytes that belong to none."""

    def need(condition, what):
        if not condition:
            die(f"{path} is not a valid safetensors file: {what}; download it again")

    file = open_input(path)
    size = os.fstat(file.fileno()).st_size
    need(size >= 8, f"{size} bytes, less than its header")
    (length,) = struct.unpack("<Q", file.read(8))
    need(length <= MAX_HEADER_BYTES, f"its header has {length} bytes, at most {MAX_HEADER_BYTES} possible")
    need(8 + length <= size, f"truncated: {size} bytes, less than its header of {length}")
    header = parse_json(file.read(length), f"{path}: the header")
    header.pop("__metadata__", None)
    entries, data_begin = {}, 8 + length
    for name, value in header.items():
        title = name[:80]
        need(isinstance(value, dict), f"{title}: no object")
        dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        need(isinstance(dtype, str) and dtype in DTYPE_BYTES, f"{title}: unknown dtype {str(dtype)[:20]}")
        need(
            isinstance(shape, list) and len(shape) <= 8 and all(_is_size(n) for n in shape),
            f"{title}: its shape is not a list of sizes",
        )
        need(
            isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(n) for n in offsets),
            f"{title}: its data_offsets are not two offsets",
        )
        begin, end = offsets
        need(
            end - begin == math.prod(shape) * DTYPE_BYTES[dtype],
            f"{title}: {end - begin} bytes for {dtype} of shape {shape}",
        )
        entries[name] = Entry(file, path, dtype, tuple(shape), data_begin + begin, data_begin + end)
    position = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        need(entry.begin == position, f"{name[:80]}: gap or overlap at byte {entry.begin}")
        position = entry.end
    need(position <= size, f"truncated: {size} bytes found, {position} expected")
    need(position >= size, f"too long: {size} bytes found, {position} expected")
    return entries


class Folder:
    """The tensors of a folder with model.safetensors, or with an index and shards.

    Attributes:
        shapes: {name: shape}.
    """

    def __init__(self, path):
        index, single = (os.path.join(path, f) for f in ("model.safetensors.index.json", "model.safetensors"))
        if os.path.exists(single):
            self.entries = _read_header(single)
        elif os.path.exists(index):
            self.entries = self._read_shards(path, index)
        else:
            files = [f for f in sorted(os.listdir(path)) if f.endswith((".bin", ".pt", ".pth", ".gguf"))]
            hint = f"; it has {files[0]}" if files else ""
            die(
                f"{path}: no model.safetensors and no model.safetensors.index.json{hint}; give a folder with "
                f"safetensors, or a GGUF file"
            )
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def _read_shards(self, path, index):
        files = parse_json(read_input(index), index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            die(f"{index}: weight_map is not an object of file names; repair the file")
        entries = {}
        for file in sorted(set(files.values())):
            if os.path.basename(file) != file or not file.endswith(".safetensors"):
                die(f"{index}: {file[:80]} is not the name of a safetensors file; repair the file")
            for name, entry in _read_header(os.path.join(path, file)).items():
                if name in entries:
                    die(f"{path}: both {entries[name].path} and {entry.path} have {name[:80]}; remove one")
                entries[name] = entry
        missing = next((name for name in files if name not in entries), None)
        if missing is not None:
            die(f"{path}: no tensor {missing[:80]} in {files[missing][:80]}, where the index expects it")
        return entries

    def dtype_error(self, name):
        """Returns why the tensor cannot be read, or None."""
        dtype = self.entries[name].dtype
        return None if dtype in DTYPES else f"dtype {dtype}; supported: {', '.join(DTYPES)}"

    def read(self, name):
        """Yields the fp32 values of a tensor in pieces of whole rows."""
        entry = self.entries[name]
        dtype, row = DTYPES[entry.dtype], math.prod(entry.shape[1:])
        step = max(1, PIECE_FLOATS // max(row, 1)) * row * dtype.itemsize
        for begin in range(entry.begin, entry.end, max(step, 1)):
            size = min(step, entry.end - begin)
            entry.file.seek(begin)
            data = entry.file.read(size)
            if len(data) != size:
                die(f"{entry.path}: truncated while it was read; download it again")
            yield np.frombuffer(data, dtype).astype(np.float32).reshape(-1, *entry.shape[1:])


# ----------------------------------------------------------------------------
# Writing


class FolderWriter:
    """Writes safetensors files of at most MAX_SHARD_BYTES each, unless one tensor is larger, and their index.

    Args:
        path: of the folder.
        tensors: [(name, shape)] in the order in which they are written.
        dtype: "F32" or "BF16".
    """

    def __init__(self, path, tensors, dtype):
        self.path, self.dtype = path, dtype
        self.rounded = self.count = 0  # values that the dtype rounds, of all values
        item = DTYPES[dtype].itemsize
        shards = [[]]
        shard_bytes = 0
        for name, shape in tensors:
            size = math.prod(shape) * item
            if shards[-1] and shard_bytes + size > MAX_SHARD_BYTES:
                shards.append([])
                shard_bytes = 0
            shards[-1].append((name, shape, size))
            shard_bytes += size
        self.shards = shards
        self.names = ["model.safetensors"]
        if len(shards) > 1:
            self.names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        self.file, self.output, self.shard, self.left = None, None, -1, 0

    def _begin_shard(self):
        self.shard += 1
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, size in self.shards[self.shard]:
            header[name] = {"dtype": self.dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = os.path.join(self.path, self.names[self.shard])
        self.file = create_file(path)
        total = sum(size for shard in self.shards for _, _, size in shard)
        self.output = Output(self.file, path, total, self.output.written if self.output else 0)
        self.output.write(struct.pack("<Q", len(text)) + text)
        self.left = end

    def write(self, values):
        """Appends fp32 values, which are the next in the order of `tensors`."""
        if self.left == 0:
            self._begin_shard()
        for begin in range(0, values.shape[0], max(1, PIECE_FLOATS // values[0].size)):
            piece = values[begin : begin + max(1, PIECE_FLOATS // values[0].size)]
            data = piece.astype(DTYPES[self.dtype])
            self.rounded += np.count_nonzero(data.astype(np.float32) != piece)
            self.count += piece.size
            self.output.write(data.view(np.uint8))
            self.left -= data.nbytes
        if self.left == 0:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def finish(self):
        """Writes the index, if there are several files."""
        assert self.left == 0 and self.shard == len(self.shards) - 1
        if len(self.shards) > 1:
            weight_map = {t[0]: name for name, shard in zip(self.names, self.shards) for t in shard}
            total = sum(size for shard in self.shards for _, _, size in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            with create_file(os.path.join(self.path, "model.safetensors.index.json")) as f:
                f.write((json.dumps(index, indent=2) + "\n").encode())
                f.flush()
                os.fsync(f.fileno())
        sync_folder(self.path)
