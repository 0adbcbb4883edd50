"""One process of a test of DDP and FSDP2: torch_ranks.py RANK RANKS PORT DEVICE. Each rank has its own sequences. The
gradients of the wrapped models must be the mean of those that one process computes for all ranks' sequences. Prints a
line for each wrapper: its name and the relative error of the gradients."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_checks import relative_error

import flash_sparse_attention as fsa

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:  # PyTorch 2.5
    from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

TOKENS, CHANNELS = 320, 256


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.attention = fsa.NativeSparseAttention(CHANNELS, 4, 2, 64, topk=4, window=64)
        self.mlp = nn.Sequential(
            nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS)
        )

    def forward(self, x, cu_seqlens):
        x = x + self.attention(self.norm(x), cu_seqlens)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, cu_seqlens):
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return x


rank, ranks, port, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
torch.set_num_threads(1)
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=ranks)
torch.manual_seed(0)
model = Model().to(device)
batches = [torch.randn(TOKENS, CHANNELS, device=device) for _ in range(ranks)]
cu_seqlens = [torch.tensor([0, 100 + 7 * i, TOKENS], device=device) for i in range(ranks)]


def loss(model, i):
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(batches[i], cu_seqlens[i]).float().square().mean()


for i in range(ranks):
    (loss(model, i) / ranks).backward()
want = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()


def compare(name, wrapped):
    loss(wrapped, rank).backward()
    errors = [0.0]
    for parameter, p in wrapped.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        errors.append(relative_error(gradient, want[parameter.removeprefix("module.")]))
    if rank == 0:
        print(f"{name} {max(errors)}", flush=True)


compare("DDP", DistributedDataParallel(copy.deepcopy(model), device_ids=[rank] if device == "cuda" else None))
policies = []
if device == "cuda" or not torch.__version__.startswith("2.5"):  # whose FSDP2 needs a GPU
    policies.append(("FSDP2", MixedPrecisionPolicy()))
if device == "cuda":
    policies.append(
        ("FSDP2-bf16", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    )
mesh = dist.device_mesh.init_device_mesh(device, (ranks,))
for name, policy in policies:
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    compare(name, fully_shard(sharded, mesh=mesh, mp_policy=policy))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # threads of gloo that still run would abort an ordinary exit
