"""Translates between config.json and the model fields of a checkpoint."""

import checkpoint
from checkpoint import FULL, NSA, WINDOW
from shards import die

# Attention sizes of a model that has none (the presets of llmc/config.h have the same).
NSA_DEFAULTS = {
    **{"cmp-len": 32, "cmp-stride": 16, "block": 64, "topk": 16, "init-blocks": 1, "local-blocks": 2},
    **{"window": 512, "phi": checkpoint.PHI_MEAN, "gate-per-token": 0, "scale": 0},
}
# What transformers takes for a key that config.json lacks, where it differs between the architectures.
ARCHITECTURES = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {
        **{"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    },
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        **{"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        "head_dim": 128,
    },
}
NSA_ARCHITECTURE = "NsaForCausalLM"
MAX_DEFAULT_SEQ_LEN = 8192  # the trainers' default -t is at most this
_NSA_KEYS = {  # of the config.json of an nsa model, and the model fields
    **{"nsa_cmp_len": "cmp-len", "nsa_cmp_stride": "cmp-stride", "nsa_block": "block", "nsa_topk": "topk"},
    **{"nsa_init_blocks": "init-blocks", "nsa_local_blocks": "local-blocks", "nsa_window": "window"},
    **{"rope_factor": "rope-factor", "rope_low_freq": "rope-low-freq", "rope_high_freq": "rope-high-freq"},
    **{"rope_original_len": "rope-original-len", "nsa_scale": "scale"},
}


class _Config:
    """The values of a config.json with checked types."""

    def __init__(self, values, name, defaults):
        self.values, self.name, self.defaults = values, name, defaults

    def raw(self, key):
        value = self.values.get(key)
        return self.defaults.get(key) if value is None and key not in self.values else value

    def number(self, key, default=None, kind=int):
        """Returns a number; default None: the key must be there."""
        value = self.raw(key)
        value = default if value is None else value
        if value is None:
            die(f"{self.name}: no {key}; repair the file")
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            die(f"{self.name}: {key} {str(value)[:40]!r}: must be a number; repair the file")
        if abs(value) >= 1 << 62:
            die(f"{self.name}: {key} {str(value)[:40]}: too large; repair the file")
        return kind(value)

    def flag(self, key):
        value = self.raw(key)
        if value not in (None, False, True):
            die(f"{self.name}: {key} {str(value)[:40]!r}: must be true or false; repair the file")
        return bool(value)

    def refuse(self, key, reason):
        die(f"{self.name}: {key} {str(self.raw(key))[:60]}: not supported: {reason}")


def _architecture(values, name):
    named = values.get("architectures")
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        architecture = named[0]
    else:
        types = {"llama": 0, "mistral": 1, "qwen2": 2, "qwen3": 3}
        known = types.get(str(values.get("model_type")))
        if known is None:
            die(
                f"{name}: no architecture, and model_type {str(values.get('model_type'))[:40]!r}; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        architecture = list(ARCHITECTURES)[known]
    if architecture not in ARCHITECTURES and architecture != NSA_ARCHITECTURE:
        die(
            f"{name}: {architecture[:60]} is not supported; supported: {', '.join(ARCHITECTURES)}, "
            f"{NSA_ARCHITECTURE}"
        )
    return architecture


def _refuse_extras(c):
    """Dies if the model has a part that the trainers do not have."""
    activation = c.raw("hidden_act")
    if activation not in (None, "silu", "swish"):
        c.refuse("hidden_act", "the trainers have SwiGLU (silu) alone")
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"):
        if c.raw(key):
            c.refuse(key, "the trainers have no mixture of experts")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if c.raw(key):
            c.refuse(key, "the trainers have no soft-capping of logits")
    if c.flag("mlp_bias"):
        c.refuse("mlp_bias", "the trainers have no bias in the MLP")
    if c.raw("quantization_config"):
        c.refuse("quantization_config", "give a folder with fp32, fp16 or bf16 weights")
    rope = c.raw("rope_parameters")
    rotary = (rope.get("partial_rotary_factor") if isinstance(rope, dict) else None, "rope_parameters")
    for value, key in (rotary, (c.raw("partial_rotary_factor"), "partial_rotary_factor")):
        if value not in (None, 1):
            c.refuse(key, "the trainers rotate all channels of a head")


def _rope(c, max_len):
    """Returns RoPE's model fields. transformers 5 has them in rope_parameters, older files in rope_theta and
    rope_scaling."""
    new, old = c.raw("rope_parameters"), c.raw("rope_scaling")
    key = "rope_parameters" if new is not None else "rope_scaling"
    scaling = new if new is not None else old if old is not None else {}
    if not isinstance(scaling, dict):
        die(f"{c.name}: {key} {str(scaling)[:40]!r}: must be an object; repair the file")
    if any(isinstance(value, dict) for value in scaling.values()):
        c.refuse(key, "the trainers have one RoPE for all layers")
    rope = _Config(scaling, f"{c.name}: {key}", {})
    theta = rope.number("rope_theta", c.number("rope_theta", 10000.0, float), float)
    fields = {"theta": theta, "rope-factor": 0.0, "rope-low-freq": 1.0, "rope-high-freq": 4.0}
    fields["rope-original-len"] = max_len
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        fields["rope-factor"] = rope.number("factor", kind=float)
        fields["rope-low-freq"] = rope.number("low_freq_factor", kind=float)
        fields["rope-high-freq"] = rope.number("high_freq_factor", kind=float)
        fields["rope-original-len"] = rope.number("original_max_position_embeddings")
    elif kind != "default":
        die(f"{c.name}: RoPE scaling {str(kind)[:40]!r} is not supported; supported: llama3, or none")
    return fields


def _layer_type(layer, every):
    """Returns the layer_types entry of a layer with a sliding window, of which every `every`-th (0: none) is
    full instead."""
    return "full_attention" if every and (layer + 1) % every == 0 else "sliding_attention"


def _sliding_window(c, architecture, layers):
    """Returns (size of the sliding window, or None if no layer has it; full-every)."""
    window = c.raw("sliding_window")
    if architecture == "LlamaForCausalLM":
        window = None
    elif architecture != "MistralForCausalLM" and not c.flag("use_sliding_window"):
        window = None
    types = c.raw("layer_types")
    if types is None and window is not None and architecture != "MistralForCausalLM":
        full = min(c.number("max_window_layers", 28), layers)  # the first layers
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * layers
    if not isinstance(types, list) or len(types) != layers:
        die(f"{c.name}: layer_types must list the attention of {layers} layers; repair the file")
    if all(t == "full_attention" for t in types):
        return None, 0
    every = types.index("full_attention") + 1 if "full_attention" in types else 0
    expected = [_layer_type(layer, every) for layer in range(layers)]
    if window is None or every == 1 or types != expected:
        kinds = ", ".join(sorted({str(t)[:40] for t in types}))
        die(
            f"{c.name}: its layers differ in their attention ({kinds}): not supported; "
            f"of sliding layers, the trainers can have every N-th full instead, not others"
        )
    return c.number("sliding_window"), every


def to_model(values, name):
    """Translates a config.json. Dies if the trainers cannot run its model.

    Args:
        values: the parsed file.
        name: its path, for messages.

    Returns:
        (model fields, default sequence length)
    """
    architecture = _architecture(values, name)
    c = _Config(values, name, ARCHITECTURES.get(architecture, {}))
    _refuse_extras(c)
    layers, channels, heads = (
        c.number(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    checkpoint.check_field("layers", layers, name)  # before a list has that many entries
    vocab, max_len = c.number("vocab_size"), c.number("max_position_embeddings")
    if heads < 1:
        die(f"{name}: num_attention_heads {heads}: must be at least 1; repair the file")
    model = {
        **{"vocab": vocab, "padded-vocab": checkpoint.padded_vocab(vocab), "layers": layers},
        **{"channels": channels, "hidden": c.number("intermediate_size"), "attn": FULL, "heads": heads},
        **{
            "kv-heads": c.number("num_key_value_heads", heads),
            "head-dim": c.number("head_dim", channels // heads),
        },
        "tied": int(c.flag("tie_word_embeddings")),
        "qkv-bias": int(architecture == "Qwen2ForCausalLM" or c.flag("attention_bias")),
        "qk-norm": int(architecture == "Qwen3ForCausalLM"),
        **{"norm-eps": c.number("rms_norm_eps", 1e-6, float), "full-every": 0},
        **NSA_DEFAULTS,
    }
    if architecture == NSA_ARCHITECTURE:
        for key, field in _NSA_KEYS.items():
            model[field] = c.number(key, kind=float if field in checkpoint.REAL_FIELDS else int)
        model["theta"] = c.number("rope_theta", kind=float)
        model["qk-norm"] = int(c.flag("nsa_qk_norm"))
        model.update({"attn": NSA, "full-every": c.number("nsa_full_every", 0)})
        model["phi"] = {"mean": 0, "linear": 1}.get(c.raw("nsa_phi"), -1)
        model["gate-per-token"] = int(c.flag("nsa_gate_per_token"))
    else:
        model.update(_rope(c, max_len))
        window, every = _sliding_window(c, architecture, layers)
        if window is not None:
            model.update({"attn": WINDOW, "window": window, "full-every": every})
    model = {field: model[field] for field in checkpoint.FIELDS}
    checkpoint.check_model(model, name)
    return model, min(max_len, MAX_DEFAULT_SEQ_LEN)


def from_model(model, name, seq_len, dtype):
    """Returns the config.json of a model, as a dict. Dies if transformers has no such model.

    Args:
        model: fields of a checkpoint.
        name: path of the checkpoint, for messages.
        seq_len: tokens per training sequence.
        dtype: "float32" or "bfloat16".
    """
    factor = model["rope-factor"]
    config = {
        **{"hidden_size": model["channels"], "intermediate_size": model["hidden"]},
        **{"num_hidden_layers": model["layers"], "num_attention_heads": model["heads"]},
        **{"num_key_value_heads": model["kv-heads"], "head_dim": model["head-dim"]},
        **{"vocab_size": model["vocab"], "hidden_act": "silu", "rms_norm_eps": model["norm-eps"]},
        "max_position_embeddings": int(max(seq_len, model["rope-original-len"] * max(factor, 1))),
        **{"tie_word_embeddings": bool(model["tied"]), "attention_bias": bool(model["qkv-bias"])},
        **{"torch_dtype": dtype, "use_cache": True},
    }
    if model["attn"] == NSA:
        config.update({key: model[field] for key, field in _NSA_KEYS.items()})
        config.update(rope_theta=model["theta"], nsa_phi=("mean", "linear")[model["phi"]])
        config.update(nsa_full_every=model["full-every"])
        config.update(nsa_gate_per_token=bool(model["gate-per-token"]), nsa_qk_norm=bool(model["qk-norm"]))
        auto = {
            "AutoConfig": "configuration_nsa.NsaConfig",
            "AutoModelForCausalLM": f"modeling_nsa.{NSA_ARCHITECTURE}",
        }
        return {"architectures": [NSA_ARCHITECTURE], "model_type": "nsa", "auto_map": auto, **config}
    if model["scale"] not in (0, model["head-dim"] ** -0.5):
        die(
            f"{name}: scale {model['scale']:g}: transformers has 1/sqrt(head-dim) alone for this attention; "
            f"export a model with scale 0"
        )
    config["rope_theta"] = model["theta"]
    if factor:
        config["rope_scaling"] = {
            **{"rope_type": "llama3", "factor": factor, "low_freq_factor": model["rope-low-freq"]},
            "high_freq_factor": model["rope-high-freq"],
            "original_max_position_embeddings": model["rope-original-len"],
        }
    window = model["window"] if model["attn"] == WINDOW else None
    if model["qk-norm"] or model["qkv-bias"]:
        kind = "Qwen3" if model["qk-norm"] else "Qwen2"
        config.update(use_sliding_window=window is not None, sliding_window=window, max_window_layers=0)
        every = 1 if window is None else model["full-every"]
        config["layer_types"] = [_layer_type(layer, every) for layer in range(model["layers"])]
    elif model["full-every"]:
        die(
            f"{name}: full-every {model['full-every']} with attn window: transformers has such a model only "
            f"with qkv-bias 1 (Qwen2) or qk-norm 1 (Qwen3)"
        )
    else:
        kind = "Llama" if window is None else "Mistral"
        if window is not None:
            config["sliding_window"] = window
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), **config}
