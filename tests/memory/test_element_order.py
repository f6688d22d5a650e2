"""Checkpoints hold elements in the order of their indices, so that they load into every memory layout."""

from pathlib import Path

import pytest
import torch
from ranks import integers

from commhooks import AllGather, Bucket, ErrorFeedback, LowBit, Reducer, TopK
from commhooks.memory.element_order import order_of
from commhooks.transports import in_process

SHAPES = {"conv.weight": (4, 20, 2, 2), "cut": (6, 7), "conv.bias": (4,)}
VERSION_1 = torch.load(Path(__file__).resolve().parents[1] / "data" / "v1" / "states.pt", weights_only=True)


def contiguous(name):
    return torch.nn.Parameter(torch.zeros(SHAPES[name]))


def other(name):
    """channels_last, transposed, and as it is."""
    shape = SHAPES[name]
    if len(shape) == 4:
        return torch.nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last))
    return torch.nn.Parameter(torch.zeros(shape[::-1]).t())


def laid_out(parameter, values):
    """``values``, by index, as DDP lays the parameter out: in the order of its memory."""
    like = torch.empty_like(parameter.detach(), memory_format=torch.preserve_format)
    assert like.stride() == parameter.stride()
    return like.copy_(values.view(parameter.shape)).as_strided((values.numel(),), (1,)).clone()


def by_index(parameter, segment):
    return segment.as_strided(parameter.shape, parameter.stride()).reshape(-1)


class Run:
    """One rank's Reducer over one bucket of parameters that lie in memory as ``make`` makes them."""

    def __init__(self, transport, case, make, names=tuple(SHAPES)):
        memory = ErrorFeedback(0.5 if case == "topk" else 0.0)
        parts = (TopK(0.1), AllGather(transport)) if case == "topk" else (None, LowBit(4, transport))
        self.reducer = Reducer(*parts, memory, dense_crossover=False)
        self.named = {name: make(name) for name in names}
        memory.table.names.update({p: name for name, p in self.named.items()})

    def average(self, gradients):
        """The averages by name and index; ``gradients`` likewise."""
        pieces = [laid_out(p, gradients[name]) for name, p in self.named.items()]
        numels = tuple(p.numel() for p in self.named.values())
        buffer = torch.cat(pieces)
        self.reducer.reduce(Bucket(0, buffer, tuple(self.named.values()), numels, in_memory_order=True))
        parts = buffer.split(numels)
        return {
            name: by_index(p, part.clone()) for (name, p), part in zip(self.named.items(), parts, strict=True)
        }

    def owed(self):
        """What this rank withholds, by name and index: its residual, and P times what it owns."""
        state, size = self.reducer.state_dict(), self.reducer.transport.world_size
        owed = {name: values.clone() for name, values in state["residual"].items()}
        for name, pieces in state.get("owned", {}).items():
            for start, kept in pieces.items():
                owed[name][start : start + kept.numel()] += size * kept
        return owed


def gradients_of(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {
        name: integers(generator, torch.Size(shape).numel(), unit=1.0 / 16) for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("case", ["topk", "lowbit"])
def test_every_layout_saves_by_index_and_loads_into_every_other(case):
    """Conservation by index through a change of layout: applied + owed == sum of the gradients."""

    def work(transport, before, after):
        rank = transport.rank
        run = Run(transport, case, before)
        plain = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in SHAPES.items()}
        total, applied = dict(plain), dict(plain)

        def step(one, number):
            gradients = gradients_of(rank, number)
            averages = one.average(gradients)
            for name in SHAPES:
                velocity = momentum[name] = momentum[name] / 2 + gradients[name] if case == "topk" else None
                total[name] = total[name] + (gradients[name] if velocity is None else velocity)
                applied[name] = applied[name] + averages[name]

        momentum = dict(plain)
        for number in range(3):
            step(run, number)
        saved = run.reducer.state_dict()
        if case == "topk":
            for name in SHAPES:
                assert torch.equal(saved["velocity"][name], momentum[name]), name
        second = Run(transport, case, after)
        second.reducer.load_state_dict(saved)
        again = second.reducer.state_dict()  # nothing of it is in a bucket yet
        for name in SHAPES:
            assert torch.equal(again["residual"][name], saved["residual"][name])
        for number in (3, 4):
            step(second, number)
        return total, applied, second.owed()

    for before, after in ((other, contiguous), (contiguous, other), (other, other)):
        ranks = in_process.run(2, lambda t, b=before, a=after: work(t, b, a))
        for name in SHAPES:
            total = sum(r[0][name] for r in ranks) / 2
            owed = sum(r[2][name] for r in ranks) / 2
            assert bool(owed.any())
            torch.testing.assert_close(ranks[0][1][name] + owed, total, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_in_the_same_layout_is_bit_for_bit():
    def work(transport, case):
        run = Run(transport, case, other)
        for number in range(3):
            run.average(gradients_of(transport.rank, number))
        second = Run(transport, case, other)
        second.reducer.load_state_dict(run.reducer.state_dict())
        for number in (3, 4):
            mine, theirs = (one.average(gradients_of(transport.rank, number)) for one in (run, second))
            assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)
        a, b = run.owed(), second.owed()
        assert all(torch.equal(a[name], b[name]) for name in SHAPES)

    for case in ("topk", "lowbit"):
        in_process.run(2, lambda t, c=case: work(t, c))


@pytest.mark.parametrize("case", ["topk", "lowbit"])
def test_a_new_layout_within_a_run_keeps_the_order(case):
    """A parameter that comes to another bucket takes its elements along by index."""

    def work(transport):
        run = Run(transport, case, other)
        run.average(gradients_of(transport.rank, 0))
        before = run.owed()
        moved = tuple(reversed(run.named.items()))
        zeros = torch.zeros(sum(p.numel() for _, p in moved))
        bucket = Bucket(
            0, zeros, tuple(p for _, p in moved), tuple(p.numel() for _, p in moved), in_memory_order=True
        )
        run.reducer.memory.for_bucket(bucket)
        if case == "topk":
            after = run.owed()
            assert all(torch.equal(before[name], after[name]) for name in SHAPES)
            return None
        run.reducer.reduce(bucket)  # zeros: what is owed changes only by what arrives
        after, parts = run.owed(), dict(zip((n for n, _ in moved), zeros.split(bucket.numels), strict=True))
        return before, after, {name: by_index(p, parts[name].clone()) for name, p in moved}

    ranks = in_process.run(2, work)
    if case == "lowbit":
        for name in SHAPES:
            was, now = (sum(r[i][name] for r in ranks) / 2 for i in (0, 1))
            torch.testing.assert_close(now + ranks[0][2][name], was, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["topk", "lowbit"])
def test_a_checkpoint_of_version_1_goes_on_bit_for_bit(case):
    """It has the order of DDP's buckets. ``data/v1/states.pt`` was written by the version that wrote them."""
    names = ("conv.weight", "conv.bias")
    states, expected = VERSION_1[case]["states"], VERSION_1[case]["next"]
    assert states[0]["version"] == 1

    def gradient(rank, step):
        generator = torch.Generator().manual_seed(10 * step + rank)
        return torch.randint(-64, 65, (324,), generator=generator).float() / 16

    def work(transport, names_first):
        run = Run(transport, case, other, names)
        table = run.reducer.memory.table
        named = dict(table.names)
        if not names_first:
            table.names.clear()
        run.reducer.load_state_dict(states[transport.rank])
        saved = run.reducer.state_dict()
        if not names_first:
            assert saved["version"] == 1
            table.names.update(named)
            saved = run.reducer.state_dict()
        weight, old = run.named["conv.weight"], states[transport.rank]
        assert saved["version"] == 2
        assert torch.equal(
            saved["residual"]["conv.weight"], by_index(weight, old["residual"]["conv.weight"].clone())
        )
        assert order_of(weight) is not None and not torch.equal(
            saved["residual"]["conv.weight"], old["residual"]["conv.weight"]
        )
        buffer = gradient(transport.rank, 3)
        run.reducer.reduce(Bucket(0, buffer, tuple(run.named.values()), (320, 4), in_memory_order=True))
        assert torch.equal(buffer, expected)

    for names_first in (True, False):
        in_process.run(2, lambda t, first=names_first: work(t, first))
