"""Around the algorithms: buffers, missing gradients, scalers, wrappers, dtypes."""

import types
import warnings

import pytest
import torch
from torch.distributed.optim import PostLocalSGDOptimizer

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import (
    AtSteps,
    AveragedOptimizer,
    BlockMomentum,
    DecentralizedMomentum,
    DiLoCo,
    Every,
    LocalSGD,
    RestartedMomentum,
    SlowMo,
    topology,
)
from commhooks.averaging.channel import Channel
from commhooks.transports import connection, in_process

from . import oracles
from .workers import NUMEL, Pieces, averagers, in_ranks, run_steps, start


@pytest.mark.parametrize("buffers", ("average", "broadcast", "leave"))
def test_buffers_are_averaged_broadcast_or_left(buffers):
    ranks = [0, 1, 2]
    expected = {"average": ([1.0] * 3, ranks), "broadcast": ([0.0] * 3, [0] * 3), "leave": (ranks, ranks)}

    def work(transport):
        model = Pieces(start(), buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        seen = []
        for averager in averagers(model, optimizer, transport, module=model, buffers=buffers):
            model.running.fill_(transport.rank)
            model.count.fill_(transport.rank)
            run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 2)
            seen.append((model.running.tolist(), int(model.count)))
        return seen

    floats, counts = expected[buffers]
    for rank, seen in enumerate(in_ranks(3, work)):
        assert len(seen) >= 3
        for running, count in seen:
            assert running == pytest.approx([floats[rank]] * 3) and count == counts[rank]


def test_batch_norm_statistics_of_a_real_model_become_equal():
    def work(transport):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averager = LocalSGD(2, transport=transport, module=model)
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().mean().backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
        return {name: value.clone() for name, value in model.state_dict().items()}

    first, *others = in_ranks(3, work)
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def test_parameters_without_a_gradient_take_part():
    """On rank 1 the second parameter never has a gradient, on rank 0 only from the second step on."""

    def work(transport):
        moved = []
        for kind in range(4):
            model = Pieces(start())
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
            averager = list(averagers(model, optimizer, transport))[kind]
            for step in range(4):
                model.set_gradient(torch.full((NUMEL,), 1.0, dtype=torch.float64))
                if transport.rank == 1 or step == 0:
                    model.parts[1].grad = None
                optimizer.step()
                averager.average_parameters(model.parameters())
            moved.append((start() - model.flat())[6:])
            if kind >= 2:
                assert "momentum_buffer" in optimizer.state[model.parts[1]]
        return torch.stack(moved)

    result = in_ranks(2, work)  # (kind, rank, 4)
    assert torch.equal(result[:, 0], result[:, 1])
    assert (result > 0).all()
    # u = 1 and x = 1 on rank 0 at step 2, averaged to 1/2; then rank 0 goes on and rank 1 takes no step
    u, x = [0.5, 0.5], [0.5, 0.5]
    for _ in range(2):
        u[0] = 0.5 * u[0] + 1.0
        x[0] += u[0]
    torch.testing.assert_close(result[2], torch.full((2, 4), sum(x) / 2, dtype=torch.float64))


def test_frozen_parameters_are_neither_sent_nor_changed():
    def work(transport):
        model = Pieces(start() + transport.rank)
        model.parts[0].requires_grad_(False)
        LocalSGD(1, transport=transport).average_parameters(model.parameters())
        return model.flat()

    result = in_ranks(2, work)
    assert torch.equal(result[:6, 1], start()[:6] + 1)
    torch.testing.assert_close(result[6:, 0], start()[6:] + 0.5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_half_precision_models_are_summed_in_float32(dtype):
    flat = torch.linspace(-1000, 1000, NUMEL, dtype=torch.float64)

    def work(transport):
        model = Pieces(flat * (1 + transport.rank), dtype=dtype)
        storages = [p.data_ptr() for p in model.parameters()]
        LocalSGD(1, transport=transport).average_parameters(model.parameters())
        assert [p.data_ptr() for p in model.parameters()] == storages
        return torch.cat([p.detach().reshape(-1) for p in model.parts])

    expected = torch.stack([(flat * (1 + p)).to(dtype).float() for p in range(3)]).mean(dim=0).to(dtype)
    for column in in_ranks(3, work).unbind(dim=1):
        torch.testing.assert_close(column, expected)


def test_torchs_wrapper_and_parameter_groups():
    """The first synchronisation is after step K, where torch's own has one at its first call too."""
    gradient = oracles.make_gradient(2, 6, NUMEL)

    def work(transport, wrapper):
        model = Pieces(start())
        first, second = model.parts
        local = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.1}], lr=0.1)
        optimizer = wrapper(local, LocalSGD(3, transport=transport))
        history = [model.flat()]
        for t in range(6):
            model.set_gradient(gradient(transport.rank, t, model.flat()))
            optimizer.step()
            history.append(model.flat())
        assert optimizer.averager.step == 6 and optimizer.state_dict()["step"] == 6
        return torch.stack(history)

    expected = oracles.local_sgd(start(), gradient, 2, 6, lambda t: 0.1, {3, 6})
    for wrapper in (PostLocalSGDOptimizer, AveragedOptimizer):
        result = in_ranks(2, lambda t, wrapper=wrapper: work(t, wrapper))
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="averager.*None"):
        AveragedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), None)


@pytest.mark.parametrize("form", ("wrapper", "plain loop", "unscaled before"))
def test_a_scaler_that_skips_on_one_rank_does_not_part_the_step_counts(form):
    """Rank 1's gradients overflow at step 2; it skips its local step; both meet after steps 2 and 4."""

    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        local = torch.optim.SGD(model.parameters(), lr=0.5)
        averager = LocalSGD(2, transport=transport)
        optimizer = local if form == "plain loop" else AveragedOptimizer(local, averager)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        history = []
        for step in range(1, 5):
            optimizer.zero_grad()
            overflow = float("inf") if transport.rank == 1 and step == 2 else 1.0
            scaler.scale(overflow * sum(p.sum() for p in model.parameters())).backward()
            if form == "unscaled before":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if form == "plain loop":
                averager.average_parameters(model.parameters())
            history.append(model.flat())
        assert averager.step == 4 and averager.synchronisations == 2
        return start() - torch.stack(history)

    result = in_ranks(2, work)
    assert result[1, 0] == pytest.approx(torch.full((NUMEL,), 0.75).tolist(), abs=1e-5)  # (1 + 0.5) / 2
    assert result[3, 0] == pytest.approx(torch.full((NUMEL,), 1.75).tolist(), abs=1e-5)
    assert torch.equal(result[1, 0], result[1, 1]) and torch.equal(result[3, 0], result[3, 1])


def test_period_and_sync_are_one_name():
    transport = in_process.group(1)[0]
    model = Pieces(start())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    makers = {
        "LocalSGD": lambda **given: LocalSGD(transport=transport, **given),
        "BlockMomentum": lambda **given: BlockMomentum(
            0.5, params=model.parameters(), transport=transport, **given
        ),
        "RestartedMomentum": lambda **given: RestartedMomentum(optimizer, transport=transport, **given),
        "DecentralizedMomentum": lambda **given: DecentralizedMomentum(
            optimizer, topology.ring(1), transport=transport, **given
        ),
        "SlowMo": lambda **given: SlowMo(optimizer, 0.5, transport=transport, **given),
    }
    for name, make in makers.items():
        for steps in (3, Every(3), AtSteps([3, 7])):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                averager = make(period=steps)
            with pytest.warns(DeprecationWarning, match="sync= is now called period="):
                assert make(sync=steps).sync == averager.sync, name
            assert 3 in averager.sync and averager.period == (None if steps == AtSteps([3, 7]) else 3)
            assert repr(averager).startswith(f"<{name}(") and "step 0, 0 synchronisations" in repr(averager)
        with pytest.raises(ValueError, match="period and sync are one setting, got 3 and 4"):
            make(period=3, sync=4)
        with pytest.raises(TypeError, match=rf"{name}\(\) has no argument 'perod': did you mean period=3"):
            make(period=3, perod=3)
    with pytest.raises(ValueError, match="period.*None"):
        LocalSGD(transport=transport)


def test_stats_count_bytes_seconds_and_the_distance_from_the_average():
    def work(transport):
        rows = []
        for kind in range(6):
            model = Pieces(start(), dtype=torch.float32)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
            averager = [
                *averagers(model, optimizer, transport),
                SlowMo(optimizer, 0.5, 2, transport=transport),
                DiLoCo(model.parameters(), outer, sync_every=2, transport=transport),
            ][kind]
            assert averager.stats()["distance"] is None and averager.stats()["bytes_sent"] == 0
            before = transport.counters.bytes_sent
            for _ in range(4):
                model.set_gradient(torch.full((NUMEL,), float(transport.rank)))
                optimizer.step()
                averager.average_parameters(model.parameters())
            stats = averager.stats()
            assert stats["bytes_sent"] == transport.counters.bytes_sent - before > 0
            assert stats["bytes_received"] == stats["bytes_sent"]
            assert 0 < stats["last_seconds"] <= stats["seconds"] < 20
            rows.append([stats["step"], stats["synchronisations"], stats["distance"]])
        return rows

    for rank, rows in enumerate(in_ranks(3, work)):
        for row in rows:  # two steps of size rank since the last average: 2 |rank - 1| in each element
            assert row == [4, 2, pytest.approx(2 * abs(rank - 1) * NUMEL**0.5, abs=1e-5)]


def test_the_reducers_own_transport_is_counted_too():
    def work(transport):
        model = Pieces(start(), dtype=torch.float32)
        other = others[transport.rank]
        reducer = Reducer(TopK(0.3), AllGather(transport=other), ErrorFeedback(), dense_crossover=False)
        averager = LocalSGD(1, params=model.parameters(), transport=transport, reducer=reducer)
        averager.average_parameters(model.parameters())
        return averager.stats()["bytes_sent"], transport.counters.bytes_sent, other.counters.bytes_sent

    others = in_process.group(2)
    for total, own, reducing in in_process.run(2, work):
        assert total == own + reducing and reducing > 0


def test_the_transport_is_opened_for_the_parameters_device(monkeypatch):
    """By the averager that knows its parameters at once, by LocalSGD at its first synchronisation."""
    opened = []
    real = connection.make

    def make(transport, **options):
        opened.append(options["device_type"])
        return real(in_process.group(1)[0], **options)

    monkeypatch.setattr(connection, "make", make)
    model = torch.nn.Linear(2, 1)
    averager = LocalSGD(1)
    assert opened == [] and "rank" not in repr(averager)
    averager.average_parameters(model.parameters())
    assert opened == ["cpu"]
    on_gpu = [types.SimpleNamespace(device=torch.device("cuda:1"), requires_grad=True)]
    Channel("distributed", 3.0, None, None).open_for(on_gpu)
    Channel("distributed", 3.0, None, "cpu").open_for(on_gpu)
    LocalSGD(1, module=model)
    LocalSGD(1, device_type="cuda")
    assert opened == ["cpu", "cuda", "cpu", "cpu", "cuda"]
