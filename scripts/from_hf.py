#!/usr/bin/env python3
"""from_hf.py: makes a checkpoint of the trainers from a Hugging Face folder or from a GGUF file."""

import math
import os
import sys
from argparse import ArgumentTypeError

sys.path[:0] = [os.path.join(os.path.dirname(os.path.abspath(__file__)), d) for d in ("hf", "../data")]
from shards import (  # noqa: E402
    Parser,
    die,
    number_type,
    read_input,
    report_output_errors,
    run_main,
    write_file,
)

GATES = (0.05, 0.9, 0.05)  # compressed, selected, sliding


def parse_gates(text):
    try:
        gates = tuple(float(part) for part in text.split(","))
    except ValueError:
        gates = ()
    if len(gates) != 3 or not all(0 < g < 1 for g in gates):
        raise ArgumentTypeError(f"{text}: must be three numbers between 0 and 1, such as 0.05,0.9,0.05")
    return gates


def parse_args():
    parser = Parser(
        description="Makes a checkpoint of the trainers from a Hugging Face folder or a GGUF file. It holds "
        "the weights alone: start from it with -e."
    )
    parser.add_argument("source", help="a folder with config.json and safetensors, or a .gguf file")
    parser.add_argument("-o", metavar="CHECKPOINT", required=True, dest="output", help="file to write")
    parser.add_argument(
        "--attn",
        choices=["full", "nsa", "window"],
        help="attention of the checkpoint (that of the source)",
    )
    parser.add_argument(
        "--gate",
        metavar="C,S,W",
        type=parse_gates,
        help="with --attn nsa, gates of the compressed, selected and sliding branch, each between 0 and 1 "
        f"({','.join(map(str, GATES))})",
    )
    sizes = [
        # the defaults are config.NSA_DEFAULTS, whose import needs NumPy
        ("cmp-len", "tokens of a compression window (32)"),
        ("cmp-stride", "tokens between the starts of compression windows (16)"),
        ("block", "tokens of a selection block (64)"),
        ("topk", "blocks that a query selects (16)"),
        ("init-blocks", "initial blocks, always selected (1)"),
        ("local-blocks", "local blocks, always selected (2)"),
        ("window", "tokens that the window sees, of nsa's sliding branch (512) or of --attn window"),
        ("full-every", "with --attn nsa or window, every N-th layer keeps full attention; 0: none (0)"),
    ]
    for flag, what in sizes:
        parser.add_argument(f"--{flag}", type=number_type(0, 1 << 30), metavar="N", dest=flag, help=what)
    parser.add_argument(
        "--phi",
        choices=["mean", "linear"],
        help="with --attn nsa, compression of a window; linear begins as the mean, and can be trained (mean)",
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="the tokenizer's end-of-text token, if it is not a usual one"
    )
    args = parser.parse_args()
    args.sizes = {flag: getattr(args, flag) for flag, _ in sizes if getattr(args, flag) is not None}
    if args.phi:
        args.sizes["phi"] = ("mean", "linear").index(args.phi)
    return args


def choose_attention(model, args):
    """Returns the model fields of the checkpoint: those of the source, with the attention of the flags."""
    import config
    from checkpoint import ATTN_NAMES, FULL, NSA, WINDOW, check_model

    source = model["attn"]
    attn = ATTN_NAMES.index(args.attn) if args.attn else source
    if args.gate and (attn != NSA or source == NSA):
        die("--gate: only for new gates; " + ("leave it out" if source == NSA else "add --attn nsa"))
    if source == NSA and (attn != NSA or args.sizes):
        flag = f"--attn {args.attn}" if attn != NSA else f"--{next(iter(args.sizes))}"
        die(f"{flag}: {args.source} already has nsa; its attention cannot be changed here; leave out {flag}")
    shared = ("window", "full-every")  # of nsa and window
    if attn != NSA and set(args.sizes) - set(shared):
        die(f"--{next(f for f in args.sizes if f not in shared)}: only nsa has it; add --attn nsa")
    for flag in shared:
        if flag in args.sizes and attn not in (NSA, WINDOW):
            what = "no window" if flag == "window" else "full layers alone"
            die(f"--{flag}: full attention has {what}; add --attn nsa or --attn window")
    if attn == WINDOW and source != WINDOW and "window" not in args.sizes:
        die(f"--attn window: {args.source} has no window; give its size with --window")
    if attn == NSA and source == WINDOW and "window" not in args.sizes:
        model = {**model, "window": config.NSA_DEFAULTS["window"]}
    if attn == FULL:
        model = {**model, "full-every": 0}
    model = {**model, "attn": attn, **args.sizes}
    check_model(model, "the model")
    return model


def new_values(tensor, model, gates):
    """Returns the values of a tensor that only nsa has: the gates of all tokens are `gates`, and the
    compression is the mean."""
    import checkpoint
    import numpy as np

    values = np.zeros((tensor.rows, tensor.cols), np.float32)
    if tensor.name == "bgate":
        logits = checkpoint.num_gate_logits(model)
        values[0, :logits] = np.tile([math.log(g / (1 - g)) for g in gates], logits // 3)
    elif tensor.name in ("phi_wk", "phi_wv"):  # row r*d + c of a KV head: token r of the window, channel c
        values[:] = np.tile(np.eye(tensor.cols), (tensor.rows // tensor.cols, 1)) / model["cmp-len"]
    return values


def tensor_values(source, tensor, source_model, model, gates):
    """Yields the values of a checkpoint's tensor, in pieces."""
    import checkpoint
    import numpy as np
    import weights

    if source_model["attn"] != checkpoint.NSA and tensor.name in checkpoint.NSA_TENSORS:
        yield new_values(tensor, model, gates)
        return
    filled = 0
    for part in weights.parts(tensor, source_model):
        for piece in source.read(part.name):
            filled += piece.size
            yield piece
    yield np.zeros(tensor.rows * tensor.cols - filled, np.float32)


def make_tokenizer_bin(source, eot_text, vocab_size, path):
    """Returns the content of tokenizer.bin, or None if the source has no tokenizer. Tokens that only the
    model has are unused. Dies if `path` is there with another content, or without one here.

    Args:
        source: a folder or a GGUF file.
        eot_text: the end-of-text token; None: a usual one.
        vocab_size: of the model.
        path: of tokenizer.bin.
    """
    import vocab

    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "tokenizer.json")):
        if os.path.exists(path):
            die(f"{path}: {source} has no tokenizer.json, so it is another model's; choose another folder for -o")
        print(
            f"note: {source} has no tokenizer.json, so the trainers cannot read a prompt or print samples",
            file=sys.stderr,
        )
        return None
    tokenizer = vocab.load(source, eot_text)
    unused = vocab_size - len(tokenizer.pieces)
    if unused < 0:
        die(
            f"{source}: its tokenizer has {len(tokenizer.pieces)} tokens, its model {vocab_size}; put the "
            f"tokenizer of the model there"
        )
    tokenizer.pieces += [b""] * unused
    tokenizer.ranks += [-1] * unused
    tokenizer.flags += [0] * unused
    content = tokenizer.tokenizer_bin()
    if os.path.exists(path) and read_input(path) != content:
        die(f"{path} is another tokenizer; choose another folder for -o")
    if tokenizer.note:
        print(f"note: the tokenizer of {source} {tokenizer.note}", file=sys.stderr)
    return content


def open_source(path):
    """Returns (tensors, values of config.json, name of these for messages) of a folder or a GGUF file."""
    import safetensors_files

    if os.path.isdir(path):
        name = os.path.join(path, "config.json")
        if not os.path.exists(name):
            die(f"{path}: has no config.json; give the folder of a Hugging Face model")
        values = safetensors_files.parse_json(read_input(name), name)
        return safetensors_files.Folder(path), values, name
    if not path.endswith(".gguf"):
        die(
            f"{path}: neither a folder nor a .gguf file; check the path, or download a model of the hub first: "
            "hf download MODEL --local-dir FOLDER"
        )
    import gguf_file

    source = gguf_file.Gguf(path)
    return source, source.config, path


def main():
    args = parse_args()
    import checkpoint
    import config
    import hub_files
    import tokenizer_json
    import weights

    if args.output.endswith("/") or os.path.isdir(args.output):
        die(f"-o {args.output}: is a folder; give a file, such as {os.path.join(args.output, 'start.bin')}")
    if os.path.lexists(args.output):
        die(f"-o {args.output}: exists; choose another name, or remove it")

    source, values, name = open_source(args.source)
    source_model, seq_len = config.to_model(values, name)
    weights.check_source(source, source_model, args.source)
    model = choose_attention(source_model, args)
    folder = os.path.dirname(args.output) or "."
    tokenizer_path = os.path.join(folder, "tokenizer.bin")
    tokenizer_bin = make_tokenizer_bin(args.source, args.eot, model["vocab"], tokenizer_path)
    files = hub_files.read(args.source) if os.path.isdir(args.source) else dict(source.files)
    if tokenizer_bin is not None and "tokenizer.json" not in files and not os.path.isdir(args.source):
        files = {**tokenizer_json.from_bin(tokenizer_bin, args.source), **files}
    if model["head-dim"] not in (64, 128):
        print(
            f"note: heads of {model['head-dim']} train on the CPU alone; the GPU trainer takes 64 and 128",
            file=sys.stderr,
        )
    with report_output_errors(args.output):
        os.makedirs(folder, exist_ok=True)
    with checkpoint.Writer(args.output, model, seq_len) as out:
        for tensor in checkpoint.param_table(model):
            for values in tensor_values(source, tensor, source_model, model, args.gate or GATES):
                out.write(values)
        if tokenizer_bin is not None:
            write_file(tokenizer_path, tokenizer_bin)
        if files:
            hub_files.write(hub_files.side_folder(args.output), files)
    count = sum(math.prod(p.shape) for t in checkpoint.param_table(model) for p in weights.parts(t, model))
    full = f", full in one of {model['full-every']} layers" if model["full-every"] else ""
    print(f"{args.output}: {count:,} parameters, attention {checkpoint.ATTN_NAMES[model['attn']]}{full}")


if __name__ == "__main__":
    run_main(main, "nothing was written; run the same command again")
