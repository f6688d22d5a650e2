"""Averaging on a low-bit wire: what is withheld stays in the rank's own model, and nothing is lost."""

import copy
import logging

import pytest
import torch

from commhooks import AllGather, LowBit, Reducer, TopK
from commhooks.averaging import (
    BlockMomentum,
    DecentralizedMomentum,
    DiLoCo,
    LocalSGD,
    RestartedMomentum,
    SlowMo,
    average_checkpoints,
    topology,
)
from commhooks.errors import NonFiniteGradientError, SettingsMismatchError
from commhooks.transports import in_process

from .scenarios import check_wire, flat_of, local_step, moved, pair_of_parameters

KINDS = ("local", "block", "diloco", "slowmo")


def made(kind, params, transport, bits=1, period=1, **options):
    """An averager without momentum on a wire: every synchronisation is A += mean."""
    options = {"transport": transport, "wire": LowBit(bits), **options}
    if kind == "local":
        return LocalSGD(period, params=params, **options)
    if kind == "block":
        return BlockMomentum(0.0, period, params=params, **options)
    if kind == "diloco":
        return DiLoCo(params, lambda tensors: torch.optim.SGD(tensors, lr=1.0), sync_every=period, **options)
    return SlowMo(torch.optim.SGD(params, lr=1.0), 0.0, period, **options)


def integers(rank, step, n, low=-64, high=64):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(low, high + 1, (n,), generator=generator).float()


def owned_of(averager, n):
    """What this rank owns, zero elsewhere."""
    state = averager.state_dict()["wire"]
    whole = torch.zeros(n)
    whole[state["start"] : state["start"] + state["owned"].numel()] = state["owned"]
    return whole


def everything(pairs):
    """``mean_p w_p + eo`` in float64 of ``(model, owned)`` of each rank."""
    return sum(w.double() for w, _ in pairs) / len(pairs) + sum(o.double() for _, o in pairs)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 5))
def test_equals_the_simulation_at_more_ranks(world_size):
    in_process.run(world_size, check_wire)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
def test_a_synchronisation_conserves_to_the_last_bit(kind, world_size):
    def work(transport):
        params = pair_of_parameters()
        seen = []
        averager = made(kind, params, transport, bits=(1, 2, 4, 8)[world_size.bit_length() - 1])
        for step in range(4):
            local_step(params, integers(transport.rank, step, 700))
            before = flat_of(params), owned_of(averager, 700)
            averager.average_parameters(params)
            seen.append((before, (flat_of(params), owned_of(averager, 700))))
        return seen, averager.state_dict()["shared"]["anchor"]

    results = in_process.run(world_size, work)
    for step in range(4):
        before = everything([seen[step][0] for seen, _ in results])
        after = everything([seen[step][1] for seen, _ in results])
        assert torch.equal(before, after), step
    assert all(torch.equal(anchor, results[0][1]) for _, anchor in results)
    if world_size > 1:
        assert not torch.equal(results[0][0][-1][1][0], results[1][0][-1][1][0])  # each has its own model
        assert any(seen[-1][1][1].any() for seen, _ in results)


@pytest.mark.parametrize("kind", KINDS)
def test_without_loss_it_is_the_averaged_local_step(kind):
    """K = 1 on a lossless wire: every model is the mean of the local steps, as without a wire."""

    def work(transport, **options):
        params = pair_of_parameters()
        averager = made(kind, params, transport, bits=32, **options)
        history = []
        for step in range(3):
            local_step(params, integers(transport.rank, step, 700))
            averager.average_parameters(params)
            history.append(flat_of(params))
        return torch.cat(history)

    for ours, dense in zip(
        in_process.run(4, work), in_process.run(4, lambda t: work(t, wire=None)), strict=True
    ):
        assert torch.equal(ours, dense)


INNER = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    INNER["muon"] = lambda params: torch.optim.Muon(params[:1], lr=1e-2)


def trained(params, optimizer, averager, rank, steps):
    """Local steps on a quadratic of the rank's own; batches by step."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        loss = sum((p - torch.randn(p.shape, generator=generator)).square().sum() for p in params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averager.average_parameters(params)


def nesterov(tensors):
    return torch.optim.SGD(tensors, lr=1.0, momentum=0.5, nesterov=True)


@pytest.mark.parametrize("inner", INNER)
def test_resuming_in_the_middle_of_a_block_is_bit_exact(inner):
    def fresh(transport):
        params = pair_of_parameters()
        averager = DiLoCo(params, nesterov, sync_every=3, wire=LowBit(1), transport=transport)
        return params, INNER[inner](params), averager

    def work(transport):
        params, optimizer, averager = fresh(transport)
        trained(params, optimizer, averager, transport.rank, range(7))
        saved = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict(), averager.state_dict()))
        trained(params, optimizer, averager, transport.rank, range(7, 13))
        again, other, resumed = fresh(transport)
        with torch.no_grad():
            for p, value in zip(again, saved[0], strict=True):
                p.copy_(value)
        other.load_state_dict(saved[1])
        resumed.load_state_dict(saved[2])
        trained(again, other, resumed, transport.rank, range(7, 13))
        assert torch.equal(flat_of(again), flat_of(params))
        assert torch.equal(owned_of(resumed, 700), owned_of(averager, 700))
        assert owned_of(averager, 700).any() or transport.rank == 0
        return averager.anchor, flat_of(params)

    results = in_process.run(3, work)
    assert all(torch.equal(anchor, results[0][0]) for anchor, _ in results)
    assert not torch.equal(results[0][1], results[1][1])


def test_another_number_of_ranks_conserves_and_goes_on():
    def before(transport):
        params = pair_of_parameters()
        averager = made("diloco", params, transport, bits=2, period=2)
        for step in range(5):  # one local step into a block
            local_step(params, integers(transport.rank, step, 700))
            averager.average_parameters(params)
        pair = flat_of(params), owned_of(averager, 700)
        names = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
        return {"model": names, "averager": averager.state_dict()}, pair

    results = in_process.run(4, before)
    had = everything([pair for _, pair in results])
    checkpoint = average_checkpoints([saved for saved, _ in results])

    for world_size in (1, 2, 8):

        def after(transport):
            params = pair_of_parameters()
            averager = made("diloco", params, transport, bits=2, period=2)
            with torch.no_grad():
                for p, value in zip(params, checkpoint["model"].values(), strict=True):
                    p.copy_(value)
            averager.load_state_dict(checkpoint["averager"])
            pairs = [(flat_of(params), owned_of(averager, 700))]
            averager.average_parameters(params)  # step 6 ends the block
            pairs.append((flat_of(params), owned_of(averager, 700)))
            return pairs

        found = in_process.run(world_size, after)
        for moment in (0, 1):
            have = everything([pairs[moment] for pairs in found])
            torch.testing.assert_close(have, had, rtol=0, atol=1e-4)
        assert sum(float(pairs[0][1].abs().sum()) for pairs in found) > 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_freeze_leave_whole_and_those_that_join_start_equal(kind):
    """A frozen tensor takes what was withheld of it along, and is the same on all ranks from then on."""

    def work(transport):
        params, tied = pair_of_parameters(), torch.nn.Parameter(torch.zeros(300))
        params.append(tied)
        averager = made(kind, params, transport, bits=1)
        seen = []
        for step in range(6):
            if step == 2:
                params[0].requires_grad_(False)
            if step == 4:
                params[0].requires_grad_(True)
            change = integers(transport.rank, step, 1000)
            if step in (3,):
                change[:600] = 0.0
            local_step(params, change)
            n = sum(p.numel() for p in params)
            before = flat_of(params)
            averager.average_parameters([*params, tied])  # a tied tensor comes twice
            seen.append((before, flat_of(params), averager.state_dict()["wire"]["owned"].double().sum()))
            assert n == 1000
        return seen

    results = in_process.run(2, work)
    for step in range(6):
        # in sums over all elements: the layout of what is owned changes with the members
        before = sum(seen[step][0].double().sum() for seen in results) / 2
        owned = [sum(seen[s][2] for seen in results) for s in (max(step - 1, 0), step)]
        after = sum(seen[step][1].double().sum() for seen in results) / 2
        assert before + (owned[0] if step else 0.0) == after + owned[1], step
        frozen = [seen[step][1][:600] for seen in results]
        assert torch.equal(*frozen) == (step in (2, 3, 4)), step  # at step 4 it joins, averaged plainly


@pytest.mark.parametrize("kind", KINDS)
def test_nan_on_one_rank_is_an_error_before_anything_moves_or_is_left_out(kind):
    def work(transport, policy):
        params = pair_of_parameters()
        averager = made(kind, params, transport, bits=1, nonfinite=policy)
        for step in range(2):
            local_step(params, integers(transport.rank, step, 700))
            averager.average_parameters(params)
        local_step(params, integers(transport.rank, 2, 700))
        if transport.rank == 1:
            params[0].data[0, 0] = float("nan")
        before, state = flat_of(params), averager.state_dict()
        if policy == "error":
            with pytest.raises(NonFiniteGradientError, match=r"ranks \[1\]"):
                averager.average_parameters(params)
            assert torch.equal(before[1:], flat_of(params)[1:])
            assert torch.equal(state["wire"]["owned"], averager.state_dict()["wire"]["owned"])
        else:
            averager.average_parameters(params)
        return flat_of(params), averager.state_dict()["shared"]["anchor"], state["shared"]["anchor"]

    for _, anchor, before in in_process.run(2, lambda t: work(t, "error")):
        assert torch.equal(anchor, before)
    skipped = in_process.run(2, lambda t: work(t, "skip"))
    assert torch.equal(skipped[1][0], skipped[1][1])  # it was left out, and takes over the common model
    assert torch.equal(skipped[0][1], skipped[1][1]) and not torch.equal(skipped[0][1], skipped[0][2])
    for model, anchor, _ in in_process.run(2, lambda t: work(t, "propagate")):
        assert bool(model.isnan().all()) and bool(anchor.isnan().all())


def test_the_common_model_is_there_for_a_while():
    def work(transport):
        params = pair_of_parameters()
        averager = made("block", params, transport, bits=1, period=2)
        for step in range(3):
            local_step(params, integers(transport.rank, step, 700))
            averager.average_parameters(params)
        own = flat_of(params)
        storages = [p.data_ptr() for p in params]
        with averager.common_model():
            common = flat_of(params)
        assert torch.equal(flat_of(params), own) and [p.data_ptr() for p in params] == storages
        assert torch.equal(common, averager.anchor) and not torch.equal(common, own)
        with pytest.raises(KeyError), averager.common_model():
            raise KeyError
        assert torch.equal(flat_of(params), own)
        return common

    common = in_process.run(3, work)
    assert torch.equal(common[0], common[1]) and torch.equal(common[0], common[2])

    def without(transport):
        with pytest.raises(RuntimeError, match="LocalSGD has no common model of its own"):
            with LocalSGD(2, transport=transport).common_model():
                pass

    in_process.run(1, without)


def test_a_model_changed_between_blocks_is_noticed_and_an_untouched_one_is_not(caplog):
    def work(transport, changes):
        params = pair_of_parameters()
        optimizer = torch.optim.SGD(params, lr=0.1)
        averager = DiLoCo(params, nesterov, sync_every=2, wire=LowBit(1), transport=transport)
        trained(params, optimizer, averager, transport.rank, range(4))
        if changes:
            params[1].data[3] += 1.0
        trained(params, optimizer, averager, transport.rank, range(4, 6))

    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, False))
        assert not [r for r in caplog.records if "not where the averager left it" in r.getMessage()]
        in_process.run(2, lambda t: work(t, True))
    assert [r for r in caplog.records if "not where the averager left it" in r.getMessage()]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_on_the_wire(kind):
    """What the rounding keeps is in the rank's own model; a run goes on in mid-block, and at other sizes."""

    def made_for(params, transport):
        return made(kind, params, transport, period=2, wire=torch.bfloat16)

    def before(transport):
        params = pair_of_parameters()
        averager = made_for(params, transport)
        assert repr(averager.wire) == "LowBit(bits=16)" and averager.settings()["wire"] == "LowBit(bits=16)"
        change = lambda step: moved(transport.rank, step) * 100.0  # noqa: E731
        for step in range(3):  # one local step into a block
            local_step(params, change(step))
            averager.average_parameters(params)
        anchor = averager.state_dict()["shared"]["anchor"]
        saved = copy.deepcopy(({f"p{i}": p.detach() for i, p in enumerate(params)}, averager.state_dict()))
        held = flat_of(params), owned_of(averager, 700)
        kept = held[0] - change(2) - anchor
        assert 0.0 < kept.abs().max() < 1.0  # below what bfloat16 rounds off of changes of a few hundreds
        other = pair_of_parameters()
        resumed = made_for(other, transport)
        for p, value in zip(other, saved[0].values(), strict=True):
            p.data.copy_(value)
        resumed.load_state_dict(saved[1])
        for step in range(3, 6):
            for own, one in ((params, averager), (other, resumed)):
                local_step(own, change(step))
                one.average_parameters(own)
        assert torch.equal(flat_of(params), flat_of(other))
        assert torch.equal(owned_of(averager, 700), owned_of(resumed, 700))
        return {"model": saved[0], "averager": saved[1]}, held, anchor

    results = in_process.run(3, before)
    assert all(torch.equal(anchor, results[0][2]) for _, _, anchor in results)
    had = everything([held for _, held, _ in results])
    checkpoint = average_checkpoints([saved for saved, _, _ in results])

    def after(transport):
        params = pair_of_parameters()
        averager = made_for(params, transport)
        for p, value in zip(params, checkpoint["model"].values(), strict=True):
            p.data.copy_(value)
        averager.load_state_dict(checkpoint["averager"])
        averager.average_parameters(params)  # step 4 ends the block
        return flat_of(params), owned_of(averager, 700)

    for world_size in (1, 2, 5):
        have = everything(in_process.run(world_size, after))
        torch.testing.assert_close(have, had, rtol=0, atol=1e-4)  # float32 of hundreds; bfloat16 is off by 1


def test_broadcast_forgets_what_was_withheld():
    def work(transport):
        params = pair_of_parameters()
        averager = made("block", params, transport, bits=1)
        local_step(params, integers(transport.rank, 0, 700))
        averager.average_parameters(params)
        averager.broadcast_parameters(params)
        assert not owned_of(averager, 700).any() and torch.equal(flat_of(params), averager.anchor)
        return flat_of(params)

    a, b = in_process.run(2, work)
    assert torch.equal(a, b)


def test_its_bytes_are_a_hundredth():
    """1 bit every 4 steps, against 6 bytes an element and step of a dense all-reduce at 4 ranks."""

    def work(transport):
        params = [torch.nn.Parameter(torch.zeros(60_000))]
        averager = made("diloco", params, transport, bits=1, period=4)
        for step in range(8):
            local_step(params, integers(transport.rank, step, 60_000))
            averager.average_parameters(params)
        return averager.stats()

    stats = in_process.run(4, work)[0]
    assert stats["synchronisations"] == 2 and stats["distance"] > 0.0
    assert 8 * 6 * 60_000 / stats["bytes_sent"] > 112


def test_wrong_wires_are_refused():
    params = pair_of_parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def work(transport):
        reducer = Reducer(TopK(0.1), AllGather(transport=transport))
        cases = [
            (
                lambda: made("block", params, transport, wire=4),
                TypeError,
                "wire must be a LowBit or torch.bfloat16, got int",
            ),
            (
                lambda: made("block", params, transport, wire=torch.float16),
                TypeError,
                "bfloat16, got torch.float16",
            ),
            (lambda: made("block", params, transport, reducer=reducer), ValueError, "without a reducer"),
            (
                lambda: made("block", params, transport, wire=LowBit(1, "mpi")),
                ValueError,
                "its transport is the averager's",
            ),
            (
                lambda: RestartedMomentum(optimizer, 2, transport=transport, wire=LowBit(1)),
                ValueError,
                "RestartedMomentum",
            ),
            (
                lambda: DecentralizedMomentum(
                    optimizer, topology.complete(1), transport=transport, wire=LowBit(1)
                ),
                ValueError,
                "wire goes with LocalSGD",
            ),
            (lambda: LocalSGD(2, transport=transport, wire=LowBit(1)), ValueError, "params must be given"),
        ]
        for make, kind, text in cases:
            with pytest.raises(kind, match=text):
                make()
        averager = made("block", params, transport, bits=1)
        with pytest.raises(ValueError, match="saved wire holds elements 0 to 9"):
            state = averager.state_dict()
            averager.load_state_dict({**state, "wire": {"start": 0, "owned": torch.ones(9)}})

    in_process.run(1, work)

    def differing(transport):
        own = pair_of_parameters()
        averager = made("block", own, transport, bits=1 + transport.rank)
        with pytest.raises(SettingsMismatchError, match=r"LowBit\(bits=[12]\)"):
            averager.average_parameters(own)

    in_process.run(2, differing)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_other_dtypes_travel_as_float32(dtype):
    def work(transport):
        params = [torch.nn.Parameter(torch.zeros(700, dtype=dtype))]
        averager = made("block", params, transport, bits=8)
        for step in range(3):
            local_step(params, integers(transport.rank, step, 700).to(dtype))
            averager.average_parameters(params)
        assert averager.anchor.dtype == torch.float32 and params[0].dtype == dtype
        return averager.anchor

    anchor = in_process.run(2, work)
    assert torch.equal(*anchor)
    given = sum(integers(p, step, 700) for p in range(2) for step in range(3)) / 2
    torch.testing.assert_close(anchor[0], given, rtol=0.0, atol=2.0)
