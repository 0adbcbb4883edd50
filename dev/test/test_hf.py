"""Tests scripts/from_hf.py and scripts/to_hf.py from the command line. Tiny random models of every family are
imported; the C trainer's logits must equal those that transformers gave (golden/hf.txt, made by
golden_hf.py); what is exported must equal what was imported, bit for bit; every wrong folder is refused with
one line. `make test` sets CPU (the trainer) and BUILD (the folder with the program of dev/test/logits.c).
With transformers and torch, all families are also compared with it anew, and nsa on a GPU with itself.

test_hf.py [NAME...]: names of tests run these tests alone (gguf: test_gguf); names of families limit the tests
`families`, `transformers` and `gpu` to them. FIRST_FAILURE=1 stops at the first failed check."""

import concurrent.futures
import glob
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback

from checks import check, finish, set_libfsa, skip
from forks import Forks

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../.."))
BUILD = os.path.abspath(os.environ.get("BUILD", os.path.join(ROOT, "build")))
CPU = os.path.abspath(os.environ.get("CPU", os.path.join(ROOT, "train_gpt_nsa_cpu")))
GOLDEN = os.path.join(ROOT, "dev/test/golden/hf.txt")
sys.path[:0] = [os.path.join(ROOT, d) for d in ("scripts/hf", "data")]
TOLERANCE = 1e-4  # relative Frobenius error of logits
VOCAB, TOKENS = 70, 90
GOLDEN_POSITIONS = range(9, TOKENS, 20)


# ----------------------------------------------------------------------------
# Tiny models

BASE = {
    **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
NSA = {
    **{"architectures": ["NsaForCausalLM"], "model_type": "nsa", "attention_bias": False, "head_dim": 12},
    **{
        "rope_theta": 1e4,
        "rope_factor": 0,
        "rope_low_freq": 1,
        "rope_high_freq": 4,
        "rope_original_len": 256,
    },
    **{"nsa_cmp_len": 8, "nsa_cmp_stride": 4, "nsa_block": 16, "nsa_topk": 3, "nsa_init_blocks": 1},
    **{"nsa_local_blocks": 1, "nsa_window": 12, "nsa_scale": 0.0, "nsa_qk_norm": False, "nsa_phi": "mean"},
    "nsa_gate_per_token": False,
    "auto_map": {
        **{
            "AutoConfig": "configuration_nsa.NsaConfig",
            "AutoModelForCausalLM": "modeling_nsa.NsaForCausalLM",
        },
    },
}


def _family(architecture, dtype="F32", shards=1, **config):
    kind = architecture.removesuffix("ForCausalLM").lower()
    return {"config": {**BASE, "architectures": [architecture], "model_type": kind, **config}, "dtype": dtype,
            "shards": shards}  # fmt: skip


# Old and new styles of config.json, all types of weights, one file and several.
FAMILIES = {
    "llama": _family("LlamaForCausalLM", rope_theta=1e4),
    "llama3": _family(
        "LlamaForCausalLM", "BF16", rope_theta=5e5, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "llama3_new": _family(
        *("LlamaForCausalLM", "F16"), shards=2, rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}, head_dim=16
    ),
    "mistral": _family("MistralForCausalLM", "BF16", sliding_window=20, rope_theta=1e6, dtype_key="bfloat16"),
    "mistral_full": _family("MistralForCausalLM", sliding_window=None),
    "qwen2": _family(
        *("Qwen2ForCausalLM", "BF16"), tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6,
        "rope_type": "default"}, use_sliding_window=False, sliding_window=24, max_window_layers=0
    ),  # fmt: skip
    "qwen2_window": _family(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=24, max_window_layers=0, rope_theta=1e4
    ),
    "qwen3": _family("Qwen3ForCausalLM", shards=3, head_dim=20, rope_theta=1e6),
    "qwen3_hybrid": _family(
        *("Qwen3ForCausalLM", "BF16"), num_hidden_layers=5, use_sliding_window=True, sliding_window=12, head_dim=12,
        max_window_layers=0, rope_theta=1e4, layer_types=2 * ["sliding_attention", "full_attention"] + ["sliding_attention"]
    ),  # fmt: skip
    "nsa": _family("NsaForCausalLM", **NSA),
    "nsa_linear": _family(
        *("NsaForCausalLM", "BF16"), shards=2, **{**NSA, "nsa_phi": "linear", "attention_bias": True}
    ),
    "nsa_hybrid": _family(
        *("NsaForCausalLM", "BF16"), **{**NSA, "num_hidden_layers": 5, "nsa_full_every": 2, "nsa_phi": "linear",
        "attention_bias": True, "nsa_qk_norm": True}
    ),  # fmt: skip
    "nsa_token": _family(
        "NsaForCausalLM", **{**NSA, "nsa_gate_per_token": True, "nsa_qk_norm": True, "tie_word_embeddings": True,
        "rope_factor": 8.0, "rope_original_len": 32, "nsa_scale": 0.5}
    ),  # fmt: skip
}
LARGE = _family("LlamaForCausalLM", hidden_size=256, intermediate_size=700, vocab_size=1000, rope_theta=1e4)


def shapes(config):
    """Returns {name: shape} of the tensors of a model, written down apart from scripts/hf/weights.py."""
    c, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d, hidden = config.get("head_dim") or c // heads, config["intermediate_size"]
    kind = config["architectures"][0]
    found = {"model.embed_tokens.weight": (config["vocab_size"], c), "model.norm.weight": (c,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], c)
    for i in range(layers):
        p, a = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        found |= {p + "input_layernorm.weight": (c,), p + "post_attention_layernorm.weight": (c,)}
        found |= {p + "mlp.gate_proj.weight": (hidden, c), p + "mlp.up_proj.weight": (hidden, c)}
        found |= {p + "mlp.down_proj.weight": (c, hidden), a + "o_proj.weight": (c, heads * d)}
        for x, n in (("q", heads), ("k", kv), ("v", kv)):
            found[a + x + "_proj.weight"] = (n * d, c)
            if kind == "Qwen2ForCausalLM" or config.get("attention_bias"):
                found[a + x + "_proj.bias"] = (n * d,)
        if kind == "Qwen3ForCausalLM" or config.get("nsa_qk_norm"):
            found |= {a + "q_norm.weight": (d,), a + "k_norm.weight": (d,)}
        every = config.get("nsa_full_every", 0)
        if kind == "NsaForCausalLM" and not (every and i % every == every - 1):
            gates, length = 3 if config["nsa_gate_per_token"] else 3 * heads, config["nsa_cmp_len"]
            found |= {a + "gate_proj.weight": (gates, c), a + "gate_proj.bias": (gates,)}
            if config["nsa_phi"] == "linear":
                found |= {a + "compress_k": (kv, length * d, d), a + "compress_pe": (kv, length, d)}
                found[a + "compress_v"] = (kv, length * d, d)
    return found


def weights(family):
    """Returns {name: values}, random, of the family's type."""
    import ml_dtypes
    import numpy as np

    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[family["dtype"]]
    rng = np.random.default_rng(7)
    found = {}
    for name, shape in shapes(family["config"]).items():
        scale = 0.3 if len(shape) == 1 else 1.5 / math.sqrt(shape[-2] if "compress_" in name else shape[-1])
        centre = 1 if "norm" in name else 0
        found[name] = (centre + scale * rng.standard_normal(shape)).astype(dtype)
    return found


def safetensors_bytes(tensors, dtype, edit=lambda header: header):
    """Returns a safetensors file. edit(header) returns the header to write."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        content = values.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(edit(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(path, content):
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else (json.dumps(content) + "\n").encode())


def make_folder(path, family, tensors=None):
    """Writes a Hugging Face folder of a family."""
    os.makedirs(path)
    tensors = weights(family) if tensors is None else tensors
    write(os.path.join(path, "config.json"), family["config"])
    names = list(tensors)
    if family["shards"] == 1:
        write(os.path.join(path, "model.safetensors"), safetensors_bytes(tensors, family["dtype"]))
    else:
        weight_map = {}
        for i in range(family["shards"]):
            file = f"model-{i + 1:05}-of-{family['shards']:05}.safetensors"
            part = {name: tensors[name] for name in names[i :: family["shards"]]}
            weight_map |= dict.fromkeys(part, file)
            write(os.path.join(path, file), safetensors_bytes(part, family["dtype"]))
        write(os.path.join(path, "model.safetensors.index.json"), {"metadata": {}, "weight_map": weight_map})
    if family["config"]["model_type"] == "nsa":
        for file in ("configuration_nsa.py", "modeling_nsa.py"):
            shutil.copy(os.path.join(ROOT, "scripts/hf", file), path)
    return path


def imported(name):
    """Returns the checkpoint of a family, which the first call imports from its folder."""
    folder, path = os.path.join(TMP, name), os.path.join(TMP, name + ".bin")
    if not os.path.exists(folder):
        make_folder(folder, FAMILIES[name])
        run_ok("from_hf.py", folder, "-o", path)
    return path


def exported(name, dtype):
    """Returns the folder of an exported family, which the first call exports from its checkpoint."""
    folder = os.path.join(TMP, f"{name}.{dtype}")
    if not os.path.exists(folder):
        run_ok("to_hf.py", imported(name), "-o", folder, "--dtype", dtype)
    return folder


def test_tokens():
    return [(i * i * 31 + 7 * i) % VOCAB for i in range(TOKENS)]


# ----------------------------------------------------------------------------
# Programs


def run(program, *args):
    return forks.run(os.path.join(ROOT, "scripts", program), *args)


def run_ok(program, *args):
    result = run(program, *args)
    check(result.returncode == 0, f"{program} {args}: {result.stderr.strip()}")
    return result.returncode == 0


def all_refused(cases):
    """Runs refused() for each tuple of arguments, on all cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: refused(*case), cases))


def refused(what, expected, program, *args):
    """Checks that a program ends with one line on stderr with `expected`, and leaves nothing behind."""
    folder = tempfile.mkdtemp(dir=TMP)
    result = run(program, *args, "-o", os.path.join(folder, "out.bin"))
    line = result.stderr.strip()
    check(
        result.returncode == 1 and line.startswith("error: ") and "\n" not in line and expected in line,
        f"{what}: expected one line with {expected!r}, not code {result.returncode}: {line[:500]}",
    )
    check("defect" not in line, f"{what}: {line[:300]}")
    check(not os.listdir(folder), f"{what}: left {os.listdir(folder)}")


def c_logits(path, tokens):
    """Returns the C trainer's logits [tokens, vocabulary]."""
    import numpy as np

    result = subprocess.run(
        [os.path.join(BUILD, "logits"), path, *map(str, tokens)], capture_output=True, text=True
    )
    if result.returncode:
        check(False, f"logits {path}: {result.stderr.strip()}")
        return np.zeros((len(tokens), 1))
    return np.array([line.split() for line in result.stdout.splitlines()], np.float64)


def error(values, expected):
    import numpy as np

    if values.shape != expected.shape:
        return math.inf
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def read_golden():
    """Returns {family: logits [GOLDEN_POSITIONS, vocabulary]}."""
    import numpy as np

    found = {}
    with open(GOLDEN) as f:
        for line in f:
            name, *values = line.split()
            found.setdefault(name, []).append([float(v) for v in values])
    return {name: np.array(rows) for name, rows in found.items()}


def read_tensors(folder):
    """Returns {name: (type, shape, bytes)} of a folder."""
    found = {}
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        data = open(path, "rb").read()
        (size,) = struct.unpack("<Q", data[:8])
        for name, t in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + n for n in t["data_offsets"])
                found[name] = (t["dtype"], tuple(t["shape"]), data[begin:end])
    return found


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


# ----------------------------------------------------------------------------
# Tests


def test_families():
    import checkpoint
    import ml_dtypes
    import numpy as np
    import weights as names

    golden = read_golden()
    check(golden.keys() == FAMILIES.keys(), f"golden/hf.txt has {sorted(golden)}; run golden_hf.py")
    for name in families:
        family, path = FAMILIES[name], imported(name)
        if not os.path.exists(path):
            continue
        logits = c_logits(path, test_tokens())[GOLDEN_POSITIONS]
        worst = error(logits, golden[name])
        check(worst < TOLERANCE, f"{name}: logits differ from those of transformers by {worst:.1e}")
        reader, padding = checkpoint.Reader(path), []
        for tensor in reader.table:
            size = sum(math.prod(part.shape) for part in names.parts(tensor, reader.model))
            padding.append(np.concatenate(list(reader.read(tensor)))[size:])
        padding = np.concatenate(padding)
        check(padding.size and not padding.any(), f"{name}: padded rows are not 0")
        max_len = json.loads(read_bytes(os.path.join(exported(name, "fp32"), "config.json")))[
            "max_position_embeddings"
        ]
        expected_len = max(256, reader.model["rope-original-len"] * max(reader.model["rope-factor"], 1))
        check((reader.seq_len, max_len) == (256, expected_len), f"{name}: context of {reader.seq_len}, {max_len}")
        source = weights(family)
        for dtype, code in (("fp32", "F32"), ("bf16", "BF16")):
            tensors = read_tensors(exported(name, dtype))
            check(
                tensors.keys() == source.keys(), f"{name}: exported {sorted(tensors.keys() ^ source.keys())}"
            )
            if dtype == "fp32":
                expected = {key: values.astype(np.float32) for key, values in source.items()}
            else:
                expected = {key: values.astype(ml_dtypes.bfloat16) for key, values in source.items()}
            for key, values in expected.items():
                same = tensors.get(key) == (code, values.shape, values.tobytes())
                check(same, f"{name}: {key} is not the same after import and export as {dtype}")
        run_ok("from_hf.py", exported(name, "fp32"), "-o", path + ".again")
        same = read_bytes(path) == read_bytes(path + ".again")
        check(same, f"{name}: the exported folder makes another checkpoint")


def test_help():
    """-h has the defaults of the sizes."""
    from config import NSA_DEFAULTS

    text = " ".join(run("from_hf.py", "-h").stdout.split())
    for flag in ("cmp-len", "cmp-stride", "block", "topk", "init-blocks", "local-blocks", "window"):
        found = re.search(rf" --{flag} N [^(]*\((\d+)\)", text)
        check(found and int(found[1]) == NSA_DEFAULTS[flag], f"from_hf.py -h: --{flag}: {found}")


def test_attention_flags():
    """llama to nsa: every flag reaches the model, and the gates are those that were asked for."""
    import checkpoint
    import numpy as np

    source = imported("llama").removesuffix(".bin")
    sizes = ["--attn", "nsa", "--cmp-len", 8, "--cmp-stride", 4, "--block", 16, "--topk", 99, "--window", 200]
    sizes += ["--local-blocks", 3, "--init-blocks", 2]
    full = c_logits(source + ".bin", test_tokens())
    for phi, extra in (("mean", []), ("linear", ["--phi", "linear"])):
        path = os.path.join(TMP, f"flags_{phi}.bin")
        # all blocks and the whole window are visible: with gates of 0, 1 and 0, nsa is full attention
        run_ok("from_hf.py", source, "-o", path, *sizes, "--gate", "1e-12,0.999999999999,1e-12", *extra)
        reader = checkpoint.Reader(path)
        check((reader.model["topk"], reader.model["window"]) == (99, 200), "flags: sizes not stored")
        check(reader.model["phi"] == (phi == "linear"), "flags: phi not stored")
        check(
            error(c_logits(path, test_tokens()), full) < 1e-5,
            f"nsa, phi {phi}: gates 0, 1, 0 are not full attention",
        )
    small = ["--attn", "nsa", "--cmp-len", 8, "--cmp-stride", 4, "--block", 16, "--topk", 4, "--window", 16]
    logits = []
    for phi in ("mean", "linear"):
        path = os.path.join(TMP, f"begins_{phi}.bin")
        run_ok("from_hf.py", source, "-o", path, *small, "--gate", "0.5,0.5,0.5", "--phi", phi)
        logits.append(c_logits(path, test_tokens()))
    check(error(*logits) < 1e-5, "a new linear compression is not the mean")
    check(error(logits[0], full) > 0.01, "nsa with a small window is full attention")
    path = os.path.join(TMP, "gates.bin")
    run_ok("from_hf.py", source, "-o", path, "--attn", "nsa", "--gate", "0.25,0.5,0.75")
    reader = checkpoint.Reader(path)
    for tensor in reader.table:
        values = np.concatenate(list(reader.read(tensor)))
        if tensor.name == "bgate":
            check(np.allclose(1 / (1 + np.exp(-values[:12])), [0.25, 0.5, 0.75] * 4), "--gate: wrong biases")
    # the window of a Qwen3 model whose every second layer is full becomes nsa, and these layers stay as they are
    hybrid, path = imported("qwen3_hybrid"), os.path.join(TMP, "hybrid_nsa.bin")
    run_ok("from_hf.py", hybrid.removesuffix(".bin"), "-o", path, "--attn", "nsa")
    reader = checkpoint.Reader(path)
    gates = [t.layer for t in reader.table if t.name == "wgate"]
    check((reader.model["full-every"], gates) == (2, [0, 2, 4]), f"full-every of a Qwen3: gates of {gates}")
    path = os.path.join(TMP, "hybrid_full.bin")
    run_ok("from_hf.py", hybrid.removesuffix(".bin"), "-o", path, "--attn", "full")
    check(checkpoint.Reader(path).model["full-every"] == 0, "--attn full keeps full-every")
    path = os.path.join(TMP, "full_every.bin")
    run_ok("from_hf.py", source, "-o", path, "--attn", "nsa", "--full-every", 2)
    check(checkpoint.Reader(path).model["full-every"] == 2, "--full-every is not stored")
    path = os.path.join(TMP, "window.bin")
    run_ok("from_hf.py", source, "-o", path, "--attn", "window", "--window", 256)
    check(error(c_logits(path, test_tokens()), full) < 1e-6, "a window of all tokens is not full attention")


def test_large():
    """Several chunks of checksums, and pieces of tensors that end in them."""
    import checkpoint
    import safetensors_files

    folder = make_folder(os.path.join(TMP, "large"), LARGE)
    path = os.path.join(TMP, "large.bin")
    run_ok("from_hf.py", folder, "-o", path)
    check(os.path.getsize(path) > 3 << 20, "large: less than four chunks")
    logits = c_logits(path, test_tokens()[:3])  # the C code verifies the checksums
    check(logits.shape == (3, 1000), "large: the C trainer cannot read it")
    out = os.path.join(TMP, "large_out")
    run_ok("to_hf.py", path, "-o", out, "--dtype", "fp32")
    expected = {name: ("F32", v.shape, v.tobytes()) for name, v in weights(LARGE).items()}
    check(read_tensors(out) == expected, "large: not the same after import and export")
    good = read_bytes(path)
    end = len(good) - 8 * len(checkpoint.Reader(path).sums)
    for at in (4096 + 5, 4096 + (2 << 20) + 5, end - 5):  # the last one is in the last, shorter chunk
        write(os.path.join(TMP, "large_damaged.bin"), good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused(f"a flipped bit at {at}", "wrong checksum", "to_hf.py", os.path.join(TMP, "large_damaged.bin"))
    # small pieces and shards, in this process
    sizes = checkpoint.BATCH_CHUNKS, safetensors_files.PIECE_FLOATS, safetensors_files.MAX_SHARD_BYTES
    checkpoint.BATCH_CHUNKS, safetensors_files.PIECE_FLOATS, safetensors_files.MAX_SHARD_BYTES = (
        1,
        1000,
        10**6,
    )
    import weights as names

    reader = checkpoint.Reader(path)
    parts = [part for tensor in reader.table for part in names.parts(tensor, reader.model)]
    out = os.path.join(TMP, "large_shards")
    os.makedirs(out)
    writer = safetensors_files.FolderWriter(out, parts, "F32")
    load("to_hf").write_weights(reader, writer)
    writer.finish()
    checkpoint.BATCH_CHUNKS, safetensors_files.PIECE_FLOATS, safetensors_files.MAX_SHARD_BYTES = sizes
    check(len(glob.glob(os.path.join(out, "*.safetensors"))) >= 4, "large: too few shards")
    check(read_tensors(out) == expected, "large: the shards differ")
    shutil.copy(os.path.join(folder, "config.json"), out)
    run_ok("from_hf.py", out, "-o", path + ".again")
    check(read_bytes(path) == read_bytes(path + ".again"), "large: the shards make another checkpoint")


def load(program):
    """Returns a program of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(program, os.path.join(ROOT, "scripts", program + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def old_checkpoint(path, version, out):
    """Writes an nsa checkpoint of weights alone as one of version 1, 2 or 3, with m and v."""
    import checkpoint
    import numpy as np

    reader = checkpoint.Reader(path)
    values = {t: np.concatenate(list(reader.read(t))) for t in reader.table}
    table = checkpoint.param_table(reader.model, version)
    params = np.concatenate([values[t] for t in table if version > 2 or t.name != "bgate"])
    arrays = [params, params + 1, params + 2]
    header = bytearray(read_bytes(path)[: checkpoint.HEADER_BYTES])
    fields = checkpoint.num_fields(version)  # TrainState is right behind them
    struct.pack_into("<3q", header, 8, version, params.size, fields)
    struct.pack_into("<q", header, 40, 3 if version > 2 else 0)
    begin, end = 64 + 8 * fields, 64 + 8 * (len(checkpoint.FIELDS) + checkpoint.TRAIN_STATE_FIELDS)
    header[begin:end] = header[64 + 8 * len(checkpoint.FIELDS) : end] + bytes(8)
    struct.pack_into("<Q", header, checkpoint.HEADER_BYTES - 8, checkpoint.checksum(bytes(header[:-8])))
    sums = []
    for array, data in enumerate(arrays):
        for chunk, begin in enumerate(range(0, params.size, checkpoint.CHUNK_FLOATS)):
            part = data[begin : begin + checkpoint.CHUNK_FLOATS]
            sums.append(checkpoint.checksum(part.tobytes(), array << 56 | chunk))
    write(out, bytes(header) + b"".join(a.tobytes() for a in arrays) + struct.pack(f"<{len(sums)}Q", *sums))


def test_old_versions():
    import numpy as np

    for family in ("nsa_linear", "nsa_token"):
        path = imported(family)
        for version in (1, 2, 3):
            old = os.path.join(TMP, f"{family}_v{version}.bin")
            old_checkpoint(path, version, old)
            out = os.path.join(TMP, f"{family}_v{version}")
            run_ok("to_hf.py", old, "-o", out, "--dtype", "fp32")
            found = read_tensors(out)
            for name, values in weights(FAMILIES[family]).items():
                values = values.astype(np.float32)
                values = np.zeros_like(values) if version < 3 and name.endswith("gate_proj.bias") else values
                check(
                    found[name] == ("F32", values.shape, values.tobytes()),
                    f"{family} version {version}: {name}",
                )
            run_ok("from_hf.py", out, "-o", old + ".again")
            worst = error(c_logits(old + ".again", test_tokens()), c_logits(old, test_tokens()))
            check(worst == 0, f"{family} version {version}: the C trainer reads another model")


def test_trained_checkpoint():
    """A run of the C trainer: its checkpoint has AdamW's m and v, and a tokenizer of bytes."""
    import checkpoint
    import numpy as np

    data = os.path.join(TMP, "data")
    text = os.path.join(TMP, "text.txt")
    write(text, b"Native sparse attention. " * 400)
    log = os.path.join(TMP, "log")
    commands = [
        [os.path.join(BUILD, "text"), "-o", data, "-name", "text", text],
        [
            CPU,
            "-e",
            "tiny",
            "-layers",
            1,
            "-i",
            f"{data}/text_train_*.bin",
            "-o",
            log,
            "-x",
            2,
            "-b",
            1,
            "-t",
            64,
        ],
    ]
    for command in commands:
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        check(result.returncode == 0, f"{command}: {result.stderr.strip()}")
    path = os.path.join(log, "ckpt_00000002.bin")
    out = os.path.join(TMP, "trained")
    run_ok("to_hf.py", path, "-o", out, "--dtype", "fp32")
    again = os.path.join(TMP, "trained_again/again.bin")
    run_ok("from_hf.py", out, "-o", again)
    a, b = checkpoint.Reader(path), checkpoint.Reader(again)
    for tensor in a.table:
        x, y = (np.concatenate(list(reader.read(tensor))) for reader in (a, b))
        size = (
            a.model["vocab"] * tensor.cols if tensor.name in ("wte", "lm_head") else x.size
        )  # without padding
        check(np.array_equal(x[:size], y[:size]), f"trained checkpoint: {tensor} differs")
    check(
        os.path.exists(os.path.join(TMP, "trained_again/tokenizer.bin")), "no tokenizer.bin from a run's own"
    )
    import tokenizers

    t = tokenizers.Tokenizer.from_file(os.path.join(out, "tokenizer.json"))
    ids = t.encode("Aé \n", add_special_tokens=False).ids
    check(ids == list("Aé \n".encode()), f"tokenizer.json of bytes encodes to {ids}")
    check(t.decode(ids) == "Aé \n", "tokenizer.json of bytes decodes to another text")


def test_close_branch():
    """dev/results/close_branch.py: the gates of a branch are 0 in the trainer, and all else stays."""
    import checkpoint
    import numpy as np

    text, data, log = (os.path.join(TMP, name) for name in ("gates.txt", "gates", "gates_log"))
    write(text, b"Native sparse attention. " * 100)
    for command in ([os.path.join(BUILD, "text"), "-o", data, "-name", "text", text],
                    [CPU, "-e", "tiny", "-layers", 2, "-i", f"{data}/text_train_*.bin", "-o", log, "-x", 1, "-b", 1, "-t", 64]):  # fmt: skip
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        check(result.returncode == 0, f"{command}: {result.stderr.strip()}")
    path = os.path.join(log, "ckpt_00000001.bin")

    def validate(name):
        command = [CPU, "-e", name, "-val", "1", "-j", f"{data}/text_train_*.bin", "-b", "1", "-t", "64"]
        out = subprocess.run(command, capture_output=True, text=True).stdout
        return [float(x) for x in re.findall(r"(?:compressed|selected|sliding) ([0-9.]+)", out)], re.search("val loss ([0-9.]+)", out)[1]

    gates, loss = validate(path)
    for i, branch in enumerate(("compressed", "selected", "sliding")):
        copy = os.path.join(TMP, branch + ".bin")
        program = os.path.join(ROOT, "dev/results/close_branch.py")
        result = subprocess.run([sys.executable, program, path, branch, "-o", copy], capture_output=True, text=True)
        check((result.returncode, result.stderr) == (0, ""), f"close_branch.py {branch}: {result.stderr}")
        closed, other_loss = validate(copy)
        check(gates[i] > 0.05 and closed[i] == 0 and other_loss != loss, f"{branch}: gates {gates}, then {closed}")
        a, b = checkpoint.Reader(path), checkpoint.Reader(copy)
        for tensor in a.table:
            x, y = (np.concatenate(list(reader.read(tensor))) for reader in (a, b))
            if tensor.name == "bgate":
                count = checkpoint.num_gate_logits(a.model)
                check((y[i:count:3] == -100).all(), f"{branch}: {y}")
                x[i:count:3] = y[i:count:3]
            check(np.array_equal(x, y), f"{branch}: {tensor} differs")
        again = subprocess.run([sys.executable, program, path, branch, "-o", copy], capture_output=True, text=True)
        check(again.returncode == 1 and again.stderr == f"error: {copy}: exists already; remove it or choose another name\n", again.stderr)


def test_tokenizer():
    """tokenizer.json in, tokenizer.bin, and a tokenizer.json made from it alone."""
    import tokenizer_json
    import tokenizers
    import vocab

    text = " ".join(
        f"{a}{b} it's 12{a}, the {b}" for a in ("sparse", "tokén", "ab") for b in ("rows", "cols", "\n")
    )
    made = vocab.train([text.encode()] * 8, VOCAB + 256)
    for name, source in (("kept", True), ("rebuilt", False)):
        family = _family("LlamaForCausalLM", vocab_size=VOCAB + 300)
        folder = make_folder(os.path.join(TMP, f"tokenizer_{name}"), family)
        write(os.path.join(folder, "tokenizer.json"), made.hf_json.encode())
        write(os.path.join(folder, "generation_config.json"), {"eos_token_id": 0})
        place = os.path.join(TMP, f"tokenizer_{name}_out")
        os.makedirs(place)
        path = os.path.join(place, "model.bin")
        run_ok("from_hf.py", folder, "-o", path)
        size = struct.unpack_from("<3i", read_bytes(os.path.join(place, "tokenizer.bin")))[2]
        check(size == VOCAB + 300, f"tokenizer.bin has {size} tokens, the model {VOCAB + 300}")
        side = os.path.join(place, "model.hf")
        check(os.path.isdir(side) and sorted(os.listdir(side)) == ["generation_config.json", "tokenizer.json"], "side folder")
        command = [CPU, "-e", path, "-sample", "1", "-g", "3", "-t", "64", "-prompt", "the tokén"]
        sample = subprocess.run(command, capture_output=True)
        check(sample.returncode == 0, f"the trainer cannot use tokenizer.bin: {sample.stderr}")
        write(os.path.join(place, "q.jsonl"), {"context": "the", "choices": [" rows", " cols"], "label": 1})
        questions = ["-o", os.path.join(place, "q.bin"), "--tokenizer", folder, os.path.join(place, "q.jsonl")]
        run_ok("../data/mc", *questions)
        asked = subprocess.run([CPU, "-e", path, "-val", "1", "-t", "64", "-b", "1", "-mc", questions[1]], capture_output=True)
        check(asked.returncode == 0, f"a file of the model's own tokenizer, which has fewer tokens: {asked.stderr}")
        if not source:
            shutil.rmtree(side)
        out = os.path.join(place, "hf")
        run_ok("to_hf.py", path, "-o", out)
        if source:
            check(
                read_bytes(os.path.join(out, "tokenizer.json")) == made.hf_json.encode(),
                "tokenizer.json is not kept",
            )
        a = tokenizers.Tokenizer.from_str(made.hf_json)
        b = tokenizers.Tokenizer.from_file(os.path.join(out, "tokenizer.json"))
        for line in (text, "  two  spaces\t\r\n x", "naïve 1234 'll don't", "<|endoftext|>the"):
            x, y = (t.encode(line, add_special_tokens=False).ids for t in (a, b))
            check(x == y, f"{name} tokenizer.json: {line!r} is {y}, not {x}")
            check(
                b.decode(y, skip_special_tokens=False) == line,
                f"{name} tokenizer.json: {line!r} decodes wrong",
            )
    # one folder has one tokenizer
    other = vocab.train([b"other text " * 50], VOCAB + 256)
    write(os.path.join(TMP, "tokenizer_kept/tokenizer.json"), other.hf_json.encode())
    result = run("from_hf.py", os.path.join(TMP, "tokenizer_kept"), "-o", os.path.join(place, "second.bin"))
    check(
        result.returncode == 1 and "is another tokenizer" in result.stderr, "another tokenizer in the folder"
    )
    check("second.bin" not in os.listdir(place), "another tokenizer: left a checkpoint")
    os.unlink(os.path.join(TMP, "tokenizer_kept/tokenizer.json"))
    result = run("from_hf.py", os.path.join(TMP, "tokenizer_kept"), "-o", os.path.join(place, "second.bin"))
    wanted = "has no tokenizer.json, so it is another model's"
    check(result.returncode == 1 and wanted in result.stderr, f"no tokenizer beside another's: {result.stderr}")
    # the files of a model that was converted before under this name
    place = os.path.join(TMP, "tokenizer_side_out")
    os.makedirs(os.path.join(place, "model.hf"))
    write(os.path.join(place, "model.hf/vocab.json"), {})
    run_ok("from_hf.py", os.path.join(TMP, "tokenizer_kept"), "-o", os.path.join(place, "model.bin"))
    check(os.listdir(os.path.join(place, "model.hf")) == ["generation_config.json"], "files of an earlier model stay")
    # words of the header: end-of-text, kind, pre-tokenizer, BOS, unknown token
    good = made.tokenizer_bin()
    for word, value in ((3, VOCAB + 256), (4, 7), (5, 99), (7, -2), (8, 10**6), (None, None)):
        bad = bytearray(good)
        if word is None:
            bad += b"1"
        else:
            struct.pack_into("<i", bad, 4 * word, value)
        try:
            tokenizer_json.from_bin(bytes(bad), "name")
            check(False, f"tokenizer.bin with word {word} {value} is taken")
        except SystemExit as e:
            check("not a valid tokenizer.bin" in str(e), f"word {word} {value}: {e}")


def test_sentencepiece():
    """tokenizer.bin of SentencePiece's kind, and a tokenizer.json made from it alone: the same tokens and text."""
    import random

    import test_bpe
    import tokenizer_json
    import tokenizers
    import vocab

    rng = random.Random(5)
    base = test_bpe.sentencepiece_json(rng)
    metaspace = {"type": "Metaspace", "replacement": vocab.METASPACE}
    replace = base["normalizer"]["normalizers"][1]
    decoders = base["decoder"]["decoders"]
    no_strip = {"type": "Sequence", "decoders": decoders[:-1]}
    normalized = [{**token, "normalized": True} for token in base["added_tokens"]]
    cases = {"llama2": {}, "normalized": {"added_tokens": normalized}}
    cases["gemma"] = {"normalizer": replace, "decoder": no_strip}
    cases["no_bytes"] = {"model": {**base["model"], "byte_fallback": False}}
    for scheme in ("first", "always", "never"):
        for split in (False, True):
            rule = {**metaspace, "prepend_scheme": scheme, "split": split}
            change = {"normalizer": None, "pre_tokenizer": rule}
            cases[f"{scheme}_{split}"] = {**change, **({"decoder": no_strip} if scheme == "never" else {})}
    texts = test_bpe.random_texts(rng, 100)
    texts += ["", " ", "the rows", "  two  spaces", "tokén 漢\x00\x7f", "<s>a</s> b<user>: <strip> c\n\n d", "\n\n"]
    for name, change in cases.items():
        text = json.dumps({**base, **change})
        made = vocab.from_hf(text, name, None)
        files = tokenizer_json.from_bin(made.tokenizer_bin(), name)
        a = tokenizers.Tokenizer.from_str(text)
        b = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        for line in texts:
            x, y = (t.encode(line, add_special_tokens=False).ids for t in (a, b))
            check(x == y, f"SentencePiece, {name}: {line!r} is {y}, not {x}")
            x, y = (t.decode(x, skip_special_tokens=False) for t in (a, b))
            check(x == y, f"SentencePiece, {name}: {line!r} decodes to {y!r}, not {x!r}")
        found = json.loads(files["generation_config.json"])
        check(found["eos_token_id"] == [base["model"]["vocab"]["</s>"]], f"SentencePiece, {name}: {found}")


def write_gguf(path, family, tensors, permuted, rope_freqs=None, **fields):
    """Writes a GGUF file as llama.cpp does. permuted: the rows of q and k are in its order for llama."""
    import gguf
    import numpy as np
    import vocab

    config, kind = family["config"], family["config"]["model_type"].replace("mistral", "llama")
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(d)
    for key, value in fields.items():
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocab.BYTE_OF, "th", "<|endoftext|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
    }
    parts |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    parts |= {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {"lm_head.weight": "output.weight"}
    for layer in range(config["num_hidden_layers"]):
        for end in ("weight", "bias"):
            names |= {f"model.layers.{layer}.{x}.{end}": f"blk.{layer}.{y}.{end}" for x, y in parts.items()}
    for name, values in tensors.items():
        if permuted and ("q_proj" in name or "k_proj" in name):
            pairs = values.reshape(-1, 2, d // 2, *values.shape[1:])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names[name], values)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf():
    import numpy as np

    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    wavelength = 2 * np.pi * 5e5 ** (np.arange(6) / 6)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    freqs = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    families = {
        "llama": (
            _family("LlamaForCausalLM", vocab_size=300, rope_theta=5e5, rope_scaling=rope),
            True,
            freqs,
        ),
        "qwen2": (_family("Qwen2ForCausalLM", vocab_size=300, rope_theta=1e6), False, None),
        "qwen3": (_family("Qwen3ForCausalLM", vocab_size=300, rope_theta=1e6, head_dim=20), False, None),
        "mistral": (
            _family("MistralForCausalLM", vocab_size=300, rope_theta=1e6, sliding_window=20),
            True,
            None,
        ),
    }
    for name, (family, permuted, rope_freqs) in families.items():
        place = os.path.join(TMP, f"gguf_{name}")
        folder, tensors = make_folder(place, family), weights(family)
        fields = {"attention.sliding_window": 20} if name == "mistral" else {}
        write_gguf(os.path.join(place, "a.gguf"), family, tensors, permuted, rope_freqs, **fields)
        run_ok("from_hf.py", folder, "-o", os.path.join(place, "folder.bin"))
        run_ok("from_hf.py", os.path.join(place, "a.gguf"), "-o", os.path.join(place, "gguf.bin"))
        same = read_bytes(os.path.join(place, "folder.bin")) == read_bytes(os.path.join(place, "gguf.bin"))
        check(same, f"GGUF, {name}: another checkpoint than that of the folder")
        check(os.path.exists(os.path.join(place, "tokenizer.bin")), f"GGUF, {name}: no tokenizer.bin")
    family, path = families["llama"][0], os.path.join(TMP, "wrong.gguf")
    whole = read_bytes(os.path.join(TMP, "gguf_llama/a.gguf"))
    cases = [("truncated", whole[:-100], "GGUF"), ("half the metadata", whole[:2000], "GGUF")]
    cases.append(("many tensors", whole[:8] + struct.pack("<Q", 1 << 40) + whole[16:], "GGUF"))
    for what, content, expected in cases:
        write(path, content)
        refused(what, expected, "from_hf.py", path)
    for what, expected, arguments in (
        ("experts", "num_experts 8", {"expert_count": 8}),
        ("partial rotary", "partial_rotary_factor 6 of 12", {"rope.dimension_count": 6}),
        ("other rope_freqs", "rope_freqs.weight: not supported", {"rope_freqs": freqs * freqs}),
    ):
        write_gguf(path, family, weights(family), True, **arguments)
        refused(f"GGUF, {what}", expected, "from_hf.py", path)


def test_refused_configs():
    """Every kind of model that the trainers cannot run, and every kind of wrong value."""
    cases = [
        ("llama", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ("llama", {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is not supported"),
        ("llama", {"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
        ("qwen3", {"num_experts": 8}, "num_experts 8: not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "layers differ"),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
         "layers differ"),
        ("qwen3_hybrid", {"layer_types": 2 * ["sliding_attention", "full_attention"] + ["full_attention"]},
         "layers differ"),
        ("qwen3_hybrid", {"layer_types": ["sliding_attention", "full_attention"] + 3 * ["sliding_attention"]},
         "layers differ"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types must list"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: not supported"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu: not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias True: not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: not supported"),
        ("llama3_new", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling 'linear' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn' is not supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one RoPE for all layers"),
        ("llama", {"rope_scaling": 3}, "rope_scaling '3': must be an object"),
        ("llama", {"hidden_size": "48"}, "hidden_size '48': must be a number"),
        ("llama", {"hidden_size": 10**400}, "hidden_size 1000000000000000000000000000000000000000: too large"),
        ("llama", {"rms_norm_eps": 10**400}, "too large"),
        ("llama", {"hidden_size": None}, "no hidden_size"),
        ("llama", {"num_hidden_layers": 0}, "layers 0: must be from 1"),
        ("llama", {"num_hidden_layers": 10**9}, "layers 1000000000: must be from 1"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads 0"),
        ("llama", {"num_key_value_heads": 3}, "heads 4: must be a multiple of kv-heads 3"),
        ("llama", {"num_attention_heads": 40, "num_key_value_heads": 2, "head_dim": 2}, "at most 16 times"),
        ("llama", {"head_dim": 7}, "head-dim 7: must be even"),
        ("llama", {"vocab_size": 0}, "vocab 0: must be from 1"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes': must be true or false"),
        ("nsa", {"nsa_topk": 1}, "topk 1: must be at least init-blocks 1"),
        ("nsa", {"nsa_phi": "other"}, "phi -1"),
        ("nsa", {"nsa_window": None}, "no nsa_window"),
        ("nsa", {"nsa_full_every": 3}, "full-every 3: must be 0 (off), or from 2 to layers 2"),
        ("nsa", {"nsa_full_every": -2}, "full-every -2: must be from 0"),
    ]  # fmt: skip
    runs = []
    for name, change, expected in cases:
        family = {**FAMILIES[name], "shards": 1}
        config = {k: v for k, v in {**family["config"], **change}.items() if v is not None}
        folder = make_folder(tempfile.mkdtemp(dir=TMP) + "/f", {**family, "config": config}, weights(family))
        runs.append((f"{name} {change}", expected, "from_hf.py", folder))
    all_refused(runs)


def test_refused_flags():
    llama, nsa, mistral = (imported(name).removesuffix(".bin") for name in ("llama", "nsa", "mistral"))
    cases = [
        ([llama, "--attn", "nsa", "--topk", "2"], "topk 2: must be at least"),
        ([llama, "--attn", "nsa", "--cmp-stride", "12"], "cmp-stride 12: must divide"),
        ([llama, "--attn", "nsa", "--block", "20"], "block 20: must be a multiple of 16"),
        ([llama, "--attn", "window"], "give its size with --window"),
        ([llama, "--topk", "8"], "--topk: only nsa has it"),
        ([llama, "--window", "8"], "--window: full attention has no window"),
        ([llama, "--full-every", "2"], "--full-every: full attention has full layers alone"),
        ([llama, "--attn", "nsa", "--full-every", "3"], "full-every 3: must be 0 (off), or from 2 to layers 2"),
        ([llama, "--attn", "nsa", "--full-every", "-1"], "--full-every"),
        ([nsa, "--full-every", "2"], "--full-every:"),
        ([llama, "--gate", "0.1,0.8,0.1"], "--gate: only for new gates"),
        ([llama, "--attn", "nsa", "--gate", "0,1,0"], "--gate"),
        ([nsa, "--attn", "full"], "--attn full:"),
        ([nsa, "--topk", "8"], "--topk:"),
        ([nsa, "--gate", "0.1,0.8,0.1"], "--gate: only for new gates"),
        ([mistral, "--attn", "sparse"], "--attn"),
        ([os.path.join(TMP, "nowhere")], "neither a folder nor a .gguf file"),
        ([TMP], "config.json"),
    ]
    all_refused([(str(args[1:]), expected, "from_hf.py", *args) for args, expected in cases])


def test_refused_tensors():
    import numpy as np

    family = FAMILIES["llama"]
    q = "model.layers.1.self_attn.q_proj.weight"
    extra = np.ones(48, np.float32)

    def variant(**changes):
        tensors = weights(family)
        for name, values in changes.items():
            name = name.replace("__", ".")
            tensors.pop(name, None) if values is None else tensors.update({name: values})
        return safetensors_bytes(tensors, "F32")

    def header_edit(edit):
        return safetensors_bytes(weights(family), "F32", edit)

    def change(name=q, **values):
        return header_edit(lambda header: {**header, name: {**header[name], **values}})

    def offset(header, first, last):
        begin, end = header[q]["data_offsets"]
        return {**header, q: {**header[q], "data_offsets": [begin + first, end + last]}}

    good = variant()
    huge_names = {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    deep = b"[" * 100_000
    cases = [
        ("missing tensor", variant(model__norm__weight=None), "no tensor model.norm.weight"),
        ("missing head", variant(lm_head__weight=None), "no tensor lm_head.weight"),
        (
            "wrong shape",
            variant(model__norm__weight=np.ones(47, np.float32)),
            "model.norm.weight has shape [47]",
        ),
        (
            "transposed",
            variant(**{q.replace(".", "__"): np.ones((48, 24), np.float32)}),
            "has shape [48, 24]",
        ),
        ("o bias", variant(**{"model.layers.0.self_attn.o_proj.bias": extra}), "o_proj.bias: not supported"),
        ("q bias", variant(**{"model.layers.0.self_attn.q_proj.bias": extra}), "q_proj.bias: not supported"),
        (
            "experts",
            variant(**{"model.layers.0.mlp.experts.0.up_proj.weight": extra}),
            "experts.0.up_proj.weight",
        ),
        ("wrong dtype", change(dtype="I32"), f"{q}: dtype I32"),
        ("unknown dtype", change(dtype="F4"), "unknown dtype F4"),
        ("dtype list", change(dtype=["F32"]), "unknown dtype"),
        ("fewer bytes than the shape", change(shape=[48, 49]), "bytes for F32 of shape"),
        ("huge shape", change(shape=[1 << 61, 8]), "bytes for F32 of shape"),
        ("negative shape", change(shape=[-48, -48]), "not a list of sizes"),
        ("shape of text", change(shape="48"), "not a list of sizes"),
        ("true as a size", change(shape=[True, 48]), "not a list of sizes"),
        ("no offsets", change(data_offsets=None), "data_offsets"),
        ("one offset", change(data_offsets=[0]), "data_offsets"),
        ("no object", header_edit(lambda h: {**h, q: 5}), "no object"),
        ("overlap", header_edit(lambda h: offset(h, -4, -4)), "gap or overlap"),
        ("gap", header_edit(lambda h: offset(h, 4, 4)), "gap or overlap"),
        ("offsets behind the end", header_edit(lambda h: offset(h, 1 << 40, 1 << 40)), "gap or overlap"),
        ("truncated", good[:-4], f"truncated: {len(good) - 4} bytes found"),
        ("too long", good + b"1234", "too long"),
        ("truncated header", good[:200], "truncated"),
        ("empty", b"", "0 bytes"),
        ("seven bytes", good[:7], "7 bytes"),
        ("huge header", struct.pack("<Q", 1 << 62) + good[8:], "at most 100000000 possible"),
        ("negative header", b"\xff" * 8 + good[8:], "at most 100000000 possible"),
        ("not JSON", struct.pack("<Q", 4) + b"{{{{", "not valid JSON"),
        ("not UTF-8", struct.pack("<Q", 4) + b'"\xff\xff"', "not valid JSON"),
        ("a list", struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        ("nested too deeply", struct.pack("<Q", len(deep)) + deep, "not valid JSON"),
        ("many names", header_edit(lambda h: {**huge_names, **h}), "not supported"),
        ("a name twice", good.replace(b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj", 1), "occurs twice"),
        ("a pickle", b"\x80\x02}q\x00." * 10, "possible"),
    ]
    runs = []
    for what, content, expected in cases:
        folder = tempfile.mkdtemp(dir=TMP)
        write(os.path.join(folder, "config.json"), family["config"])
        write(os.path.join(folder, "model.safetensors"), content)
        runs.append((what, expected, "from_hf.py", folder))
    all_refused(runs)
    # a zero bias of o_proj, the old buffers and an equal copy of the tied head are taken
    tied = FAMILIES["llama3"]
    tensors = weights(tied)
    head = tensors["model.embed_tokens.weight"]
    tensors |= {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": head[0, :6]}
    tensors["model.layers.0.self_attn.o_proj.bias"] = 0 * head[0]
    path = os.path.join(TMP, "extras.bin")
    run_ok("from_hf.py", make_folder(os.path.join(TMP, "extras"), tied, tensors), "-o", path)
    check(
        read_bytes(path) == read_bytes(imported("llama3")),
        "ignored tensors change the checkpoint",
    )
    tensors["lm_head.weight"] = head + 1
    refused("an untied head", "lm_head.weight: not supported", "from_hf.py",
            make_folder(os.path.join(TMP, "extras2"), tied, tensors))  # fmt: skip


def test_refused_folders():
    index = "model.safetensors.index.json"
    cases = [
        ("no weights", lambda f: [os.unlink(p) for p in glob.glob(f + "/model*")], "no model.safetensors"),
        ("a lost shard", lambda f: os.unlink(f + "/model-00002-of-00003.safetensors"), "No such file"),
        ("an index of another folder", lambda f: write(f + "/" + index, {"weight_map": {"a": "../x.safetensors"}}),
         "is not the name of a safetensors file"),
        ("an index without a map", lambda f: write(f + "/" + index, {}), "weight_map is not an object"),
        ("an index with a wrong name", lambda f: write(f + "/" + index, {"weight_map": {
            "model.norm.weight": "model-00001-of-00003.safetensors", "other": "model-00002-of-00003.safetensors"}}),
         "no tensor other"),
        ("a tensor twice", lambda f: shutil.copy(f + "/model-00001-of-00003.safetensors",
                                                 f + "/model-00002-of-00003.safetensors"), "both"),
        ("no config", lambda f: os.unlink(f + "/config.json"), "has no config.json; give the folder"),
        ("a damaged config", lambda f: write(f + "/config.json", b"{"), "not valid JSON"),
        ("a FIFO as config", lambda f: (os.unlink(f + "/config.json"), os.mkfifo(f + "/config.json")), "a FIFO"),
        ("a damaged tokenizer", lambda f: write(f + "/tokenizer.json", b"{"), "tokenizer.json"),
    ]  # fmt: skip
    runs = []
    for what, damage, expected in cases:
        folder = make_folder(tempfile.mkdtemp(dir=TMP) + "/f", FAMILIES["qwen3"])
        damage(folder)
        runs.append((what, expected, "from_hf.py", folder))
    all_refused(runs)
    refused(
        "no GGUF", "not a valid GGUF", "from_hf.py", (write(TMP + "/a.gguf", b"GGML"), TMP + "/a.gguf")[1]
    )


def test_refused_checkpoints():
    import checkpoint
    import numpy as np
    import vocab

    path = imported("llama")
    good = read_bytes(path)
    cases = [
        ("another file", b"#!/bin/sh\n" * 1000, "not a checkpoint"),
        ("empty", b"", "not a checkpoint"),
        ("header alone", good[:3000], "truncated"),
        ("truncated", good[:-1], "truncated"),
        ("too long", good + b"1", "too long"),
        ("a flipped bit of the header", good[:100] + bytes([good[100] ^ 1]) + good[101:], "its header"),
        (
            "a flipped bit",
            good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
            "wrong checksum of the parameters",
        ),
    ]
    for what, content, expected in cases:
        write(os.path.join(TMP, "damaged.bin"), content)
        refused(what, expected, "to_hf.py", os.path.join(TMP, "damaged.bin"))
    model = {**checkpoint.Reader(path).model, "scale": 0.5}
    with checkpoint.Writer(os.path.join(TMP, "scaled.bin"), model, 64) as out:
        out.write(np.zeros(out.total, np.float32))
    refused("a scale of full attention", "scale 0.5", "to_hf.py", os.path.join(TMP, "scaled.bin"))
    hybrid = {**checkpoint.Reader(path).model, "attn": checkpoint.WINDOW, "full-every": 2}
    with checkpoint.Writer(os.path.join(TMP, "hybrid.bin"), hybrid, 64) as out:
        out.write(np.zeros(out.total, np.float32))
    refused("a window and full layers", "full-every 2", "to_hf.py", os.path.join(TMP, "hybrid.bin"))
    refused("no checkpoint", "No such file", "to_hf.py", os.path.join(TMP, "nothing.bin"))
    refused("no tokenizer", "no tokenizer.json", "to_hf.py", path, "--tokenizer", TMP)
    larger = os.path.join(TMP, "larger.json")
    write(larger, vocab.train([b"other text " * 50], VOCAB + 256).hf_json.encode())
    refused("a tokenizer of more tokens", f"tokens, the model {VOCAB}; name", "to_hf.py", path, "--tokenizer", larger)
    refused("no tokenizer file", "is neither a tokenizer.json", "to_hf.py", path, "--tokenizer", __file__)
    for program, source in (("to_hf.py", path), ("from_hf.py", os.path.join(TMP, "llama"))):
        result = run(program, source, "-o", "/proc/out.bin")
        line = "error: -o /proc/out.bin: cannot write there: No such file or directory; check the disk, or choose another folder"
        check(result.stderr.splitlines()[-1:] == [line], f"{program} to /proc: {result.stderr}")
    result = run("to_hf.py", path, "-o", TMP)
    check(
        result.returncode == 1 and "exists" in result.stderr, f"-o of a folder that exists: {result.stderr}"
    )


def test_transformers():
    """All families against transformers anew: logits, what was exported, and nsa's `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # more are slower for models as small as these

    def load_model(folder):
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)

    tokens = torch.tensor([test_tokens()])
    for name in families:
        path = imported(name)
        model, second = load_model(os.path.join(TMP, name)), load_model(exported(name, "fp32"))
        with torch.no_grad():
            logits, again = model(tokens).logits[0], second(tokens).logits[0]
        worst = error(c_logits(path, test_tokens()), logits.double().numpy())
        check(worst < TOLERANCE, f"{name}: logits differ from those of transformers by {worst:.1e}")
        check(torch.equal(logits, again), f"{name}: the exported folder gives other logits")
        if not name.startswith("nsa"):
            continue
        out = model(tokens, labels=tokens)
        out.loss.backward()
        check(
            all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()),
            f"{name}: no gradient",
        )
        # the trainer's sample begins with end-of-text, the last token of a model without tokenizer
        command = [
            CPU,
            "-e",
            path,
            "-sample",
            "1",
            "-temp",
            "0",
            "-g",
            "60",
            "-t",
            "128",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        line = [line for line in result.stdout.splitlines() if line.startswith("sample:")]
        sampled = [int(word) for word in line[0].split()[1:]] if line else result.stderr
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = model.generate(torch.tensor([[VOCAB - 1]]), **options)[0, 1:].tolist()
        end = generated.index(VOCAB - 1) if VOCAB - 1 in generated else len(generated)
        generated = generated[:end]  # the trainer stops at end-of-text
        check(generated == sampled, f"{name}: generate gives {generated}, the C trainer {sampled}")
        # padding on the left and on the right of a batch, with and without cache
        batch, mask = tokens.repeat(3, 1), torch.ones(3, TOKENS, dtype=torch.long)
        batch[1, 30:], mask[1, :30] = tokens[0, :-30], 0
        batch[2, 5:-20], mask[2, :5], mask[2, -20:] = tokens[0, : TOKENS - 25], 0, 0
        with torch.no_grad():
            padded = model(batch, attention_mask=mask).logits
            for wrong, words in (
                ({"position_ids": torch.arange(TOKENS)[None] % 30}, "position_ids begin again within a row"),
                ({"output_attentions": True}, "output_attentions: "),
            ):
                try:
                    model(tokens, **wrong)
                    check(False, f"{name}: {words} is taken")
                except ValueError as e:
                    check(words in str(e), f"{name}: {e}")
            states = model(tokens, output_hidden_states=True).hidden_states
            check(
                len(states) == model.config.num_hidden_layers + 1
                and torch.equal(states[0], model.get_input_embeddings()(tokens))
                and torch.equal(model.lm_head(states[-1])[0], logits)
                and model(tokens).hidden_states is None,
                f"{name}: hidden states",
            )
        for row, length in ((1, TOKENS - 30), (2, TOKENS - 25)):
            worst = error(padded[row][mask[row] == 1].double().numpy(), logits[:length].double().numpy())
            check(worst < 1e-5, f"{name}: padding changes logits by {worst:.1e}")
        generated = model.generate(batch[:2], attention_mask=mask[:2], **options)[1, TOKENS:].tolist()
        short = tokens[:, : TOKENS - 30]
        alone = model.generate(short, attention_mask=torch.ones_like(short), use_cache=False, **options)
        alone = alone[0, TOKENS - 30 :].tolist()
        check(generated == alone, f"{name}: generate with padding and cache gives other tokens")
        # the kernels' path gives the same; on the CPU, the package flash_sparse_attention is plain PyTorch, too
        module = sys.modules[type(model.model).__module__]
        calls, compute = [], module.native_sparse_attention
        module.kernels_take = lambda q: True

        def kernels(*x, **y):
            calls.append(1)
            check(all(z.is_contiguous() for z in x[:3]), f"{name}: rows of q, k or v that kernels refuse: {[z.stride() for z in x[:3]]}")
            return compute(*x, **y)

        module.native_sparse_attention = kernels
        batch = tokens[0, : 2 * (TOKENS // 2)].view(2, -1)
        with torch.no_grad():
            by_kernels = model(tokens).logits[0], model(batch).logits
        generated = model.generate(short, attention_mask=torch.ones_like(short), **options)
        module.kernels_take = lambda q: False
        with torch.no_grad():
            plain = logits, model(batch).logits
        for got, want in zip(by_kernels, plain):
            worst = error(got.double().numpy(), want.double().numpy())
            check(worst < 1e-5, f"{name}: the kernels' path changes logits by {worst:.1e}")
        check(generated[0, TOKENS - 30 :].tolist() == alone, f"{name}: the kernels' path generates other tokens")
        every = model.config.nsa_full_every
        layers = sum(not every or (i + 1) % every > 0 for i in range(model.config.num_hidden_layers))
        check(len(calls) == 62 * layers, f"{name}: {len(calls)} calls of the kernels, not {62 * layers}")
        with torch.no_grad():
            half = model.to(torch.bfloat16)(tokens).logits[0]
        check(half.dtype == torch.bfloat16 and bool(half.isfinite().all()), f"{name}: bf16")


def test_gpu():
    """nsa on a GPU, where the kernels take 16-bit models with 64 channels a head: their logits, also with a KV cache, differ
    from those in fp32 at most 1.5 times as much as those of plain PyTorch in the same type."""
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():
        skip("exported models on a GPU: PyTorch sees no GPU")
        return
    set_libfsa()
    tokens, start = torch.tensor([test_tokens()]).cuda(), TOKENS - 10
    for name in (name for name in families if name.startswith("nsa")):
        folder = os.path.join(TMP, name + "_64")
        config = {**FAMILIES[name]["config"], "head_dim": 64}
        make_folder(folder, {**FAMILIES[name], "config": config})
        for dtype in (torch.bfloat16, torch.float16):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).cuda()
            module = sys.modules[type(model.model).__module__]
            compute, take, calls = module.native_sparse_attention, module.kernels_take, []

            def kernels(*x, **y):
                calls.append(1)
                return compute(*x, **y)

            module.native_sparse_attention = kernels
            with torch.no_grad():
                logits = model(tokens).logits[0]
                cached, cache = [], None
                for begin, end in ((0, start), *((i, i + 1) for i in range(start, TOKENS))):
                    out = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
                    cached.append(out.logits[0])
                    cache = out.past_key_values
                count = len(calls)
                module.kernels_take = lambda q: False
                plain, exact = model(tokens).logits[0], model.float()(tokens).logits[0].double().cpu().numpy()
                module.native_sparse_attention, module.kernels_take = compute, take
            got = [error(x.double().cpu().numpy(), exact) for x in (logits, torch.cat(cached), plain)]
            check(
                all(x <= 1.5 * got[2] for x in got[:2]),
                f"{name} {dtype}: errors of logits: kernels {got[0]:.1e}, with a cache {got[1]:.1e}, PyTorch {got[2]:.1e}",
            )
            every, layers = config.get("nsa_full_every", 0), config["num_hidden_layers"]
            layers -= layers // every if every else 0
            check(count == 12 * layers, f"{name} {dtype}: {count} calls of the kernels, not {12 * layers}")


def main():
    global TMP, families, forks
    tests = {name: test for name, test in globals().items() if name.startswith("test_") and name != "test_tokens"}
    unknown = set(sys.argv[1:]) - {name.removeprefix("test_") for name in tests} - FAMILIES.keys()
    if unknown:
        print(f"error: {unknown.pop()}: neither a test nor a family; see test_hf.py", file=sys.stderr)
        return 1
    families = [name for name in FAMILIES if name in sys.argv] or list(FAMILIES)
    chosen = [test for name, test in tests.items() if name.removeprefix("test_") in sys.argv]
    tests = chosen or list(tests.values())
    needed = ("numpy", "ml_dtypes", "tokenizers", "tiktoken", "gguf")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        skip(f"scripts/from_hf.py and to_hf.py need the Python packages {', '.join(missing)}: "
             f"python3 -m pip install -r requirements.txt")  # fmt: skip
        finish()
    if {test_transformers, test_gpu} & {*tests} and any(
        importlib.util.find_spec(package) is None for package in ("torch", "transformers")
    ):
        tests = [test for test in tests if test not in (test_transformers, test_gpu)]
        skip(
            "a comparison with transformers itself needs torch and transformers: "
            "python3 -m pip install -r dev/test/requirements.txt"
        )
    forks = Forks(*needed)
    with tempfile.TemporaryDirectory() as TMP:
        sys.path.insert(0, os.path.join(ROOT, "fsa/torch"))
        os.environ["HF_MODULES_CACHE"] = os.path.join(TMP, "modules")  # transformers keeps modeling_nsa.py there
        for test in tests:
            try:
                test()
            except Exception:
                check(False, f"{test.__name__}:\n{traceback.format_exc()}")
    finish()


if __name__ == "__main__":
    sys.exit(main())
