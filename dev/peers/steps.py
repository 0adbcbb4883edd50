"""A training step of a model of Llama 3 8B's shape in PyTorch, with the attention of a system.

4 layers, 4,096 channels, 14,336 in the feed-forward layers, a vocabulary of 32,768, one sequence. Weights, gradients and
AdamW's moments are bf16, which is less work and memory than mixed precision with fp32 master weights. torch.compile
fuses all but the attention: norms, RoPE, SwiGLU and the loss. AdamW is PyTorch's fused one. RoPE comes before the
attention.
"""

import statistics

import torch
import torch.nn.functional as F
from sizes import CMP, HEAD_DIM
from torch import nn

LAYERS, CHANNELS, HIDDEN, VOCAB, THETA = 4, 4096, 14336, 32768, 500000.0
WARM_UP, STEPS = 3, 5


def weight(*shape):
    return nn.Parameter(0.02 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16))


def norm_weight():
    return nn.Parameter(torch.ones(CHANNELS, device="cuda", dtype=torch.bfloat16))


def norm(x, scale):
    return F.rms_norm(x, (x.shape[-1],), scale, 1e-5)


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@torch.compile(dynamic=False)
def before_attention(x, scale, qkv, gate, cos, sin, hq, hkv):
    """Returns q [n, Hq, d], k, v [n, Hkv, d] and the gate's logits [n, Hq, 3]."""
    x = norm(x, scale)
    q, k, v = (x @ qkv.T).unflatten(1, (-1, HEAD_DIM)).split([hq, hkv, hkv], 1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous(), (x @ gate.T).unflatten(1, (hq, 3))


@torch.compile(dynamic=False)
def after_attention(x, o, out, scale, up, down):
    x = x + o.flatten(1) @ out.T
    a, b = (norm(x, scale) @ up.T).chunk(2, 1)
    return x + (F.silu(a) * b) @ down.T


@torch.compile(dynamic=False)
def loss_of(x, scale, head, targets):
    return F.cross_entropy((norm(x, scale) @ head.T).float(), targets)


class Layer(nn.Module):
    def __init__(self, hq, hkv, linear):
        super().__init__()
        self.hq, self.hkv = hq, hkv
        self.norm1, self.norm2 = norm_weight(), norm_weight()
        self.qkv = weight((hq + 2 * hkv) * HEAD_DIM, CHANNELS)
        self.gate = weight(3 * hq, CHANNELS)
        self.out = weight(CHANNELS, hq * HEAD_DIM)
        self.up, self.down = weight(2 * HIDDEN, CHANNELS), weight(CHANNELS, HIDDEN)
        self.wk, self.wv = (weight(hkv, CMP["cmp_len"] * HEAD_DIM, HEAD_DIM) if linear else None for _ in range(2))

    def forward(self, x, attention, tensors, cos, sin):
        q, k, v, gate = before_attention(x, self.norm1, self.qkv, self.gate, cos, sin, self.hq, self.hkv)
        tensors.q, tensors.k, tensors.v, tensors.gate, tensors.wk, tensors.wv = q, k, v, gate, self.wk, self.wv
        return after_attention(x, attention(tensors), self.out, self.norm2, self.up, self.down)


class Model(nn.Module):
    def __init__(self, n, hq, hkv, linear):
        super().__init__()
        self.embedding, self.head = weight(VOCAB, CHANNELS), weight(VOCAB, CHANNELS)
        self.norm = norm_weight()
        self.layers = nn.ModuleList(Layer(hq, hkv, linear) for _ in range(LAYERS))
        frequency = THETA ** (-torch.arange(0, HEAD_DIM, 2, device="cuda").double() / HEAD_DIM)
        angle = torch.arange(n, device="cuda")[:, None, None] * frequency
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def forward(self, tokens, targets, attention, tensors):
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x, attention, tensors, self.cos, self.sin)
        return loss_of(x, self.norm, self.head, targets)


def run_step(system, job):
    """Returns the fields of a row: median milliseconds of a step and of its forward and backward pass and optimizer."""
    from harness import Tensors

    torch.manual_seed(1)
    n, hq, hkv = job["n"], job["hq"], job["hkv"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = Model(n, hq, hkv, system.STEP == "core")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = torch.randint(VOCAB, (2, n), device="cuda")
    cu_seqlens = torch.tensor([0, n], device="cuda")
    tensors = Tensors(cu_seqlens=cu_seqlens, cu_seqlens32=cu_seqlens.int())
    times = []
    for _ in range(WARM_UP + STEPS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[0].record()
        loss = model(tokens, targets, system.PARTS[system.STEP], tensors)
        events[1].record()
        loss.backward()
        events[2].record()
        optimizer.step()
        optimizer.zero_grad()
        events[3].record()
        events[3].synchronize()
        ends = zip(events[:1] + events[:3], events[3:] + events[1:])
        times.append([begin.elapsed_time(end) for begin, end in ends])
    ms, forward, backward, update = (round(statistics.median(column), 3) for column in zip(*times[WARM_UP:]))
    return {
        "dir": "step", "ms": ms, "forward_ms": forward, "backward_ms": backward, "optimizer_ms": update, "d": HEAD_DIM,
        "tokens_per_second": round(1e3 * n / ms), "memory_bytes": torch.cuda.max_memory_allocated(), "layers": LAYERS,
        "channels": CHANNELS, "vocab": VOCAB, "loss": round(loss.item(), 4), "attention": system.STEP,
    }  # fmt: skip
