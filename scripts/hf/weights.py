"""Which tensors of a Hugging Face folder make which tensor of a checkpoint."""

import re
from collections import namedtuple

import checkpoint
import numpy as np
from shards import die

# A tensor of a Hugging Face folder.
Part = namedtuple("Part", "name shape")

# Buffers of old releases of transformers: no parameters.
IGNORED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def parts(tensor, model):
    """Returns the Parts of a checkpoint's tensor: their elements one after another are its first elements.
    The elements behind them are padding, which is 0."""
    layer, cols, name = tensor.layer, tensor.cols, tensor.name
    d, heads, kv_heads = model["head-dim"], model["heads"], model["kv-heads"]
    qkv_rows = {"q_proj": heads * d, "k_proj": kv_heads * d, "v_proj": kv_heads * d}
    gates = checkpoint.num_gate_logits(model)
    outside = {
        "wte": Part("model.embed_tokens.weight", (model["vocab"], cols)),
        "lnf": Part("model.norm.weight", (cols,)),
        "lm_head": Part("lm_head.weight", (model["vocab"], cols)),
    }
    attention = {
        "wqkv": [(f"{key}.weight", (rows, cols)) for key, rows in qkv_rows.items()],
        "bqkv": [(f"{key}.bias", (rows,)) for key, rows in qkv_rows.items()],
        "wgate": [("gate_proj.weight", (gates, cols))],
        "bgate": [("gate_proj.bias", (gates,))],
        "qnorm": [("q_norm.weight", (d,))],
        "knorm": [("k_norm.weight", (d,))],
        "phi_wk": [("compress_k", (kv_heads, model["cmp-len"] * d, d))],
        "phi_pe": [("compress_pe", (kv_heads, model["cmp-len"], d))],
        "phi_wv": [("compress_v", (kv_heads, model["cmp-len"] * d, d))],
        "wo": [("o_proj.weight", (tensor.rows, cols))],
    }
    others = {
        "ln1": [("input_layernorm.weight", (cols,))],
        "ln2": [("post_attention_layernorm.weight", (cols,))],
        "wgu": [(f"mlp.{key}_proj.weight", (model["hidden"], cols)) for key in ("gate", "up")],
        "wdown": [("mlp.down_proj.weight", (tensor.rows, cols))],
    }
    if layer < 0:
        return [outside[name]]
    prefix, found = ("self_attn.", attention[name]) if name in attention else ("", others[name])
    return [Part(f"model.layers.{layer}.{prefix}{key}", shape) for key, shape in found]


def o_bias_names(model):
    """Returns the names of the biases that transformers wants with attention_bias, but no trainer has."""
    return [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(model["layers"])]


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
