"""A module's buffers in an averaging: masks, caches, equal and unequal values, all dtypes."""

import math

import pytest
import torch

from commhooks.averaging import (
    BlockMomentum,
    DecentralizedMomentum,
    LocalSGD,
    RestartedMomentum,
    topology,
)
from commhooks.averaging.buffers import average_exactly
from commhooks.errors import SettingsMismatchError
from commhooks.transports import in_process

KINDS = ("local", "weighted", "block", "restarted", "decentralized")


def model_with(persistent=True, **buffers):
    model = torch.nn.Linear(2, 2)
    for p in model.parameters():
        torch.nn.init.ones_(p)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer, persistent=persistent)
    return model


def average(kind, model, transport, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"transport": transport, "module": model, **options}
    averager = {
        "local": lambda: LocalSGD(1, **options),
        "weighted": lambda: LocalSGD(1, weight=1.0 + transport.rank, **options),
        "block": lambda: BlockMomentum(0.5, 1, params=model.parameters(), **options),
        "restarted": lambda: RestartedMomentum(optimizer, 1, **options),
        "decentralized": lambda: DecentralizedMomentum(
            optimizer, topology.ring(transport.world_size), **options
        ),
    }[kind]()
    averager.average_parameters(model.parameters())


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", (2, 3, 5, 6, 7))
def test_equal_buffers_keep_their_bits(kind, world_size):
    """Random tables, masks of -inf and of the largest finite number, in every dtype."""

    def work(transport):
        tables = {}
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(7)
            table = 10 * torch.randn(50, generator=generator, dtype=torch.float64)
            lowest = torch.finfo(dtype if dtype.is_floating_point else torch.float32).min
            name = str(dtype)[6:]
            tables[f"table_{name}"] = table.to(dtype) * (1 + 1j if dtype.is_complex else 1)
            tables[f"lowest_{name}"] = torch.tensor([lowest, -lowest, 0.0, 1.0], dtype=torch.float64).to(
                dtype
            )
            tables[f"mask_{name}"] = torch.full((2, 2), -torch.inf).triu(1).to(dtype)
        model = model_with(**tables)
        before = {name: b.clone() for name, b in model.named_buffers()}
        for _ in range(3):
            average(kind, model, transport)
        wide = (torch.float64, torch.complex128)
        return [
            name
            for name, b in model.named_buffers()
            if not torch.equal(b, before[name]) and not (kind == "weighted" and b.dtype in wide)
        ]

    assert in_process.run(world_size, work) == [[]] * world_size


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_buffers_become_the_mean(kind):
    """An element that is not finite on a rank is the mean over the others: a scaler skips steps, not forward
    passes.
    """

    def work(transport):
        rank = float(transport.rank)
        spoiled = torch.tensor([rank, rank, rank])
        if transport.rank == 2:
            spoiled = torch.tensor([torch.nan, torch.inf, rank])
        wide = torch.tensor([rank, 1e300 * rank], dtype=torch.float64)
        model = model_with(
            plain=torch.tensor([rank]), wide=wide, spoiled=spoiled, every=torch.tensor([torch.nan])
        )
        average(kind, model, transport)
        return [b.tolist() for b in model.buffers()]

    shares = [1 / 6, 2 / 6, 3 / 6] if kind == "weighted" else [1 / 3] * 3
    mean = sum(s * rank for rank, s in enumerate(shares))
    finite = shares[1] / (shares[0] + shares[1])
    for plain, wide, spoiled, every in in_process.run(3, work):
        assert plain == pytest.approx([mean]) and wide == pytest.approx([mean, 1e300 * mean])
        assert math.isnan(every[0])
        if kind == "decentralized":  # ring(3): all are neighbours; the mean of two, kept by one third each
            assert all(0.0 <= x <= 1.0 for x in spoiled[:2]) and spoiled[2] == pytest.approx(mean)
        else:
            assert spoiled == pytest.approx([finite, finite, mean])


def test_propagate_leaves_nan_in_buffers_too():
    def work(transport):
        model = model_with(running=torch.tensor([torch.nan if transport.rank else 1.0]))
        average("local", model, transport, nonfinite="propagate")
        return model.running.item()

    assert all(value != value for value in in_process.run(2, work))


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_are_not_persistent_stay(kind):
    """Each rank makes them for itself; a cache has another size on another rank."""

    def work(transport):
        model = model_with(persistent=False, cos=torch.full((5 + transport.rank,), float(transport.rank)))
        average(kind, model, transport)
        return model.cos.tolist()

    assert in_process.run(2, work) == [[0.0] * 5, [1.0] * 6]


@pytest.mark.parametrize("kind", KINDS)
def test_persistent_buffers_of_different_sizes_are_named_as_buffers(kind):
    def work(transport):
        average(kind, model_with(cos=torch.zeros(5 + transport.rank)), transport)

    with pytest.raises(SettingsMismatchError, match="disagree on buffers"):
        in_process.run(2, work)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_every_layout(kind):
    """Expanded (elements in memory once), transposed, empty, a scalar, one under two names; a sparse one
    stays.
    """

    def work(transport):
        rank = float(transport.rank)
        twice = torch.tensor([rank])
        model = model_with(
            expanded=torch.tensor([rank]).expand(4),
            turned=(torch.arange(6.0).view(2, 3) + rank).t(),
            empty=torch.zeros(0),
            scalar=torch.tensor(rank),
            one=twice,
            other=twice,
        )
        model.register_buffer("sparse", torch.eye(2).to_sparse() * (1.0 + rank))
        average(kind, model, transport)
        return [b.to_dense().tolist() for b in model.buffers()]

    mean = 2 / 3 if kind == "weighted" else 0.5
    for rank, row in enumerate(in_process.run(2, work)):
        expanded, turned, empty, scalar, one, sparse = row
        assert expanded == pytest.approx([mean] * 4) and scalar == pytest.approx(mean) and empty == []
        assert torch.tensor(turned).flatten().tolist() == pytest.approx(
            [0, 3, 1, 4, 2, 5] + torch.tensor(mean).numpy()
        )
        assert one == pytest.approx([mean]) and sparse == [[1.0 + rank, 0.0], [0.0, 1.0 + rank]]


def test_the_mean_of_wide_numbers_is_as_exact_as_float64():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 100, generator=generator, dtype=torch.float64)

    def work(transport):
        own = [values[transport.rank].clone()]

        def total(flat):
            transport.all_reduce(flat, tag=1, what="test")
            return flat

        average_exactly(own, total, 3, None, nonfinite=False)
        return own[0]

    for mean in in_process.run(3, work):
        torch.testing.assert_close(mean, values.mean(dim=0), rtol=1e-15, atol=1e-15)
