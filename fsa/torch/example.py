"""Trains a small model with native sparse attention to recall facts, on the GPU or the CPU. A sequence holds facts, one
token each: a key and its value. Then come questions: a key without its value. Guessing gets 1 of 8 answers right.
"""

import torch
import torch.nn.functional as F
from flash_sparse_attention import NativeSparseAttention
from torch import nn

FACTS, QUESTIONS, VALUES, CHANNELS = 56, 8, 8, 128
UNKNOWN = FACTS + VALUES  # ids of the embedding: keys, then values, then the unknown value
DEVICE, BATCH = ("cuda", 64) if torch.cuda.is_available() else ("cpu", 8)
SIZES = dict(cmp_len=8, cmp_stride=4, block=16, topk=3, init_blocks=0, local_blocks=1, window=16)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attention = NativeSparseAttention(
            CHANNELS, q_heads=4, kv_heads=1, head_dim=64, rope_theta=None, **SIZES
        )
        self.mlp = nn.Sequential(
            nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS)
        )

    def forward(self, x):  # [batch, n, CHANNELS]
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def batch():
    """Returns ids [BATCH, FACTS + QUESTIONS, 2], (key, value) of each token, and the answers [BATCH, QUESTIONS]."""
    keys = torch.rand(BATCH, FACTS).argsort(1)
    values = torch.randint(VALUES, (BATCH, FACTS))
    asked = torch.rand(BATCH, FACTS).argsort(1)[:, :QUESTIONS]
    keys = torch.cat([keys, keys.gather(1, asked)], 1)
    known = torch.cat([FACTS + values, torch.full((BATCH, QUESTIONS), UNKNOWN)], 1)
    return torch.stack([keys, known], 2).to(DEVICE), values.gather(1, asked).to(DEVICE)


torch.manual_seed(0)
embedding = nn.Embedding(UNKNOWN + 1, CHANNELS).to(DEVICE)
model = nn.Sequential(Block(), Block(), nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, VALUES)).to(DEVICE)
optimizer = torch.optim.AdamW([*embedding.parameters(), *model.parameters()], lr=2e-3)
for step in range(1001):
    ids, answers = batch()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(embedding(ids).sum(2))[:, FACTS:].float()
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        correct = (logits.argmax(-1) == answers).float().mean().item()
        print(f"step {step}: loss {loss.item():.3f}, {correct:.0%} of the answers are right", flush=True)
