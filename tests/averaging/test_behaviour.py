"""Around the algorithms: buffers, missing gradients, scalers, wrappers, dtypes, disagreement, bad input."""

import re

import pytest
import torch
from torch.distributed.optim import PostLocalSGDOptimizer

from commhooks.averaging import (
    AveragedOptimizer,
    BlockMomentum,
    DecentralizedMomentum,
    LocalSGD,
    RestartedMomentum,
    topology,
)
from commhooks.errors import CommHooksError, PeerLostError, PeerTimeoutError, SettingsMismatchError
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, in_ranks, run_steps, start


def averagers(model, optimizer, transport, period=2, **options):
    """One of each kind, made one after the other on the same model."""
    parameters = list(model.parameters())
    network = topology.complete(transport.world_size)
    yield LocalSGD(period, transport=transport, **options)
    yield BlockMomentum(0.5, period, params=parameters, transport=transport, **options)
    yield RestartedMomentum(optimizer, period, transport=transport, **options)
    if options.get("buffers") != "broadcast":
        yield DecentralizedMomentum(optimizer, network, period=period, transport=transport, **options)


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


@pytest.mark.parametrize(
    ("sync", "steps", "width", "shown"),
    [
        ((2, 4), (4, 4), (3, 3), "differ in settings"),
        ((2, 2), (4, 6), (3, 3), r"differ in step \(4 and 6\)"),
        ((2, 2), (4, 4), (3, 5), "differ in parameter shapes"),
    ],
)
def test_ranks_that_disagree_are_told(sync, steps, width, shown):
    def work(transport):
        averager = LocalSGD(sync[transport.rank], transport=transport)
        averager.step = steps[transport.rank]
        averager.synchronise(torch.nn.Linear(width[transport.rank], 1).parameters())

    with pytest.raises(SettingsMismatchError, match=shown):
        in_process.run(2, work, timeout_s=10)


def test_neighbours_that_disagree_are_told():
    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=transport.rank == 2)
        averager = DecentralizedMomentum(optimizer, topology.ring(4), transport=transport)
        run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 1)

    with pytest.raises(SettingsMismatchError, match="differ in settings"):
        in_process.run(4, work, timeout_s=10)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("comes", (True, False))
def test_a_rank_that_skips_a_step_is_an_error_on_all_ranks(kind, comes):
    """Rank 1 skips its third step: it averages without having counted it, or comes no more."""

    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averager = list(averagers(model, optimizer, transport, period=1))[kind]
        try:
            run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 2)
            if transport.rank != 1:
                run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 3)
            elif comes:
                averager.synchronise(model.parameters())
        except CommHooksError as error:
            return error
        return None

    seen = in_process.run(3, work, timeout_s=0.5)
    if comes:
        assert {type(error) for error in seen} <= {SettingsMismatchError, PeerLostError}
        assert any(re.search(r"differ in step \((2 and 3|3 and 2)\)", str(error)) for error in seen)
    else:
        assert {type(error) for error in seen[::2]} <= {PeerTimeoutError, PeerLostError}
        assert all("after step 3" in str(error) for error in seen[::2])


@pytest.mark.parametrize("kind", range(4))
def test_a_rank_that_stays_away_is_an_error_within_the_timeout(kind):
    def work(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averager = list(averagers(model, optimizer, transport))[kind]
        if transport.rank == 0:
            with pytest.raises(PeerTimeoutError, match=f"{type(averager).__name__} after step 2.*rank 1"):
                run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, 2)

    in_process.run(2, work, timeout_s=0.3)


ONE = [torch.nn.Parameter(torch.zeros(1))]


def make_sgd(**options):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda t: LocalSGD(0, transport=t), "sync.*0"),
        (lambda t: LocalSGD(4, weight=0.0, transport=t), "weight.*0"),
        (lambda t: LocalSGD(4, weight=float("nan"), transport=t), "weight.*nan"),
        (lambda t: LocalSGD(4, buffers="mean", transport=t), "buffers.*mean"),
        (lambda t: LocalSGD(4, transport="carrier pigeon"), "transport.*carrier pigeon"),
        (lambda t: LocalSGD(4, transport=t, reducer=object()), "params.*None"),
        (lambda t: BlockMomentum(1.0, 4, params=ONE, transport=t), "mu.*1.0"),
        (lambda t: BlockMomentum(-0.1, 4, params=ONE, transport=t), "mu.*-0.1"),
        (lambda t: BlockMomentum(0.5, 0, params=ONE, transport=t), "period.*0"),
        (lambda t: BlockMomentum(0.5, 2, params=[], transport=t), "params.*none"),
        (lambda t: RestartedMomentum(make_sgd(), 0, transport=t), "sync.*0"),
        (
            lambda t: RestartedMomentum(make_sgd(momentum=0.9, dampening=0.1), 2, transport=t),
            "dampening.*0.1",
        ),
        (lambda t: RestartedMomentum(torch.optim.Adam(ONE), 2, transport=t), "momentum.*Adam"),
        (lambda t: RestartedMomentum(torch.optim.RMSprop(ONE), 2, transport=t), "RMSprop"),
        (
            lambda t: DecentralizedMomentum(make_sgd(), topology.ring(3), transport=t),
            "topology.*1 ranks.*ring",
        ),
        (lambda t: DecentralizedMomentum(make_sgd(), "ring", transport=t), "topology.*'ring'"),
        (lambda t: DecentralizedMomentum(make_sgd(), topology.ring(1), period=0, transport=t), "period.*0"),
        (lambda t: DecentralizedMomentum(make_sgd(), topology.ring(1), reducer=1, transport=t), "reducer.*1"),
        (
            lambda t: DecentralizedMomentum(make_sgd(), topology.ring(1), buffers="broadcast", transport=t),
            "buffers.*broadcast",
        ),
    ],
)
def test_bad_arguments_are_named(make, shown):
    with pytest.raises(ValueError, match=shown):
        make(in_process.group(1)[0])


def test_bad_parameters_are_named():
    transport = in_process.group(1)[0]
    averager = LocalSGD(1, transport=transport)
    with pytest.raises(TypeError, match="str"):
        averager.average_parameters(["weight"])
    with pytest.raises(ValueError, match="complex64"):
        averager.average_parameters([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = make_sgd(momentum=0.9)
    with pytest.raises(ValueError, match=r"belong to the optimizer.*\(2,\)"):
        RestartedMomentum(optimizer, 1, transport=transport).synchronise([torch.nn.Parameter(torch.zeros(2))])
    block = BlockMomentum(0.5, 1, params=[torch.nn.Parameter(torch.zeros(3))], transport=transport)
    with pytest.raises(ValueError, match="3 elements.*4"):
        block.average_parameters([torch.nn.Parameter(torch.zeros(4))])
