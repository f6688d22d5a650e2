"""Saving and resuming: bit for bit at the same world size, from the averaged model at another one."""

import copy

import pytest
import torch

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import (
    AveragedOptimizer,
    BlockMomentum,
    DecentralizedMomentum,
    DiLoCo,
    LocalSGD,
    RestartedMomentum,
    SlowMo,
    average_checkpoints,
    topology,
)
from commhooks.errors import SettingsMismatchError
from commhooks.transports import in_process

from . import oracles
from .workers import NUMEL, Pieces, in_ranks, run_steps, start

KINDS = (
    "local",
    "block",
    "diloco",
    "slowmo",
    "restarted",
    "restarted-adamw",
    "decentralized",
    "decentralized-adamw",
    "local+topk",
    "block+topk",
    "diloco+topk",
    "slowmo+topk",
    "restarted+topk",
)
PERIOD = 3


def make(kind, transport):
    """Model, optimizer and averager of a kind; a fresh start, equal on all ranks."""
    model, optimizer = make_parts(kind)
    return model, optimizer, make_averager(kind, transport, model, optimizer)


def make_parts(kind):
    model = Pieces(start(), dtype=torch.float32)
    if "adamw" in kind:
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_averager(kind, transport, model, optimizer):
    name, _, compressed = kind.partition("+")
    name, _, other = name.partition("-")
    options = {"transport": transport}
    if compressed:
        aggregator = AllGather(transport=transport)
        options["reducer"] = Reducer(TopK(0.3), aggregator, ErrorFeedback(), dense_crossover=False)
    if name == "local":
        averager = LocalSGD(PERIOD, params=model.parameters(), **options)
    elif name == "block":
        averager = BlockMomentum(0.7, PERIOD, params=model.parameters(), **options)
    elif name == "diloco":
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        averager = DiLoCo(model.parameters(), outer, sync_every=PERIOD, **options)
    elif name == "slowmo":
        averager = SlowMo(optimizer, 0.7, PERIOD, **options)
    elif name == "restarted":
        averager = RestartedMomentum(optimizer, PERIOD, moments="average" if other else None, **options)
    else:
        network = topology.one_peer_exponential(transport.world_size)
        moments = "mix" if other else None
        averager = DecentralizedMomentum(optimizer, network, moments=moments, **options)
    return averager


def checkpoint(model, optimizer, averager):
    parts = {"model": model, "optimizer": optimizer, "averager": averager}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def load(state, model, optimizer, averager):
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    averager.load_state_dict(state["averager"])


@pytest.mark.parametrize("kind", ("local", "block", "restarted"))
def test_residuals_are_not_dropped_in_silence_by_an_averager_without_a_reducer(kind, caplog):
    gradient = oracles.make_gradient(2, 7, NUMEL)

    def first(transport):
        parts = make(f"{kind}+topk", transport)
        run_steps(*parts, gradient, transport.rank, 7)
        return checkpoint(*parts)["averager"]

    states = in_ranks(2, first)
    assert states[0]["reducers"][0]["residual"]["parameter 0"].any()
    for saved in (states, [average_checkpoints([{"averager": s} for s in states])["averager"]] * 2):

        def second(transport, saved=saved):
            averager = make(kind, transport)[2]
            with pytest.raises(ValueError, match="residuals would be lost.*no reducer.*strict=False"):
                averager.load_state_dict(saved[transport.rank])
            assert averager.step == 0
            if kind == "block":
                averager.load_state_dict(saved[transport.rank], strict=False)
                return averager.step
            with pytest.raises(ValueError, match="saved with a reducer"):  # these have no anchor without one
                averager.load_state_dict(saved[transport.rank], strict=False)
            return 7

        caplog.clear()
        assert in_ranks(2, second) == [7, 7]
        assert caplog.text.count("residuals would be lost") == 2


def test_a_state_saved_with_other_settings_is_loaded_and_the_difference_logged(caplog):
    def made(mu):
        model = Pieces(start())
        return BlockMomentum(mu, PERIOD, params=model.parameters(), transport=in_process.group(1)[0])

    state = made(0.5).state_dict()
    assert state["settings"] == {"mu": 0.5, "period": PERIOD, "compressed": False}
    made(0.5).load_state_dict(state)
    assert not caplog.records
    averager = made(0.7)
    averager.load_state_dict({**state, "step": 2})
    assert averager.step == 2 and caplog.messages == [
        "the state was saved with other settings, and this BlockMomentum goes on with its own: "
        "mu: 0.5 saved, 0.7 here"
    ]
    caplog.clear()
    text = "BlockMomentum(mu=0.5, period=3, compressed=False)"  # as versions before saved it
    averager.load_state_dict({**state, "step": 1, "settings": text})
    assert averager.step == 1 and f"saved by {text}; the run goes on with BlockMomentum(mu=0.7" in caplog.text


ORDERS = ("bmoa", "mboa", "moba", "baom")  # b: build the averager; m, o, a: load model, optimizer, averager


def resume(kind, transport, state, order="bmoa"):
    """Model, optimizer and averager from a checkpoint, in one of the ``ORDERS``."""
    parts, state = [*make_parts(kind), None], copy.deepcopy(state)  # an optimizer goes on in what it loaded
    for letter in order:
        if letter == "b":
            parts[2] = make_averager(kind, transport, *parts[:2])
        elif letter == "m":
            parts[0].load_state_dict(state["model"])
        elif letter == "o":
            parts[1].load_state_dict(state["optimizer"])
        else:
            parts[2].load_state_dict(state["averager"])
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind):
    world_size, total = 3, 13
    gradient = oracles.make_gradient(world_size, total, NUMEL)

    def straight(transport):
        return run_steps(*make(kind, transport), gradient, transport.rank, total)

    expected = in_ranks(world_size, straight)
    for cut in (2, 3, 7):  # inside the first block, at a synchronisation, inside a later block

        def first(transport, cut=cut):
            parts = make(kind, transport)
            run_steps(*parts, gradient, transport.rank, cut)
            return checkpoint(*parts)

        states = in_ranks(world_size, first)

        for order in ORDERS:

            def second(transport, cut=cut, states=states, order=order):
                parts = resume(kind, transport, states[transport.rank], order)
                return run_steps(*parts, gradient, transport.rank, total - cut, first=cut)

            assert torch.equal(in_ranks(world_size, second), expected[cut:]), (cut, order)


@pytest.mark.parametrize("kind", ("block", "diloco", "slowmo", "local+topk", "restarted+topk"))
def test_starting_points_that_differ_are_an_error_until_they_are_broadcast(kind):
    """No local step is overwritten in silence: a model from mid-block needs its averager's state."""

    def work(transport, broadcast):
        model, optimizer = make_parts(kind)
        with torch.no_grad():
            model.parts[1].add_(transport.rank)
        averager = make_averager(kind, transport, model, optimizer)
        assert transport.counters.messages == 0
        if broadcast:
            averager.broadcast_parameters(model.parameters())
        return run_steps(model, optimizer, averager, lambda p, t, x: x, transport.rank, PERIOD)[-1]

    result = in_ranks(2, lambda t: work(t, True))
    assert torch.equal(result[:, 0], result[:, 1])
    with pytest.raises(SettingsMismatchError, match="starting point.*broadcast_parameters"):
        in_ranks(2, lambda t: work(t, False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_size", (1, 2, 5))
def test_another_world_size_continues_from_the_averaged_model(kind, new_size):
    old_size, cut = 4, 5
    gradient = oracles.make_gradient(5, 20, NUMEL)

    def first(transport):
        parts = make(kind, transport)
        run_steps(*parts, gradient, transport.rank, cut)
        return checkpoint(*parts), parts[0].flat(), parts[2]

    results = in_ranks(old_size, first)
    joined = average_checkpoints([state for state, _, _ in results])
    mean = torch.stack([flat for _, flat, _ in results]).mean(dim=0)

    def second(transport):
        model, optimizer, averager = make(kind, transport)
        load(joined, model, optimizer, averager)
        assert averager.step == cut
        history = run_steps(model, optimizer, averager, gradient, transport.rank, 4, first=cut)
        residuals = None
        if averager.reducer is not None:
            residuals = averager.reducer.state_dict()["residual"]
        return history, averager, residuals

    for history, averager, _ in in_ranks(new_size, second):
        torch.testing.assert_close(history[0], mean, rtol=0, atol=1e-6)
        assert averager.step == cut + 4
        if kind in ("block", "diloco", "slowmo"):
            assert averager.anchor.shape == (NUMEL,)


@pytest.mark.parametrize("kind", ("block", "diloco", "slowmo"))
def test_the_block_goes_on_at_another_world_size(kind):
    """w~ and v are kept: the next synchronisation is w~ + mu v + (mean w - w~), against the formulas."""
    gradient = oracles.make_gradient(4, 6, NUMEL)
    rate, mu = 0.1, 0.7

    def of(model, optimizer, transport):
        if kind == "diloco":
            outer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=mu)
            return DiLoCo(model.parameters(), outer, sync_every=PERIOD, transport=transport)
        if kind == "slowmo":
            return SlowMo(optimizer, mu, PERIOD, transport=transport)
        return BlockMomentum(mu, PERIOD, params=model.parameters(), transport=transport)

    def first(transport):
        model = Pieces(start())
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        averager = of(model, optimizer, transport)
        run_steps(model, optimizer, averager, gradient, transport.rank, 4)
        return checkpoint(model, optimizer, averager)

    joined = average_checkpoints(in_ranks(4, first))

    def second(transport):
        model = Pieces(torch.zeros(NUMEL))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        averager = of(model, optimizer, transport)
        load(joined, model, optimizer, averager)
        return run_steps(model, optimizer, averager, gradient, transport.rank, 2, first=4)

    _, w_tildes, vs, _ = oracles.m_avg(start(), gradient, 4, 1, PERIOD, rate, mu)
    w = torch.stack([w_tildes[1] - rate * gradient(p, 3, w_tildes[1]) for p in range(4)]).mean(dim=0)
    w = [w, w]
    for t in (4, 5):
        w = [w[p] - rate * gradient(p, t, w[p]) for p in range(2)]
    expected = w_tildes[1] + mu * vs[1] + (sum(w) / 2 - w_tildes[1])
    result = in_ranks(2, second)
    torch.testing.assert_close(result[-1, 0], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(result[-1, 0], result[-1, 1])


@pytest.mark.parametrize("new_size", (1, 3, 8))
def test_what_was_withheld_enters_at_another_world_size(new_size):
    """The mean over ranks of the residuals is the same before and after."""
    gradient = oracles.make_gradient(4, 8, NUMEL)

    def first(transport):
        parts = make("block+topk", transport)
        run_steps(*parts, gradient, transport.rank, 6)
        return checkpoint(*parts)

    states = in_ranks(4, first)
    joined = average_checkpoints(states)

    def second(transport):
        parts = make("block+topk", transport)
        load(joined, *parts)
        return parts[2].reducer.state_dict()["residual"]

    after = in_ranks(new_size, second)
    for name in ("parameter 0", "parameter 1"):
        before = torch.stack([s["averager"]["reducers"][0]["residual"][name] for s in states]).mean(dim=0)
        zero = torch.zeros_like(before)
        now = torch.stack([a.get(name, zero) for a in after]).mean(dim=0)
        assert before.abs().max() > 0
        torch.testing.assert_close(now, before)


def test_the_wrapper_carries_the_averagers_state():
    transport = in_process.group(1)[0]
    model, local, averager = make("block", transport)
    optimizer = AveragedOptimizer(local, averager)
    gradient = oracles.make_gradient(1, 4, NUMEL)
    for t in range(4):
        model.set_gradient(gradient(0, t, model.flat()))
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    model2, local2, averager2 = make("block", transport)
    again = AveragedOptimizer(local2, averager2)
    again.load_state_dict(state)
    assert averager2.step == 4 and torch.equal(averager2.velocity, averager.velocity)


def test_average_checkpoints_of_real_state_dicts():
    """Adam's moments and BatchNorm's statistics are averaged, counts and hyperparameters taken over."""
    states = []
    for rank in range(2):
        torch.manual_seed(rank)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(torch.randn(4, 2)).sum().backward()
        if rank == 1:
            model[0].bias.grad = None  # no state for this one on rank 1
        optimizer.step()
        states.append(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "note": None}
        )
    joined = average_checkpoints(states)
    mean = (states[0]["model"]["1.running_mean"] + states[1]["model"]["1.running_mean"]) / 2
    torch.testing.assert_close(joined["model"]["1.running_mean"], mean)
    assert joined["model"]["1.num_batches_tracked"] == 1 and joined["epoch"] == 3 and joined["note"] is None
    moments = [s["optimizer"]["state"].get(1, {}).get("exp_avg", torch.zeros(2)) for s in states]
    torch.testing.assert_close(joined["optimizer"]["state"][1]["exp_avg"], (moments[0] + moments[1]) / 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.load_state_dict(joined["model"])
    torch.optim.Adam(model.parameters()).load_state_dict(joined["optimizer"])


def test_states_in_the_wrong_place_are_refused():
    transports = in_process.group(2)
    averagers = [LocalSGD(2, transport=t) for t in transports]
    states = [a.state_dict() for a in averagers]
    with pytest.raises(ValueError, match="rank 0 of 2, this is rank 1 of 2"):
        averagers[1].load_state_dict(states[0])
    with pytest.raises(ValueError, match="rank 0 of 2, this is rank 0 of 1.*average_checkpoints"):
        LocalSGD(2, transport=in_process.group(1)[0]).load_state_dict(states[0])
    averagers[0].step = 1
    with pytest.raises(ValueError, match=r"step must be the same.*\[0, 1\]"):
        average_checkpoints([{"averager": a.state_dict()} for a in averagers])
    with pytest.raises(ValueError, match=r"order, got \[1, 0\]"):
        average_checkpoints([{"averager": s} for s in reversed(states)])
    with pytest.raises(ValueError, match="at least one"):
        average_checkpoints([])
    with pytest.raises(ValueError, match="one shape"):
        average_checkpoints([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}])
    with pytest.raises(ValueError, match=r"missing on ranks \[1\]"):
        average_checkpoints([{"w": 1}, {}])
    model, _, block = make("block", in_process.group(1)[0])
    with pytest.raises(ValueError, match="anchor must have 10 elements, got 3"):
        state = block.state_dict()
        state["shared"]["anchor"] = torch.zeros(3)
        block.load_state_dict(state)
    plain, compressed = (
        make("local", in_process.group(1)[0])[2],
        make("local+topk", in_process.group(1)[0])[2],
    )
    with pytest.raises(ValueError, match="with a reducer"):
        plain.load_state_dict(compressed.state_dict())
    with pytest.raises(ValueError, match="without a reducer"):
        compressed.load_state_dict(plain.state_dict())


def test_a_compressed_averager_saves_the_same_in_every_memory_format():
    """Its messages and its memory have the order of the indices."""
    shape = (4, 3, 5, 2)

    def work(transport, kinds):
        saved = model = None
        for step, channels_last in enumerate(kinds):
            start_at = torch.zeros(shape) if model is None else model
            form = torch.channels_last if channels_last else torch.contiguous_format
            weight = torch.nn.Parameter(start_at.clone(memory_format=form))
            reducer = Reducer(TopK(0.1), AllGather(transport), ErrorFeedback(), dense_crossover=False)
            averager = LocalSGD(period=1, params=[weight], reducer=reducer, transport=transport)
            if saved is not None:
                averager.load_state_dict(saved)
            generator = torch.Generator().manual_seed(10 * step + transport.rank)
            weight.data += torch.randn(shape, generator=generator)
            averager.average_parameters([weight])
            saved, model = averager.state_dict(), weight.detach().clone()
        return model.reshape(-1), saved["reducers"][0]["residual"]["parameter 0"]

    expected = in_process.run(2, lambda t: work(t, [False, False, False]))
    found = in_process.run(2, lambda t: work(t, [True, False, True]))
    for (model, residual), (other, same) in zip(expected, found, strict=True):
        assert torch.equal(model, other) and torch.equal(residual, same) and residual.any()
