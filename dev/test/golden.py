"""Computes golden values of native sparse attention and of small models in float64 with PyTorch's autograd.

    python3 dev/test/golden.py        (needs PyTorch; writes dev/test/golden/*.txt)

The code follows the equations of fsa/README.md with dense boolean masks [queries, keys], [queries, windows]
and [queries, blocks]. It shares no loop structure with the C code.

Inputs and weights are not stored. `uniform` below and golden_uniform in golden.h generate the same numbers
from a tensor's name and an element's index. They are multiples of 2^-19, so they are exact in float too.

A line of a file has one tensor: `name type dims = values`. Type i has decimal integers; type f has the bits
of doubles as 16 hex digits. Most tensors are stored with their last axes folded, to keep the files small:
a row of R elements is replaced by its dot product with the fixed vector uniform("fold", R).
"""
import math
import os
import struct

import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
MASK64 = (1 << 64) - 1


# ---------------------------------------------------------------- generator and file

def random_ints(name, count):
    """Returns a list of `count` 20-bit integers from SplitMix64, seeded by the FNV-1a hash of the name."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & MASK64
    out = []
    for i in range(count):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        out.append((z ^ (z >> 31)) >> 44)
    return out


def uniform(name, *shape):
    """Returns a tensor of random multiples of 2^-19 in [-1, 1)."""
    values = [x / 2.0**19 - 1.0 for x in random_ints(name, math.prod(shape))]
    return torch.tensor(values).reshape(shape)


class GoldenFile:
    """Collects the tensors of one golden file, dev/test/golden/NAME.txt."""

    def __init__(self, name, comment):
        self.name, self.lines = name, ["# " + comment]

    def ints(self, name, values):
        t = torch.as_tensor(values, dtype=torch.int64)
        self.lines.append(" ".join([name, "i", *map(str, t.shape), "=", *map(str, t.flatten().tolist())]))

    def floats(self, name, values, keep=None):
        """Adds a tensor. The axes after the first `keep` are folded; keep=None folds none."""
        t = torch.as_tensor(values, dtype=torch.float64).detach()
        if keep is not None:
            rows = t.reshape(*t.shape[:keep], -1)
            assert torch.isfinite(rows).all(), name
            t = (rows * uniform("fold", rows.shape[-1])).sum(-1)
        assert not torch.isnan(t).any(), name
        bits = [struct.pack(">d", x).hex() for x in t.flatten().tolist()]
        self.lines.append(" ".join([name, "f", *map(str, t.shape), "=", *bits]))

    def fill(self, name, shape, amplitude, offset=0.0):
        """Returns the leaf tensor offset + amplitude * uniform("<file>.<name>"). The file stores only the two
        numbers."""
        self.floats("fill." + name, [offset, amplitude])
        return (offset + amplitude * uniform(self.name + "." + name, *shape)).requires_grad_()

    def write(self):
        with open(os.path.join(FOLDER, self.name + ".txt"), "w") as f:
            f.write("\n".join(self.lines) + "\n")


# ---------------------------------------------------------------- attention

def rotate(x, position, inv_freq):
    """Applies RoPE (half rotation) to x [rows, heads, d] at position [rows]. inv_freq=None: no RoPE."""
    if inv_freq is None:
        return x
    angle = (position.double()[:, None] * inv_freq[None, :])[:, None, :]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attend(scale, q, k, v, mask):
    """Computes softmax attention under a mask. A row whose mask is empty has o = 0 and lse = -inf.

    Args:
        q: [Nq, Hq, d].
        k, v: [K, Hkv, d].
        mask: [Nq, K] or [Hkv, Nq, K].

    Returns:
        o [Nq, Hq, d], lse [Nq, Hq], probabilities [Hq, Nq, K].
    """
    g = q.shape[1] // k.shape[1]
    if mask.dim() == 2:
        mask = mask.expand(k.shape[1], -1, -1)
    mask = mask.repeat_interleave(g, dim=0)
    score = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(g, dim=1))
    not_empty = mask.any(-1, keepdim=True)
    score = torch.where(not_empty, score.masked_fill(~mask, -math.inf), torch.zeros_like(score))
    p = torch.where(mask, torch.softmax(score, dim=-1), torch.zeros_like(score))
    lse = torch.where(not_empty[..., 0], torch.logsumexp(score, dim=-1), -math.inf)
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(g, dim=1)), lse.T, p


class BatchLayout:
    """Sequence and position of each query, key, window and block of a batch, and the masks that follow.

    Args:
        c: attention configuration, a dict.
        lengths: length of each sequence.
        segments: [(sequence, position of the first query, queries)]; None: all positions are queries.
    """

    def __init__(self, c, lengths, segments=None):
        self.lengths = lengths
        self.segments = segments or [(s, 0, n) for s, n in enumerate(lengths)]
        l, s, B = c["cmp_len"], c["cmp_stride"], c["block"]

        def columns(pairs):
            t = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
            return t[:, 0], t[:, 1]

        key_seq, self.key_pos = columns([(i, t) for i, n in enumerate(lengths) for t in range(n)])
        query_seq, self.query_pos = columns([(i, p + t) for i, p, n in self.segments for t in range(n)])
        window_seq, window = columns([(i, w) for i, n in enumerate(lengths) for w in range(n)
                                      if s * w + l <= n])
        block_seq, self.block = columns([(i, j) for i, n in enumerate(lengths) for j in range(n)
                                         if B * j < n])
        self.window_pos = s * window
        t = self.query_pos[:, None]
        self.causal = (query_seq[:, None] == key_seq) & (self.key_pos <= t)
        self.sliding = self.causal & (self.key_pos > t - c["window"])
        self.past_windows = (query_seq[:, None] == window_seq) & (self.window_pos + l - 1 <= t)
        # [windows, keys] and [blocks, keys]: whether the key is in the window or block
        first = self.window_pos[:, None]
        self.in_window = ((window_seq[:, None] == key_seq) & (self.key_pos >= first)
                          & (self.key_pos < first + l))
        self.in_block = (block_seq[:, None] == key_seq) & (self.key_pos // B == self.block[:, None])
        # [windows, blocks]: number of strides (of cmp_stride keys) that a window shares with a block
        self.shared = self.in_window.double() @ self.in_block.double().T / s
        self.visible_blocks = (query_seq[:, None] == block_seq) & (self.block * B <= t)


def compress(c, layout, k, v, phi, inv_freq):
    """Returns the compressed keys (after RoPE) and values, both [M, Hkv, d], of k (before RoPE) and v."""
    l, Hkv, d = c["cmp_len"], c["kv_heads"], c["head_dim"]
    M = layout.in_window.shape[0]
    tokens = torch.stack([row.nonzero()[:, 0] for row in layout.in_window]) if M else torch.zeros(0, l).long()
    kw, vw = k[tokens].transpose(1, 2), v[tokens].transpose(1, 2)  # [M, Hkv, l, d]
    if phi is None:
        kc, vc = kw.mean(2), vw.mean(2)
    else:
        wk, pe, wv = phi
        kc = torch.einsum("mhx,hxe->mhe", (kw + pe).reshape(M, Hkv, l * d), wk)
        vc = torch.einsum("mhx,hxe->mhe", vw.reshape(M, Hkv, l * d), wv)
    return rotate(kc, layout.window_pos, inv_freq), vc


def select_blocks(c, layout, p):
    """Selects T = topk blocks for each query and KV head: the initial and local blocks, then those with the
    highest scores.

    Args:
        p: [Hq, Nq, M] probabilities of the compressed branch.

    Returns:
        selected: [Hkv, Nq, blocks] boolean.
        indices: [Hkv, Nq, T] ascending block indices within the sequence, -1 in unused slots.
        num_limited: number of (query, KV head) pairs with more visible blocks than T.
        gap: smallest difference between the lowest selected and the highest excluded score.
    """
    Hkv, T, B = c["kv_heads"], c["topk"], c["block"]
    Nq = p.shape[1]
    score = p.detach().reshape(Hkv, -1, Nq, p.shape[2]).sum(1) @ layout.shared
    selected = torch.zeros_like(score, dtype=torch.bool)
    indices = torch.full((Hkv, Nq, T), -1)
    num_limited, gap = 0, math.inf
    for h in range(Hkv):
        for n in range(Nq):
            own = int(layout.query_pos[n]) // B
            columns = layout.visible_blocks[n].nonzero()[:, 0].tolist()  # blocks 0..own of the sequence
            assert len(columns) == own + 1
            fixed = [j for j in range(own + 1) if j < c["init"] or j > own - c["local"]]
            scored = [j for j in range(own + 1) if j not in fixed]
            scored.sort(key=lambda j: (-score[h, n, columns[j]].item(), j))
            slots = T - len(fixed)
            blocks = sorted(fixed + scored[:slots])
            if len(scored) > slots:
                num_limited += 1
                if slots > 0:
                    gap = min(gap, (score[h, n, columns[scored[slots - 1]]]
                                    - score[h, n, columns[scored[slots]]]).item())
            indices[h, n, :len(blocks)] = torch.tensor(blocks)
            selected[h, n, [columns[j] for j in blocks]] = True
    return selected, indices, num_limited, gap


def nsa(c, layout, q, k, v, phi, gate_logits, inv_freq):
    """Computes native sparse attention. q and k are before RoPE; gate_logits is [Nq, Hq, 3] or [Nq, 1, 3].
    Returns a dict of the output o and the intermediate results."""
    r = {}
    kc, vc = compress(c, layout, k, v, phi, inv_freq)
    q, k = rotate(q, layout.query_pos, inv_freq), rotate(k, layout.key_pos, inv_freq)
    r["o_c"], r["lse_c"], p = attend(c["scale"], q, kc, vc, layout.past_windows)
    selected, r["indices"], r["num_limited"], r["gap"] = select_blocks(c, layout, p)
    assert r["gap"] > 1e-4, r["gap"]  # rounding changes no block index, not even in float
    in_selected = (selected.double() @ layout.in_block.double()) > 0  # [Hkv, Nq, N]
    r["o_s"], r["lse_s"], _ = attend(c["scale"], q, k, v, layout.causal & in_selected)
    r["o_w"], r["lse_w"], _ = attend(c["scale"], q, k, v, layout.sliding)
    gate = torch.sigmoid(gate_logits)[..., None]
    r["o"] = gate[:, :, 0] * r["o_c"] + gate[:, :, 1] * r["o_s"] + gate[:, :, 2] * r["o_w"]
    return r


CONFIG = ("q_heads", "kv_heads", "head_dim", "cmp_len", "cmp_stride", "block", "topk", "init", "local",
          "window", "linear", "gate_per_token")


def attention_case(name, comment, lengths, segments=None, scale=0.0, theta=10000.0, **c):
    """Writes the golden file of an attention. `c` overrides default settings; theta=None: no RoPE."""
    c = dict(dict(head_dim=8, cmp_len=8, cmp_stride=4, block=16, topk=4, init=1, local=1, window=10,
                  linear=1, gate_per_token=0), **c)
    f = GoldenFile(name, comment)
    f.ints("config", [c[x] for x in CONFIG])
    f.floats("scale", [scale])  # as in FsaConfig: 0 means 1/sqrt(d)
    c["scale"] = scale or 1 / math.sqrt(c["head_dim"])
    Hq, Hkv, d, l = c["q_heads"], c["kv_heads"], c["head_dim"], c["cmp_len"]
    layout = BatchLayout(c, lengths, segments)
    N, Nq = sum(lengths), len(layout.query_pos)
    f.ints("cu_seqlens", [sum(lengths[:i]) for i in range(len(lengths) + 1)])
    f.ints("segments", layout.segments)
    inv_freq = None
    if theta:
        inv_freq = torch.tensor([theta ** (-2.0 * i / d) for i in range(d // 2)])
        f.floats("inv_freq", inv_freq)

    leaves = {}

    def leaf(x, amplitude, *shape):
        leaves[x] = f.fill(x, shape, amplitude)
        return leaves[x]

    q, k = leaf("q", 2.0, Nq, Hq, d), leaf("k", 2.0, N, Hkv, d)
    v = leaf("v", 1.0, N, Hkv, d)
    gate = leaf("gate", 2.0, Nq, 1 if c["gate_per_token"] else Hq, 3)
    phi = None
    if c["linear"]:
        phi = (leaf("wk", 0.25, Hkv, l * d, d), leaf("pe", 0.5, Hkv, l, d), leaf("wv", 0.25, Hkv, l * d, d))
    dout = f.fill("dout", (Nq, Hq, d), 1.0).detach()

    r = nsa(c, layout, q, k, v, phi, gate, inv_freq)
    f.ints("indices", r["indices"])
    f.floats("lse_c", r["lse_c"])
    for x in ("o", "o_c", "o_s", "o_w", "lse_s", "lse_w"):
        f.floats(x, r[x], keep=1)
    (r["o"] * dout).sum().backward()
    for x, t in leaves.items():
        f.floats("d" + x, t.grad, keep=2 if x in ("wk", "wv", "pe") else 1)
        t.grad = None

    o, lse, _ = attend(c["scale"], rotate(q, layout.query_pos, inv_freq), rotate(k, layout.key_pos, inv_freq),
                       v, layout.causal)
    f.floats("full_o", o, keep=1)
    f.floats("full_lse", lse, keep=1)
    (o * dout).sum().backward()
    for x in ("q", "k", "v"):
        f.floats("full_d" + x, leaves[x].grad, keep=1)
    f.write()
    print(f"{name}: {Nq} queries, {N} keys, {layout.in_window.shape[0]} windows; more than topk visible "
          f"blocks in {r['num_limited']} of {Hkv * Nq} selections, smallest gap {r['gap']:.1e}")


# ---------------------------------------------------------------- model

def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def llama3_inv_freq(c, d):
    """Returns the RoPE frequencies [d/2] with Llama 3's scaling. If c has a rope-factor, frequencies with a
    wavelength above original/low are divided by the factor, those with a wavelength below original/high stay,
    and those between are blended."""
    out = []
    for i in range(d // 2):
        f = c["theta"] ** (-2.0 * i / d)
        if c["rope-factor"]:
            rotations = c["rope-original-len"] * f / (2 * math.pi)  # within the original context
            low, high = c["rope-low-freq"], c["rope-high-freq"]
            blend = min(max((rotations - low) / (high - low), 0.0), 1.0)
            f = blend * f + (1 - blend) * f / c["rope-factor"]
        out.append(f)
    return torch.tensor(out)


def model_case(name, comment, lengths, attn=0, tied=0, bias=1, norm=1, factor=8.0,
               shape=(31, 2, 16, 24, 4, 2, 8, 8, 3)):
    """Writes the golden file of a model. Settings have the names of the trainer's flags, tensors those of its
    parameter table."""
    V, L, C, H, Hq, Hkv, d, l, T = shape
    c = {"vocab": V, "padded-vocab": 128, "layers": L, "channels": C, "hidden": H, "attn": attn, "heads": Hq,
         "kv-heads": Hkv, "head-dim": d, "tied": tied, "qkv-bias": bias, "qk-norm": norm, "norm-eps": 1e-5,
         "theta": 10000.0, "rope-factor": factor, "rope-low-freq": 1.0, "rope-high-freq": 4.0,
         "rope-original-len": 128, "cmp-len": l, "cmp-stride": 4, "block": 16, "topk": T, "init-blocks": 1,
         "local-blocks": 1, "window": 10, "phi": 1, "gate-per-token": 0, "scale": 0.0,
         "full-every": 0}
    f = GoldenFile(name, comment)
    for x, value in c.items():
        f.floats("config." + x, [value])
    a = dict(cmp_len=l, cmp_stride=4, block=16, topk=T, init=1, local=1, window=10, kv_heads=Hkv, head_dim=d,
             scale=1 / math.sqrt(d))
    layout = BatchLayout(a, lengths)
    N = sum(lengths)
    tokens = torch.tensor(random_ints(name + ".tokens", N)) % V
    targets = torch.tensor(random_ints(name + ".targets", N)) % V
    f.ints("cu_seqlens", [sum(lengths[:i]) for i in range(len(lengths) + 1)])
    f.ints("tokens", tokens)
    f.ints("targets", targets)
    inv_freq = llama3_inv_freq(c, d)
    f.floats("inv_freq", inv_freq)

    p = {}

    def weight(x, amplitude, *shape, offset=0.0):
        p[x] = f.fill(x, shape, amplitude, offset)
        return p[x]

    def scale(fan_in, reference_fan_in):
        """Keeps the size of outputs the same as with the smallest shape, which has reference_fan_in."""
        return math.sqrt(reference_fan_in / fan_in)

    gaps = []
    table = weight("wte", scale(C, 16), V, C)
    x = table[tokens]
    for i in range(L):
        def w(x, amplitude, *shape, offset=0.0):
            return weight(f"layers.{i}.{x}", amplitude, *shape, offset=offset)

        y = rms_norm(x, w("ln1", 0.25, C, offset=1.0), c["norm-eps"])
        qkv = y @ w("wqkv", 0.5 * scale(C, 16), (Hq + 2 * Hkv) * d, C).T
        if bias:
            qkv = qkv + w("bqkv", 0.5, (Hq + 2 * Hkv) * d)
        q, k, v = qkv.reshape(N, Hq + 2 * Hkv, d).split([Hq, Hkv, Hkv], dim=1)
        if norm:
            q = rms_norm(q, w("qnorm", 0.25, d, offset=1.5), c["norm-eps"])
            k = rms_norm(k, w("knorm", 0.25, d, offset=1.5), c["norm-eps"])
        if attn == 0:
            phi = (w("phi_wk", 0.25 * scale(l * d, 64), Hkv * l * d, d).reshape(Hkv, l * d, d),
                   w("phi_pe", 0.5, Hkv * l, d).reshape(Hkv, l, d),
                   w("phi_wv", 0.25 * scale(l * d, 64), Hkv * l * d, d).reshape(Hkv, l * d, d))
            gate = (y @ w("wgate", 0.5 * scale(C, 16), 3 * Hq, C).T + w("bgate", 1.0, 3 * Hq)).reshape(N, Hq, 3)
            r = nsa(a, layout, q, k, v, phi, gate, inv_freq)
            o = r["o"]
            f.ints(f"layers.{i}.indices", r["indices"])
            gaps.append(r["gap"])
        else:
            q, k = rotate(q, layout.query_pos, inv_freq), rotate(k, layout.key_pos, inv_freq)
            o, _, _ = attend(a["scale"], q, k, v, layout.causal if attn == 1 else layout.sliding)
        x = x + o.reshape(N, Hq * d) @ w("wo", 0.25 * scale(Hq * d, 32), C, Hq * d).T
        y = rms_norm(x, w("ln2", 0.25, C, offset=1.0), c["norm-eps"])
        gate, up = (y @ w("wgu", 0.5 * scale(C, 16), 2 * H, C).T).split(H, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w("wdown", 0.25 * scale(H, 24), C, H).T
    x = rms_norm(x, weight("lnf", 0.25, C, offset=1.0), c["norm-eps"])
    logits = x @ (table if tied else weight("lm_head", 0.5 * scale(C, 16), V, C)).T
    losses = F.cross_entropy(logits, targets, reduction="none")
    losses.mean().backward()
    f.floats("logits", logits, keep=1)
    f.floats("losses", losses)
    f.floats("loss", [losses.mean().item()])
    for x, t in p.items():
        f.floats("grad." + x, t.grad, keep=1 if t.dim() == 2 else None)
    f.write()
    print(f"{name}: {N} tokens, loss {losses.mean():.6f}" + "".join(f", smallest gap {x:.1e}" for x in gaps))


def main():
    os.makedirs(FOLDER, exist_ok=True)
    attention_case("gqa1", "g = 1, phi linear", [87, 1, 5], q_heads=2, kv_heads=2)
    attention_case("gqa4", "g = 4, phi mean, one gate a token, scale given", [7, 71, 1, 13], scale=0.375,
                   q_heads=4, kv_heads=1, head_dim=16, topk=3, linear=0, gate_per_token=1)
    attention_case("gqa3", "g = 3, windows of three cells, two local blocks", [83, 11, 1], q_heads=6,
                   kv_heads=2, cmp_len=12, local=2, window=23, gate_per_token=1)
    attention_case("slice", "g = 2, queries are slices of their sequences, nothing forced but the own block",
                   [90, 3, 66], segments=[(0, 20, 17), (0, 71, 19), (1, 1, 1), (2, 33, 33)], q_heads=4,
                   kv_heads=2, init=0, topk=3)
    attention_case("edges", "g = 5, no rotation, windows side by side, W = 1", [68, 9], theta=None, q_heads=5,
                   kv_heads=1, cmp_stride=8, init=0, topk=2, window=1, linear=0)
    model_case("model_nsa", "qkv bias, QK-norm, Llama-3 frequencies, two documents and a whole row",
               [33, 37, 70])
    model_case("model_full", "full attention, no bias, no QK-norm, tied head", [33, 37, 70], attn=1, tied=1,
               bias=0, norm=0, factor=0.0)
    model_case("model_window", "sliding window only", [33, 37], attn=2)
    # shapes that the GPU supports; T = 5 selects all blocks, so rounding changes no block index
    model_case("model_gpu", "heads of 64", [33, 1, 70], shape=(40, 2, 64, 96, 3, 1, 64, 8, 5))
    model_case("model_gpu_full", "heads of 64, full attention, tied head", [33, 1, 70], attn=1, tied=1,
               bias=0, norm=0, factor=0.0, shape=(40, 2, 64, 96, 4, 2, 64, 8, 5))


if __name__ == "__main__":
    main()
