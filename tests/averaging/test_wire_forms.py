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


def on_a_wire(params, transport, **options):
    return BlockMomentum(0.0, 2, params=params, transport=transport, wire=LowBit(1), **options)


def test_the_common_model_after_parameters_were_replaced():
    """`load_state_dict(assign=True)` puts other tensors in the model's place."""

    def work(transport, how):
        model = torch.nn.Linear(20, 30)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        averager = on_a_wire(list(model.parameters()), transport, module=model if how == "module" else None)
        for step in range(2):
            local_step(list(model.parameters()), integers(transport.rank, step)[:630])
            averager.average_parameters(model.parameters())
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(saved, assign=True)
        with averager.common_model(*([model.parameters()] if how == "given" else [])):
            common = flat_of(model.parameters())
        assert torch.equal(common, averager.anchor) and not torch.equal(common, flat_of(model.parameters()))

    for how in ("module", "given"):
        in_process.run(2, lambda t, h=how: work(t, h))


def test_inside_the_common_model_nothing_is_averaged_or_saved():
    """The rank's own model comes back after the block, so that what happened to it inside would be lost."""

    def work(transport):
        params = pair_of_parameters()
        averager = on_a_wire(params, transport)
        for step in range(2):
            local_step(params, integers(transport.rank, step))
            averager.average_parameters(params)
        state, own = averager.state_dict(), flat_of(params)
        with averager.common_model():
            for call in (
                lambda: averager.average_parameters(params),
                lambda: averager.synchronise(params),
                lambda: averager.broadcast_parameters(params),
                averager.state_dict,
                lambda: averager.load_state_dict(state),
            ):
                with pytest.raises(RuntimeError, match=r"inside BlockMomentum.common_model\(\)"):
                    call()
            with averager.common_model():
                assert torch.equal(flat_of(params), averager.anchor)
            with pytest.raises(RuntimeError, match="common_model"):
                averager.state_dict()
        assert torch.equal(flat_of(params), own) and averager.step == 2
        averager.average_parameters(params)

    in_process.run(2, work)


@pytest.mark.parametrize("saves", ("its own", "the common model"))
def test_a_checkpoint_of_the_common_model_is_noticed(saves, caplog):
    def work(transport):
        def steps(params, optimizer, averager, numbers):
            for step in numbers:
                for p in params:
                    p.grad = torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(10 * step + transport.rank)
                    )
                optimizer.step()
                averager.average_parameters(params)

        params = pair_of_parameters()
        averager = on_a_wire(params, transport)
        steps(params, torch.optim.SGD(params, lr=0.1), averager, range(5))  # one step into a block
        saved = averager.state_dict()
        model = flat_of(params) if saves == "its own" else averager.anchor.clone()
        params = pair_of_parameters()
        averager = on_a_wire(params, transport)
        averager.load_state_dict(saved)
        local_step(params, model)
        steps(params, torch.optim.SGD(params, lr=0.1), averager, range(5, 8))

    with caplog.at_level("WARNING"):
        in_process.run(2, work)
    told = [r for r in caplog.records if "not where the averager left it" in r.getMessage()]
    assert len(told) == (0 if saves == "its own" else 2)


def test_a_broadcast_says_what_it_drops(caplog):
    def work(transport):
        params = pair_of_parameters()
        averager = on_a_wire(params, transport)
        averager.broadcast_parameters(params)
        for step in range(2):
            local_step(params, integers(transport.rank, step))
            averager.average_parameters(params)
        averager.broadcast_parameters(params)

    with caplog.at_level("WARNING"):
        in_process.run(2, work)
    assert len([r for r in caplog.records if "withheld on the wire is dropped" in r.getMessage()]) == 2
