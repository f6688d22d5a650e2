"""Few bits on the wire under every averager: the simulation's bits, and what an averager can be combined with."""

import pytest
import torch

from commhooks import Dense, ErrorFeedback, LowBit, Reducer
from commhooks.averaging import BlockMomentum, DiLoCo, Every, LocalSGD, SlowMo, average_checkpoints
from commhooks.transports import in_process

from .scenarios import WIRE_NUMEL, WIRE_STEPS, flat_of, local_step, moved, pair_of_parameters, wired

MU, RATE = 0.5, 0.1


class SlowOuter:
    """SlowMo's outer step on a list of one tensor: `u = mu u + grad / lr; w = w - lr u`."""

    def __init__(self, params):
        (self.param,) = params
        self.u = torch.zeros_like(self.param)

    def step(self):
        self.u.mul_(MU).add_(self.param.grad, alpha=1 / RATE)
        self.param.data.sub_(self.u, alpha=RATE)


def sgd(**options):
    return lambda params: torch.optim.SGD(params, **options)


OUTER = {"local": sgd(lr=1.0), "block": sgd(lr=1.0, momentum=MU), "slowmo": SlowOuter}


def made(kind, params, transport, period=2, **options):
    if kind == "block":
        return BlockMomentum(MU, period, params=params, transport=transport, **options)
    if kind == "slowmo":
        return SlowMo(torch.optim.SGD(params, lr=RATE), MU, period, transport=transport, **options)
    return LocalSGD(period, params=params, transport=transport, **options)


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 5))
@pytest.mark.parametrize("kind", OUTER)
def test_every_averager_is_the_simulation(kind, world_size, bits):
    expected = wired(world_size, bits, 2, OUTER[kind])

    def work(transport):
        params = pair_of_parameters()
        averager = made(kind, params, transport, wire=LowBit(bits))
        for step in range(1, WIRE_STEPS + 1):
            local_step(params, moved(transport.rank, step))
            averager.average_parameters(params)
            models, anchor = expected[step - 1]
            assert torch.equal(flat_of(params), models[transport.rank]), step
            assert torch.equal(averager.state_dict()["shared"]["anchor"], anchor), step

    in_process.run(world_size, work)


@pytest.mark.parametrize("world_size", (2, 3, 4, 5))
def test_32_bits_are_the_dense_reducer_bit_for_bit(world_size):
    """Both sum the changes `w_p - A`. Without a reducer the models themselves are summed, which rounds elsewhere."""

    def work(transport, how):
        params = pair_of_parameters()
        options = {"wire": LowBit(32)}
        if how == "reducer":
            options = {"reducer": Reducer(None, Dense(transport), dense_crossover=False)}
        outer = sgd(lr=1.0, momentum=MU, nesterov=True)
        averager = DiLoCo(params, outer, sync_every=2, transport=transport, **options)
        for step in range(4):
            local_step(params, moved(transport.rank, step))
            averager.average_parameters(params)
        return flat_of(params)

    wire, reducer = (in_process.run(world_size, lambda t, h=how: work(t, h)) for how in ("wire", "reducer"))
    assert torch.equal(wire[0], reducer[0]) and bool(wire[0].any())


def integers(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(-64, 65, (WIRE_NUMEL,), generator=generator).float()


def owned(averager):
    state, kept = averager.state_dict()["wire"], torch.zeros(WIRE_NUMEL)
    kept[state["start"] : state["start"] + state["owned"].numel()] = state["owned"]
    return kept.double()


def test_a_late_start_conserves():
    """Until the start all ranks take the same steps; from there on nothing is lost."""
    changes = [[integers(9 if step < 3 else p, step) for p in range(4)] for step in range(9)]

    def work(transport):
        params = pair_of_parameters()
        averager = LocalSGD(Every(2, start=3), params=params, transport=transport, wire=LowBit(1))
        for step in changes:
            local_step(params, step[transport.rank])
            averager.average_parameters(params)
        return flat_of(params).double() / 4 + owned(averager), averager.synchronisations

    results = in_process.run(4, work)
    expected = sum(torch.stack(step).double().mean(0) for step in changes)
    assert results[0][1] == 3
    torch.testing.assert_close(sum(r[0] for r in results), expected, rtol=0, atol=1e-5)


def test_buffers_are_averaged_beside_the_wire():
    def work(transport):
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.BatchNorm1d(30))
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        model[1].running_mean.fill_(transport.rank)
        params = list(model.parameters())
        averager = BlockMomentum(0.0, 1, params=params, module=model, transport=transport, wire=LowBit(1))
        local_step(params, integers(transport.rank, 0)[: sum(p.numel() for p in params)])
        averager.average_parameters(params)
        return model[1].running_mean.clone()

    assert all(torch.equal(mean, torch.full((30,), 1.5)) for mean in in_process.run(4, work))


def test_a_low_bit_reducer_conserves_for_another_number_of_ranks():
    """A reducer that sends every element in 4 bits under an averager: model plus what is withheld and owned."""

    def work(transport, steps, saved=None):
        params = pair_of_parameters()
        reducer = Reducer(None, LowBit(4, transport), ErrorFeedback(), dense_crossover=False)
        averager = BlockMomentum(0.0, 2, params=params, transport=transport, reducer=reducer)
        if saved is not None:
            for p, value in zip(params, saved["model"], strict=True):
                p.data.copy_(value)
            averager.load_state_dict(saved["averager"])
        for step in range(steps):
            local_step(params, torch.zeros(WIRE_NUMEL) if saved else integers(transport.rank, step))
            averager.average_parameters(params)
        table = reducer.memory.table.state_dict()
        kept = []
        for name in ("parameter 0", "parameter 1"):
            kept.append(table["residual"][name].double().reshape(-1) / transport.world_size)
            for start, piece in table.get("owned", {}).get(name, {}).items():
                kept[-1][start : start + piece.numel()] += piece
        part = {"model": [p.detach().clone() for p in params], "averager": averager.state_dict()}
        return part, flat_of(params).double(), torch.cat(kept)

    def total(results):
        return results[0][1] + sum(kept for _, _, kept in results)

    first = in_process.run(4, lambda t: work(t, 4))
    expected = sum(integers(p, step).double() for p in range(4) for step in range(4)) / 4
    torch.testing.assert_close(total(first), expected, rtol=0, atol=1e-4)
    joined = average_checkpoints([part for part, _, _ in first])
    for world_size in (1, 2, 3, 7):
        again = in_process.run(world_size, lambda t: work(t, 2, joined))
        torch.testing.assert_close(total(again), expected, rtol=0, atol=1e-4)
