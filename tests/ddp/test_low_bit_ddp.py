"""``SparseState.lowbit`` on real DDP models over gloo: mass, resuming, unused parameters, a loss scale."""

import copy

import torch
from ddp_cases import Data, loss_of, make_net, wrap
from launch import spawn_gloo

from commhooks import LowBit, SparseState, prime_layout, register

OPTIONS = {"dense_crossover": False, "timeout_s": 20.0}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def withheld(state):
    """This rank's residuals, and what it owns, flat by parameter."""
    saved = state.state_dict()
    residual, owned = [], []
    for name, part in sorted(saved["residual"].items()):
        whole = torch.zeros_like(part)
        for start, kept in saved["owned"].get(name, {}).items():
            whole[start : start + kept.numel()] += kept
        residual.append(part)
        owned.append(whole)
    return torch.cat(residual), torch.cat(owned)


def average(flat):
    torch.distributed.all_reduce(flat)
    return flat / torch.distributed.get_world_size()


def mass(rank, size):
    """With SGD of rate 1 the model has moved by all that was given, less what is withheld, also across DDP's new
    layout after the first step. The layer that is used in odd steps only is part of it."""
    ddp = wrap(make_net(width=40, extra=True), find_unused_parameters=True)
    state = register(ddp, SparseState.lowbit(4, **OPTIONS))
    data, given = Data(rank), 0.0
    start = {name: p.detach().clone() for name, p in ddp.module.named_parameters()}
    for step in range(5):
        extra = step % 2 == 1
        twin = copy.deepcopy(ddp.module)
        loss_of(twin, data(step), use_extra=extra).backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
        given = given + average(flat(own).double())
        ddp.zero_grad(set_to_none=True)
        loss_of(ddp, data(step), use_extra=extra).backward()
        assert extra or all(p.grad is None for p in ddp.module.extra.parameters())
        with torch.no_grad():
            for p in ddp.module.parameters():
                if p.grad is not None:
                    p.sub_(p.grad)
    moved = flat([start[n] - p for n, p in ddp.module.named_parameters()]).double()
    names = [n for n, _ in ddp.module.named_parameters()]
    saved = state.state_dict()
    kept = []
    for n in names:
        part = saved["residual"][n].double() / size
        for begin, piece in saved["owned"].get(n, {}).items():
            part[begin : begin + piece.numel()] += piece
        kept.append(part)
    everything = torch.cat(kept)
    torch.distributed.all_reduce(everything)
    torch.testing.assert_close(moved + everything, given, rtol=1e-5, atol=1e-5)
    assert float(everything.norm()) > 0.0 and state.stats()["compression_ratio"] > 2.0
    state.close()


def lossless(rank, size):
    """32 bits are plain DDP, and under a loss scale too; 8 bits are near it."""
    found = []
    for bits in (None, 32, 8):
        ddp = wrap(make_net(width=40))
        state, scaler = None, torch.amp.GradScaler("cpu", init_scale=1024.0)
        if bits is not None:
            state = register(ddp, SparseState(None, LowBit(bits), grad_scaler=scaler, **OPTIONS))
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
        for step in range(4):
            loss = loss_of(ddp, Data(rank)(step))
            if step == 2 and rank == 0:
                loss = loss * float("inf")  # the scaler skips this step on all ranks
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
        found.append(flat(ddp.parameters()))
        if state is not None:
            assert state.stats()["nonfinite_steps"] == 1
            state.close()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0.1, atol=2e-3)
    assert not torch.equal(found[2], found[0])


def resumed(rank, size):
    """A run that is saved and continued in a new model has the bits of the run that goes on."""

    def made():
        ddp = wrap(make_net(width=40))
        return (
            ddp,
            register(ddp, SparseState.lowbit(4, **OPTIONS)),
            torch.optim.AdamW(ddp.parameters(), lr=1e-3),
        )

    def train(ddp, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(ddp, Data(rank)(step)).backward()
            optimizer.step()

    ddp, state, optimizer = made()
    train(ddp, optimizer, range(4))
    saved = copy.deepcopy((ddp.module.state_dict(), state.state_dict(), optimizer.state_dict()))
    assert any(saved[1]["owned"].values())
    train(ddp, optimizer, range(4, 7))
    again, other, fresh = made()
    prime_layout(again, other, lambda: loss_of(again, Data(rank)(0)).backward())
    again.module.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    fresh.load_state_dict(saved[2])
    train(again, fresh, range(4, 7))
    assert torch.equal(flat(again.parameters()), flat(ddp.parameters()))
    for a, b in zip(withheld(state), withheld(other), strict=True):
        assert torch.equal(a, b)
    state.close()
    other.close()


def work(rank, size):
    for case in (mass, lossless, resumed):
        case(rank, size)
    return True


def test_low_bit_gradients_of_a_ddp_model():
    assert spawn_gloo(work, 2, timeout=60) == [True] * 2
