"""Weight decay and Nesterov's momentum behind the hook are dense DDP's, with image models and unused layers too."""

import copy

import torch
from ddp_cases import SMALL_BUCKETS_MB
from launch import spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, SparseState, register

SETTINGS = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.late, self.never = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(3, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, late):
        h = self.first(x)
        return self.last(self.late(h) if late else h)


def trained(rank, model, optimizer):
    for step in range(6):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(2, 3, 8, 8, generator=generator)
        model(x, step % 3 == 2).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ranks(rank, size):
    differences = {}
    for views in (False, True):
        options = {
            "bucket_cap_mb": SMALL_BUCKETS_MB,
            "find_unused_parameters": True,
            "gradient_as_bucket_view": views,
        }
        start = Images()
        plain = DistributedDataParallel(copy.deepcopy(start), **options)
        expected = trained(rank, plain, torch.optim.SGD(plain.parameters(), lr=0.05, **SETTINGS))
        ours = DistributedDataParallel(start, **options)
        state = SparseState.topk(1.0, memory=ErrorFeedback(**SETTINGS), dense_crossover=False, timeout_s=20.0)
        register(ours, state)
        found = trained(rank, ours, torch.optim.SGD(ours.parameters(), lr=0.05))
        differences[views] = float((found - expected).abs().max())
        state.close()
    return differences


def test_at_density_one_it_is_dense_ddp_with_the_same_settings():
    for differences in spawn_gloo(ranks, 2, timeout=60):
        assert max(differences.values()) < 1e-5, differences
