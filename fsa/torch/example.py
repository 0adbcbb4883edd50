"""Trains a small model with native sparse attention to recall facts, on the GPU or the CPU: python3 fsa/torch/example.py

A sequence holds pairs (key, value) in random order, then asks for the value of some keys. The answer is chance
(1 of 16) without attention to the right pair.
"""

import torch
import torch.nn.functional as F
from flash_sparse_attention import NativeSparseAttention
from torch import nn

PAIRS, QUESTIONS, VALUES = 24, 8, 16
VOCAB = PAIRS + VALUES
DEVICE, BATCH = ("cuda", 128) if torch.cuda.is_available() else ("cpu", 4)
SIZES = dict(cmp_len=16, cmp_stride=8, block=16, topk=4, init_blocks=1, local_blocks=1, window=16)


class Block(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.attention = NativeSparseAttention(channels, heads, heads // 2, head_dim=64, **SIZES)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, channels=128, layers=2, heads=2):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, VOCAB))

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


def batch(size):
    """Returns tokens [size, 2 * (PAIRS + QUESTIONS)]: the pairs, then questions with their answers."""
    keys = torch.rand(size, PAIRS).argsort(1)
    values = PAIRS + torch.randint(VALUES, (size, PAIRS))
    asked = torch.rand(size, PAIRS).argsort(1)[:, :QUESTIONS]
    keys, values = (torch.cat([x, x.gather(1, asked)], 1) for x in (keys, values))
    return torch.stack([keys, values], 2).flatten(1).to(DEVICE)


torch.manual_seed(0)
model = Model().to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
for step in range(1001):
    tokens = batch(BATCH)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(tokens)[:, 2 * PAIRS : -1 : 2].float()  # at the asked keys
    answers = tokens[:, 2 * PAIRS + 1 :: 2]
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        correct = (logits.argmax(-1) == answers).float().mean().item()
        print(f"step {step}: loss {loss.item():.3f}, {correct:.0%} of the answers are right")
