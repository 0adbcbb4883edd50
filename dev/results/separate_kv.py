"""Trains the model of learning.md's 50M runs with PyTorch: with one K and V for the three branches of native sparse
attention, as the trainers have it, or with a K and V of each branch, as the paper (arXiv 2502.11089) has it.

    make libfsa.so && export LIBFSA=$PWD/libfsa.so
    python3 dev/results/separate_kv.py shared   --seed 1 -o log/learning/50m-shared-kv-1
    python3 dev/results/separate_kv.py separate --seed 1 -o log/learning/50m-separate-kv-1
    python3 dev/results/separate_kv.py equal    --seed 1 -o log/learning/50m-equal-kv-1  # a narrower MLP, so no more parameters
    python3 dev/results/curves.py add log/learning/50m-*-kv-1

It needs a GPU, and the shards in data/linux_quarter that scripts/learning.sh makes. `shared` has the initial weights, the
samples, the document mask, AdamW, the schedule and the validation of the trainer's run 50m-graded with the same seed, whose
gates begin with biases of -2, 0 and 2. So their losses must agree but for rounding. What differs: each branch's output is
rounded to bf16 before the gates, and each weight gradient of a sequence before it is added in fp32; norms' weights are not
rounded. A run cannot be resumed.
"""

import argparse
import datetime
import glob
import json
import math
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path += [os.path.join(ROOT, "fsa/torch"), os.path.join(ROOT, "scripts")]
from train_log import Parser, die  # noqa: E402

from shards import FORMATS  # noqa: E402

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    die("PyTorch is missing; run python3 -m pip install torch")
from flash_sparse_attention import attention, library, reference, rope_frequencies  # noqa: E402
from flash_sparse_attention import select_blocks, selected_attention, whole_sequences  # noqa: E402


@dataclass
class Settings:
    """A run: the shape of the preset gpt-124m, and the flags of scripts/learning.sh."""

    variant: str = "shared"
    seed: int = 1
    steps: int = 381  # 50M tokens
    data: str = "data/linux_quarter"
    seq_len: int = 16384
    sequences: int = 8  # of a step, one at a time
    lr: float = 6e-4
    warmup: int = 100
    val_every: int = 50
    layers: int = 12
    channels: int = 768
    hidden: int = 2048
    heads: int = 12
    kv_heads: int = 3
    head_dim: int = 64
    theta: float = 1e6
    cmp_len: int = 32
    cmp_stride: int = 16
    block: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    vocab: int = 0  # of tokenizer.bin
    eot: int = -1  # end-of-text


# ---- random numbers, as of llmc/rand.h -------------------------------------------------------------------------------
def signed(x):
    """Returns the int64 with the bits of a uint64. Sums and products of both wrap around to the same bits."""
    return x - (1 << 64) if x >> 63 else x


def rng_mix(z):
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & (1 << (64 - shift)) - 1)) * signed(factor)
    return z ^ (z >> 31 & (1 << 33) - 1)


def rng_key(seed, stream):
    """Returns an int64 tensor of no axis; so are seed and stream."""
    return rng_mix(rng_mix(seed + signed(0x9E3779B97F4A7C15)) + stream * signed(0xD1342543DE82EF95))


def rng_at(key, index):
    return rng_mix(key + (index + 1) * signed(0x9E3779B97F4A7C15))


def shuffled(n, seed, stream):
    """Returns 0 to n - 1 in the order of rng_shuffle, which would draw a number again once in 2^64 / n times."""
    order = list(range(n))
    draws = rng_at(rng_key(seed, torch.tensor(stream)), torch.arange(n)).tolist()
    for i, u in zip(range(n - 1, 0, -1), draws):
        j = (u & (1 << 64) - 1) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


# ---- parameters: names, order and initial values of llmc/config.h ----------------------------------------------------
NO_DECAY = ("ln1", "ln2", "lnf", "bgate", "phi_pe")


def init_parameters(s, device):
    """Returns the parameters of each layer, then those outside the layers: dicts of fp32 tensors. An initial value depends
    on the seed, the number of its tensor and its own number, as in the trainer."""
    C, d, seed = s.channels, s.head_dim, torch.tensor(s.seed)
    std = (3 * C) ** -0.5
    std_residual, noise = std / (2 * s.layers) ** 0.5, 0.02 * s.cmp_len**-0.5
    index = 0

    def new(shape, std=0.0, value=0.0):
        nonlocal index
        key, n = rng_key(seed, torch.tensor(index)).to(device), math.prod(shape)
        index += 1
        x = torch.full((n,), value, dtype=torch.float64, device=device)
        if std:
            i = 2 * torch.arange(n, device=device)
            u, v = (((rng_at(key, i + k) >> 11 & (1 << 53) - 1) + 1 - k).double() * 2.0**-53 for k in (0, 1))
            x += std * (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()
        return x.view(shape)

    def phi():
        mean = torch.eye(d, dtype=torch.float64, device=device).repeat(s.cmp_len, 1) / s.cmp_len
        return new((s.kv_heads, s.cmp_len * d, d), noise) + mean

    outer, layers = {"wte": new((-(-s.vocab // 128) * 128, C), std)}, []
    rows = (s.heads + (2 if s.variant == "shared" else 6) * s.kv_heads) * d
    hidden = s.hidden - (4 * s.kv_heads * d // 3 if s.variant == "equal" else 0)
    for _ in range(s.layers):
        w = {"ln1": new((C,), value=1), "wqkv": new((rows, C), std)}
        w |= {"wgate": new((3 * s.heads, C)), "bgate": new((3 * s.heads,)) + torch.tensor([-2, 0, 2] * s.heads, device=device)}
        w |= {"phi_wk": phi(), "phi_pe": new((s.kv_heads, s.cmp_len, d)), "phi_wv": phi()}
        w |= {"wo": new((C, s.heads * d), std_residual), "ln2": new((C,), value=1)}
        w |= {"wgu": new((2 * hidden, C), std), "wdown": new((C, hidden), std_residual)}
        layers.append(w)
    outer["lnf"] = new((C,), value=1)
    return [{name: x.float().requires_grad_() for name, x in w.items()} for w in (*layers, outer)]


# ---- the model -------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """What the layers share of a sequence of n tokens, which may hold several documents."""

    cu_seqlens: torch.Tensor
    segments: torch.Tensor
    layout: reference.BatchLayout
    rope: tuple  # cos and sin [n, 1, d/2]
    window_rope: tuple  # of the first token of each compression window


def make_batch(s, cu_seqlens):
    segments = whole_sequences(cu_seqlens)
    layout = reference.BatchLayout(cu_seqlens, segments, s.seq_len, s.seq_len, s.cmp_len, s.cmp_stride)
    frequencies = rope_frequencies(s.head_dim, s.theta, cu_seqlens.device)

    def rope_of(position):
        angle = (position.double()[:, None] * frequencies)[:, None]
        return angle.cos().float(), angle.sin().float()

    return Batch(cu_seqlens, segments, layout, rope_of(layout.key_pos), rope_of(layout.window_pos))


def rotate(x, rope):
    (a, b), (cos, sin) = x.float().chunk(2, dim=-1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rms_norm(x, weight):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def linear(x, weight, bias=None):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def layer(s, w, x, batch):
    """Computes a layer of x [n, C]. The rows of wqkv are q, and k and v of all branches or of each branch: compressed,
    selected, sliding."""
    h = rms_norm(x, w["ln1"])
    qkv = linear(h, w["wqkv"]).unflatten(1, (-1, s.head_dim))
    q, *kv = qkv.split([s.heads] + [s.kv_heads] * ((qkv.shape[1] - s.heads) // s.kv_heads), dim=1)
    k_cmp, v_cmp, k_sel, v_sel, k_win, v_win = kv * (6 // len(kv))
    phi = [w[name].to(x.dtype) for name in ("phi_wk", "phi_pe", "phi_wv")]
    kc, vc = (c.contiguous() for c in reference.compress(batch.layout, k_cmp, v_cmp, s.cmp_len, phi))
    q, kc = rotate(q, batch.rope), rotate(kc, batch.window_rope)
    k_sel, k_win = rotate(k_sel, batch.rope), rotate(k_win, batch.rope)
    of = dict(cu_seqlens=batch.cu_seqlens, segments=batch.segments)
    always = dict(block=s.block, init_blocks=s.init_blocks, local_blocks=s.local_blocks)
    windows = dict(cmp_len=s.cmp_len, cmp_stride=s.cmp_stride)
    o_cmp, lse = attention(q, kc, vc, rule="compressed", return_lse=True, **windows, **of)
    block_indices = select_blocks(q, kc, lse, topk=s.topk, **windows, **always, **of)
    o_sel = selected_attention(q, k_sel, v_sel, block_indices, **always, **of)
    o_win = attention(q, k_win, v_win, rule="window", window=s.window, **of)
    gate = linear(h, w["wgate"], w["bgate"]).float().sigmoid().unflatten(1, (s.heads, 3))
    o = sum(gate[:, :, i, None] * o for i, o in enumerate((o_cmp, o_sel, o_win))).to(x.dtype)
    x = x + linear(o.flatten(1), w["wo"])
    gate, up = linear(rms_norm(x, w["ln2"]), w["wgu"]).float().chunk(2, dim=1)
    return x + linear((F.silu(gate) * up).to(x.dtype), w["wdown"])


def classify(s, w, x, targets):
    logits = linear(rms_norm(x, w["lnf"]), w["wte"])[:, : s.vocab].float()
    return F.cross_entropy(logits, targets, reduction="none")


class Model:
    """The parameters, and the losses [n] of a sample of n + 1 tokens."""

    def __init__(self, s, device, backend="inductor"):
        self.s, self.dtype = s, torch.bfloat16 if device == "cuda" else torch.float32
        *self.layers, self.outer = init_parameters(s, device)
        self.named = [item for w in (*self.layers, self.outer) for item in w.items()]
        self.layer, self.classify = (torch.compile(f, fullgraph=True, dynamic=False, backend=backend) for f in (layer, classify))

    def losses(self, sample, cu_seqlens):
        batch, sample = make_batch(self.s, cu_seqlens), sample.long()
        x = F.embedding(sample[:-1], self.outer["wte"]).to(self.dtype)
        for w in self.layers:
            x = self.layer(self.s, w, x, batch)
        return self.classify(self.s, self.outer, x, sample[1:])


# ---- data ------------------------------------------------------------------------------------------------------------
def read_ints(file, count):
    try:
        with open(file, "rb") as f:
            return struct.unpack(f"<{count}i", f.read(4 * count)), f.seek(0, 2)
    except (OSError, struct.error) as e:
        die(f"{file}: {getattr(e, 'strerror', None) or 'is truncated'}; make the shards with scripts/learning.sh")


def load_samples(s, part, device):
    """Returns the samples [k, seq_len + 1] of a part, in the order of the shard, and the cu_seqlens [k, S + 1] of each:
    every end-of-text begins a document. A sample of fewer documents has empty ones at its end."""
    files = sorted(glob.glob(os.path.join(glob.escape(s.data), f"*_{part}_*.bin")))
    if len(files) != 1:
        die(f"{s.data}: has {len(files)} {part} shards; must have one, make it with scripts/learning.sh")
    (magic, _, count), size = read_ints(files[0], 3)
    if magic != FORMATS[2][0] or size != 1024 + 2 * count:
        die(f"{files[0]}: is no shard of 16-bit tokens, or is truncated; make it with scripts/learning.sh")
    if count <= s.seq_len:
        die(f"{files[0]}: has {count} tokens, a sample needs {s.seq_len + 1}; take a longer text")
    tokens = torch.from_file(files[0], size=512 + count, dtype=torch.int16)[512:].int() & 0xFFFF
    if tokens.max() >= s.vocab:
        die(f"{files[0]}: token {tokens.max()} is outside the vocabulary of {s.vocab}; take data of one tokenizer")
    samples = tokens[: count // (s.seq_len + 1) * (s.seq_len + 1)].view(-1, s.seq_len + 1)
    begins = samples[:, :-1] == s.eot
    begins[:, 0] = True
    cu_seqlens = torch.full((len(samples), int(begins.sum(1).max()) + 1), s.seq_len)
    for row, begin in zip(cu_seqlens, begins):
        found = begin.nonzero()[:, 0]
        row[: len(found)] = found
    return samples.to(device), cu_seqlens.to(device)


# ---- the run ---------------------------------------------------------------------------------------------------------
def learning_rate(s, step):
    """Returns that of a step, counted from 0: a rise in the first steps, then a cosine to a tenth."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    return s.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup))))


@torch.no_grad()
def validate(model, samples, cu_seqlens):
    """Returns the rows of the log: the mean loss, and that by position in the document (llmc/position_loss.h)."""
    ends = 128 * 2 ** torch.arange(23, device=samples.device)
    sums, counts = torch.zeros(2, 24, dtype=torch.float64, device=samples.device)
    for sample, cu in zip(samples, cu_seqlens):
        losses = model.losses(sample, cu).double()
        position = torch.arange(len(losses), device=cu.device)
        position -= cu[torch.searchsorted(cu, position, right=True) - 1]
        bucket = torch.bucketize(position, ends, right=True)
        sums.index_add_(0, bucket, losses), counts.index_add_(0, bucket, torch.ones_like(losses))
    sums, counts = sums.tolist(), [int(n) for n in counts.tolist()]
    loss = sum(sums) / sum(counts)
    buckets = [{"from": 64 << i if i else 0, "tokens": n, "loss": x / n} for i, (x, n) in enumerate(zip(sums, counts)) if n]
    return {"val_loss": loss, "val_perplexity": math.exp(loss), "val_tokens": sum(counts)}, {"position_loss": buckets}


def start_row(s, gpu):
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = os.environ.get("COMMIT") or subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    flags = {"i": s.data + "/", "x": s.steps, "t": s.seq_len, "d": s.sequences * s.seq_len}
    flags |= {"l": s.lr, "u": s.warmup, "seed": s.seed, "matmul": "bf16", "program": "separate_kv.py"}
    names = {"shared": "nsa", "separate": "nsa, separate K/V", "equal": "nsa, separate K/V, narrower MLP"}
    model = {name.replace("_", "-"): value for name, value in asdict(s).items() if name not in ("seed", "steps", "data")}
    return {"date": date, "commit": commit or "unknown", "gpu": gpu, "processes": 1, "flags": flags,
            "model": {"attn": names[s.variant], **model}}  # fmt: skip


def train(s, output, device="cuda", backend="inductor"):
    """Trains a model, writes OUTPUT/log.jsonl, and returns the model."""
    (magic, _, vocab, eot), _ = read_ints(os.path.join(s.data, "tokenizer.bin"), 4)
    if magic != 20260801:
        die(f"{s.data}/tokenizer.bin: is no tokenizer; make it with scripts/learning.sh")
    s = replace(s, vocab=vocab, eot=eot)
    data, val = load_samples(s, "train", device), load_samples(s, "val", device)
    # llmc/dataloader.h's first epoch, of one shard
    order = shuffled(len(data[0]), rng_key(torch.tensor(s.seed), torch.tensor(0)), 1)
    if len(order) < s.steps * s.sequences:
        die(f"--steps {s.steps}: needs {s.steps * s.sequences} samples, {s.data} has {len(order)}; take fewer steps")
    model = Model(s, device, backend)
    groups = [[x for name, x in model.named if (name in NO_DECAY) == last] for last in (False, True)]
    parameters = [x for _, x in model.named]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0}],
                                  betas=(0.9, 0.95), eps=1e-8, fused=True)  # fmt: skip
    print(f"{s.variant}: {1e-6 * sum(x.numel() for x in parameters):.2f}M parameters", flush=True)
    try:
        os.makedirs(output, exist_ok=True)
        log = open(os.path.join(output, "log.jsonl"), "x", encoding="utf-8")
    except OSError as e:
        die(f"-o {output}: log.jsonl: {e.strerror}; choose another folder")

    def write(step, **row):
        log.write(json.dumps({"step": step, "tokens": step * s.sequences * s.seq_len, **row}) + "\n")
        log.flush()
        print({"step": step, **row}, flush=True)

    def gradients(i):
        loss = model.losses(data[0][i], data[1][i]).mean() / s.sequences
        loss.backward()
        return loss.detach()

    write(0, start=start_row(s, torch.cuda.get_device_name() if device == "cuda" else None))
    gradients(order[0])  # compiles: no step's time contains that
    optimizer.zero_grad()
    for step in range(s.steps + 1):
        if step % s.val_every == 0 or step == s.steps:
            for row in validate(model, *val):
                write(step, **row)
        if step == s.steps:
            return model
        begin = time.perf_counter()
        loss = sum(gradients(i) for i in order[step * s.sequences : (step + 1) * s.sequences])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        optimizer.step()
        optimizer.zero_grad()
        loss, norm = torch.stack([loss, norm]).tolist()  # waits for the GPU
        seconds = time.perf_counter() - begin
        if not (math.isfinite(loss) and math.isfinite(norm)):
            die(f"step {step + 1}: loss {loss}, gradient norm {norm}: training has diverged")
        write(step + 1, loss=loss, lr=learning_rate(s, step), norm=norm, ms=round(1000 * seconds, 3),
              tokens_per_second=round(s.sequences * s.seq_len / seconds, 1))  # fmt: skip


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=["shared", "separate", "equal"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=381, help="of 131,072 tokens (381: 50M tokens)")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="for log.jsonl")
    args = parser.parse_args()
    if args.steps < 1:
        die(f"--steps {args.steps}: must be at least 1")
    if not torch.cuda.is_available():
        die("no GPU found; run it on a machine with one, and a PyTorch for it")
    try:
        library.load()
    except RuntimeError as e:
        die(str(e))
    data = os.path.relpath(os.path.join(ROOT, Settings.data))
    train(Settings(args.variant, args.seed, args.steps, data), args.o)


if __name__ == "__main__":
    main()
