"""Which tensors of a Hugging Face folder make which tensor of a checkpoint."""

import re
from collections import namedtuple

import checkpoint
import numpy as np
from shards import die

# Rows [first, first + rows) of a checkpoint's tensor are the tensor `name`, of this shape.
Part = namedtuple("Part", "name first rows shape")

# Buffers of old releases of transformers: no parameters.
IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_ATTENTION, _MLP = "model.layers.{}.self_attn.{}", "model.layers.{}.mlp.{}"


def parts(tensor, model):
    """Returns the Parts of a checkpoint's tensor, in the order of its rows. The rows behind them are padding,
    which is 0."""
    layer, cols = tensor.layer, tensor.cols
    d, heads, kv_heads = model["head-dim"], model["heads"], model["kv-heads"]

    def one(name, rows=tensor.rows, shape=None):
        return [Part(name, 0, rows, shape or ((cols,) if tensor.rows == 1 else (rows, cols)))]

    def several(names, rows, shape):
        found, first = [], 0
        for name, n in zip(names, rows):
            found.append(Part(name, first, n, shape(n)))
            first += n
        return found

    qkv, qkv_rows = ("q_proj", "k_proj", "v_proj"), (heads * d, kv_heads * d, kv_heads * d)
    window = (kv_heads, model["cmp-len"])
    name = tensor.name
    if name in ("wte", "lm_head"):
        hf_name = "model.embed_tokens.weight" if name == "wte" else "lm_head.weight"
        return one(hf_name, model["vocab"])
    if name == "wqkv":
        names = [_ATTENTION.format(layer, f"{x}.weight") for x in qkv]
        return several(names, qkv_rows, lambda n: (n, cols))
    if name == "bqkv":  # one row, whose columns are the parts
        names = [_ATTENTION.format(layer, f"{x}.bias") for x in qkv]
        return several(names, qkv_rows, lambda n: (n,))
    if name == "wgu":
        names = [_MLP.format(layer, f"{x}_proj.weight") for x in ("gate", "up")]
        return several(names, (model["hidden"],) * 2, lambda n: (n, cols))
    if name in ("phi_wk", "phi_wv"):
        shape = (kv_heads, model["cmp-len"] * d, d)
        return one(_ATTENTION.format(layer, f"compress_{name[-1]}"), shape=shape)
    if name == "phi_pe":
        return one(_ATTENTION.format(layer, "compress_pe"), shape=(*window, d))
    if name == "wgate":  # a matrix even if it has one row
        return one(_ATTENTION.format(layer, "gate_proj.weight"), shape=(tensor.rows, cols))
    names = {
        "ln1": "model.layers.{}.input_layernorm.weight",
        "ln2": "model.layers.{}.post_attention_layernorm.weight",
        "lnf": "model.norm.weight",
        "wdown": _MLP.format("{}", "down_proj.weight"),
        "wo": _ATTENTION.format("{}", "o_proj.weight"),
        "bgate": _ATTENTION.format("{}", "gate_proj.bias"),
        "qnorm": _ATTENTION.format("{}", "q_norm.weight"),
        "knorm": _ATTENTION.format("{}", "k_norm.weight"),
    }
    return one(names[name].format(layer))


def o_bias_names(model):
    """Returns the names of the biases that transformers wants with attention_bias, but no trainer has."""
    return [_ATTENTION.format(layer, "o_proj.bias") for layer in range(model["layers"])]


def check_source(source, model, name):
    """Dies if the source lacks a tensor of the model, has one of a wrong shape or type, or has others.

    Args:
        source: .shapes {name: shape} and .dtype_error(name).
        model: model fields of the source.
        name: path of the source, for messages.
    """
    expected = {p.name: p.shape for t in checkpoint.param_table(model) for p in parts(t, model)}
    for tensor, shape in expected.items():
        if tensor not in source.shapes:
            die(f"{name}: no tensor {tensor}; download the folder again, or check its config.json")
        if source.shapes[tensor] != shape:
            die(
                f"{name}: {tensor} has shape {list(source.shapes[tensor])}, its config.json says "
                f"{list(shape)}; check the folder"
            )
        error = source.dtype_error(tensor)
        if error:
            die(f"{name}: {tensor}: {error}")
    biases = o_bias_names(model)
    for tensor in source.shapes:
        if tensor in expected or IGNORED.fullmatch(tensor):
            continue
        if tensor == "lm_head.weight" and _equal(source, tensor, "model.embed_tokens.weight"):
            continue  # tied, and yet stored
        if tensor in biases and not any(piece.any() for piece in source.read(tensor)):
            continue
        die(f"{name}: {tensor[:80]}: not supported: the trainers have no such tensor in this model")


def _equal(source, a, b):
    if source.shapes[a] != source.shapes[b] or source.dtype_error(a) or source.dtype_error(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(source.read(a), source.read(b)))
