#!/usr/bin/env python3
"""to_hf.py: makes a Hugging Face folder from a checkpoint of the trainers."""

import contextlib
import json
import math
import os
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, d) for d in ("hf", "../data")]
from shards import Parser, die, read_input, report_output_errors, run_main, sync_folder, write_file  # noqa: E402

DTYPES = {"bf16": ("BF16", "bfloat16"), "fp32": ("F32", "float32")}


def parse_args():
    parser = Parser(
        description="Makes a Hugging Face folder from a checkpoint, for transformers. "
        "full and window become a Llama, Mistral, Qwen2 or Qwen3 model, which needs no code of ours. nsa "
        "brings its code along: load it with trust_remote_code=True."
    )
    parser.add_argument("checkpoint", help="a ckpt_*.bin of a run, or a file of from_hf.py")
    parser.add_argument("-o", metavar="FOLDER", required=True, dest="folder", help="new folder to write")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="bf16",
        help="type of the weights: bf16 is the usual one; fp32 keeps all bits of a trained checkpoint (bf16)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a tokenizer.json, or a folder with the tokenizer's files (those that from_hf.py has kept beside "
        "the checkpoint, or else one made from tokenizer.bin)",
    )
    return parser.parse_args()


def find_side_folder(path):
    """Returns the folder of tokenizer files that from_hf.py has kept beside the checkpoint `path`, or beside the one
    from which its run started, which the run's log names."""
    import hub_files

    seen = set()
    while path not in seen:
        seen.add(path)
        side = hub_files.side_folder(path)
        if os.path.isdir(side):
            return side
        try:
            with open(os.path.join(os.path.dirname(path), "log.jsonl"), encoding="utf-8") as log:
                path = str(json.loads(log.readline())["start"]["flags"]["e"])
        except (OSError, ValueError, KeyError, TypeError):
            break
    return hub_files.side_folder(path)


def find_tokenizer_files(args):
    """Returns ({name: content} of the tokenizer's files and generation_config.json, reason that there is no
    tokenizer or None)."""
    import hub_files
    import tokenizer_json

    path = args.tokenizer or find_side_folder(args.checkpoint)
    files = hub_files.read(path) if os.path.isdir(path) else {}
    if "tokenizer.json" in files:
        return files, None
    if args.tokenizer and os.path.isdir(path):
        die(f"--tokenizer {path}: the folder has no tokenizer.json; check the path")
    binary = os.path.join(os.path.dirname(args.checkpoint) or ".", "tokenizer.bin")
    made = tokenizer_json.from_bin(read_input(binary), binary) if os.path.exists(binary) else {}
    if args.tokenizer:  # a tokenizer.json does not say which tokens begin and end a text
        return {**made, "tokenizer.json": read_input(path)}, None
    if not os.path.exists(binary):
        return files, f"{binary} does not exist; name one with --tokenizer"
    if made:
        print(f"note: tokenizer.json is made from {binary}; a chat template is not in it (--tokenizer)", file=sys.stderr)
    return {**made, **files}, None if made else f"{binary} has words, which a tokenizer.json cannot have"


@contextlib.contextmanager
def new_folder(path):
    """Creates .NAME.to_hf.tmp beside `path`, which becomes the folder `path`. An error removes it."""
    if os.path.lexists(path):
        die(f"-o {path}: exists; choose a new folder")
    folder, name = os.path.split(path.rstrip("/"))
    tmp = os.path.join(folder, f".{name}.to_hf.tmp")
    if os.path.isdir(tmp) and not os.path.islink(tmp):  # of a killed export
        shutil.rmtree(tmp)
    with report_output_errors(path):
        os.makedirs(tmp)
    try:
        yield tmp
        os.rename(tmp, path)
        sync_folder(os.path.dirname(path.rstrip("/")) or ".")
    finally:
        if os.path.isdir(tmp):
            shutil.rmtree(tmp)


def write_weights(reader, out):
    """Writes all tensors of the folder, in the order of the checkpoint."""
    import numpy as np
    import weights

    for tensor in reader.table:
        pieces, left = reader.read(tensor), np.empty(0, np.float32)
        for part in weights.parts(tensor, reader.model):
            size, cols = math.prod(part.shape), part.shape[-1]
            while size > 0:
                while left.size < min(size, cols):
                    left = left.copy()  # the next piece takes its place
                    left = np.concatenate([left, next(pieces)]) if left.size else next(pieces)
                count = min(size, left.size) // cols * cols
                out.write(left[:count].reshape(-1, cols))
                left = left[count:]
                size -= count
        for _ in pieces:  # padding
            pass


def main():
    args = parse_args()
    import checkpoint
    import config
    import safetensors_files
    import weights

    if not args.checkpoint:
        die("no checkpoint: its name is empty; give a ckpt_*.bin")
    reader = checkpoint.Reader(args.checkpoint)
    model = reader.model
    dtype, dtype_name = DTYPES[args.dtype]
    values = config.from_model(model, args.checkpoint, reader.seq_len, dtype_name)
    files, no_tokenizer = find_tokenizer_files(args)
    if args.tokenizer:
        import vocab

        tokens = len(vocab.load(args.tokenizer, None).pieces)
        if tokens > model["vocab"]:
            die(f"--tokenizer {args.tokenizer}: it has {tokens} tokens, the model {model['vocab']}; name the model's own")
    tensors = [part for tensor in reader.table for part in weights.parts(tensor, model)]
    with new_folder(args.folder) as tmp:
        out = safetensors_files.FolderWriter(tmp, tensors, dtype)
        write_weights(reader, out)
        out.finish()
        files["config.json"] = (json.dumps(values, indent=2) + "\n").encode()
        if model["attn"] == checkpoint.NSA:
            for name in ("configuration_nsa.py", "modeling_nsa.py"):
                files[name] = read_input(os.path.join(HERE, "hf", name))
        for name, content in files.items():
            write_file(os.path.join(tmp, name), content)
    if no_tokenizer:
        print(f"note: no tokenizer: {no_tokenizer}", file=sys.stderr)
    rounded = ", rounded from fp32 (--dtype fp32 keeps all bits)" if out.rounded else ""
    print(f"{args.folder}: {values['architectures'][0]}, {out.count:,} parameters in {args.dtype}{rounded}")


if __name__ == "__main__":
    run_main(main, "nothing was written; run the same command again")
