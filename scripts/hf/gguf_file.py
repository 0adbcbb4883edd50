"""Reads a GGUF file as if it were a Hugging Face folder: its metadata as config.json, its tensors by their
names in transformers."""

import math
import mmap
import re

import gguf
import numpy as np
import vocab
from shards import die, one_line

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
PIECE_FLOATS = 1 << 24  # elements that are dequantized at a time
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj"},
    **{"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj"},
    **{"attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"},
    **{"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
}


def _hf_name(name):
    """Returns the name in transformers of a tensor; its own name if transformers has none."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return _OUTSIDE.get(name, name)


class Gguf:
    """An open GGUF file.

    Attributes:
        config: the values of a config.json.
        files: {name: content} of hub_files.NAMES that the metadata has.
        shapes: {name in transformers: shape}.
    """

    def __init__(self, path):
        self.path = path
        fields = vocab.read_gguf(path)  # this also verifies the metadata
        try:
            reader = gguf.GGUFReader(path)
        except Exception as e:  # whatever the library raises for a file that it cannot use
            die(f"{path} is not a valid GGUF file: {one_line(e)}; download it again")
        self.mapping = reader.data._mmap
        self.tensors = {_hf_name(t.name): t for t in reader.tensors}
        self.rope_freqs = self.tensors.pop("rope_freqs.weight", None)
        self.shapes = {
            name: tuple(int(n) for n in reversed(t.shape.tolist())) for name, t in self.tensors.items()
        }
        self.architecture = fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            die(
                f"{path}: architecture {str(self.architecture)[:40]!r} is not supported; supported: "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.config = self._config(fields)
        template = fields.get("tokenizer.chat_template")
        self.files = {"chat_template.jinja": template.encode()} if isinstance(template, str) else {}

    def _config(self, fields):
        def get(key, default=None):
            value = fields.get(f"{self.architecture}.{key}", default)
            return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05

        heads, channels = get("attention.head_count"), get("embedding_length")
        embedding = self.shapes.get("model.embed_tokens.weight", (None,))
        window = get("attention.sliding_window")
        config = {
            "architectures": ["MistralForCausalLM" if window else ARCHITECTURES[self.architecture]],
            **{"vocab_size": embedding[0], "hidden_size": channels, "num_attention_heads": heads},
            **{"num_hidden_layers": get("block_count"), "intermediate_size": get("feed_forward_length")},
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            **{"rope_theta": get("rope.freq_base", 10000.0), "sliding_window": window},
            **{"max_position_embeddings": get("context_length"), "num_experts": get("expert_count")},
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }
        config = {key: value for key, value in config.items() if value is not None}
        names = (
            *("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
            *("rms_norm_eps", "max_position_embeddings"),
        )
        missing = [name for name in names if name not in config]
        if missing or not all(isinstance(n, int) and n > 0 for n in (heads, channels)):
            die(
                f"{self.path}: no valid {(missing or ['number of heads'])[0]} in its metadata; choose another"
            )
        self.head_dim = get("attention.key_length", channels // heads)
        config["head_dim"] = self.head_dim
        rotary = get("rope.dimension_count", self.head_dim)
        if rotary != self.head_dim:
            config["partial_rotary_factor"] = f"{rotary} of {self.head_dim}"
        scaling = get("rope.scaling.type")
        if scaling not in (None, "none"):
            config["rope_scaling"] = {"rope_type": scaling}
        elif self.rope_freqs is not None:
            config["rope_scaling"] = self._llama3_scaling(config)
        return config

    def _llama3_scaling(self, config):
        """Returns Llama 3.1's RoPE scaling, of which the file has the factor of each frequency alone: the
        largest is the scaling's factor, and the others are checked."""
        found = np.array(self.rope_freqs.data, np.float64).reshape(-1)
        low, high, original, factor = 1.0, 4.0, 8192, float(found.max(initial=0))
        wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(found.size) / found.size)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / max(factor, 1) + smooth)
        if found.size != self.head_dim // 2 or not np.allclose(found, expected, rtol=1e-3):
            die(f"{self.path}: rope_freqs.weight: not supported: not the RoPE scaling of Llama 3.1 and 3.2")
        return {
            **{"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high},
            "original_max_position_embeddings": original,
        }

    def dtype_error(self, name):
        """Returns why the tensor cannot be read, or None."""
        tensor = self.tensors[name]
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except (NotImplementedError, ValueError, TypeError) as e:
            return f"type {tensor.tensor_type.name} is not supported: {one_line(e)}"
        return None

    def read(self, name):
        """Yields the fp32 values of a tensor in pieces of whole rows."""
        tensor, shape = self.tensors[name], self.shapes[name]
        data = tensor.data if len(shape) > 1 else tensor.data[None]
        rows = max(1, PIECE_FLOATS // (shape[-1] * self.head_dim)) * self.head_dim
        for begin in range(0, data.shape[0], rows):
            values = gguf.dequantize(data[begin : begin + rows], tensor.tensor_type).astype(np.float32)
            if self.architecture == "llama" and re.search(r"\.(q|k)_proj\.(weight|bias)$", name):
                values = self._unpermute(values if len(shape) > 1 else values.reshape(-1, 1))
            yield values.reshape(-1, *shape[1:])
        self.mapping.madvise(mmap.MADV_DONTNEED)  # else pages that were read count as memory of this program

    def _unpermute(self, values):
        """Returns rows of Llama's q or k in the order of transformers. GGUF has the channels c and c + d/2 of
        a head, which RoPE rotates together, side by side."""
        pairs = values.reshape(-1, self.head_dim // 2, 2, values.shape[-1])
        return pairs.swapaxes(1, 2).reshape(values.shape)
