"""How often the host reads a tensor's value for a bucket: on a GPU each of these waits for the device."""

import threading
from collections import Counter

import pytest
import torch
from ranks import ALL_SCHEMES, integers, reducer

from commhooks import Bucket, ErrorFeedback
from commhooks.native import checks
from commhooks.transports import in_process
from commhooks.wire import message

READS = ("item", "tolist", "nonzero", "cpu", "__bool__", "__float__", "__int__", "__index__")
ON_THE_CPU_ONLY = (
    (checks, "segment_order"), (checks, "row_order"), (checks, "index_order"), (checks, "low_bit_contents"),
    (message, "_check_indices"),
)  # fmt: skip
SCHEMES = (*ALL_SCHEMES, "lowbit")
pytestmark = pytest.mark.native  # the reference reads as it likes


@pytest.fixture
def reads(monkeypatch):
    """Counts reads by thread; a read that another read makes is not counted again."""
    counted, within = Counter(), threading.local()

    def counting(name):
        plain = getattr(torch.Tensor, name)

        def read(tensor, *arguments):
            if within.__dict__.get("a_read"):
                return plain(tensor, *arguments)
            counted[threading.get_ident()] += 1
            within.a_read = True
            try:
                return plain(tensor, *arguments)
            finally:
                within.a_read = False

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    for module, name in ON_THE_CPU_ONLY:
        monkeypatch.setattr(module, name, lambda *arguments, **options: None)
    return counted


def reads_of_a_bucket(reads, scheme, world_size, parameters, momentum=0.9):
    """The most that any rank reads in a step that is not its first. One parameter has no gradient."""

    def work(transport):
        red = reducer(scheme, transport, 0.1, ErrorFeedback(momentum))
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(2):
            before = reads[threading.get_ident()]
            buffer = integers(generator, 6 * parameters)
            buffer[:6] = 0.0
            red.reduce(Bucket(0, buffer, tuple(f"p{i}" for i in range(parameters)), (6,) * parameters))
        return reads[threading.get_ident()] - before

    return max(in_process.run(world_size, work))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parameters_and_momentum_cost_no_reads(reads, scheme):
    """Which parameters have no gradient is in the selection's report and flags: no ``any()`` a parameter."""
    few, many, plain = (
        reads_of_a_bucket(reads, scheme, 2, parameters, momentum)
        for parameters, momentum in ((4, 0.9), (60, 0.9), (60, 0.0))
    )
    assert few == many == plain > 0


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "gtopk" not in scheme])
def test_ranks_cost_no_reads(reads, scheme):
    """The headers, or the votes, of all ranks are read at once."""
    assert len({reads_of_a_bucket(reads, scheme, world_size, 4) for world_size in (2, 4, 5)}) == 1


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("union", 2),  # the selection's report; the headers
        ("shared", 2),  # the report; the last element of the sum
        ("dense", 2),
        ("threshold", 3),  # and the threshold, before the pass
        ("gtopk", 5),  # the report; the headers of two rounds; which own pairs survived, which did not
    ],
)
def test_reads_of_four_ranks(reads, scheme, expected):
    assert reads_of_a_bucket(reads, scheme, 4, 4) == expected


def test_the_norm_of_all_residuals_is_one_read(reads):
    """Also after a bucket was laid out anew with fewer parameters, so that only some of the memory counts."""
    red = reducer("union", in_process.group(1)[0], 0.1, ErrorFeedback())
    layouts = [(0, range(40)), (1, range(40, 60)), (1, range(30, 60))]
    for index, parameters in layouts:
        numels = (6,) * len(parameters)
        red.reduce(Bucket(index, torch.ones(sum(numels)), tuple(f"p{i}" for i in parameters), numels))
    before = sum(reads.values())
    norm = red.stats()["residual_norm"]
    assert sum(reads.values()) - before == 1
    saved = red.state_dict()["residual"]
    assert norm == pytest.approx(float(torch.cat(list(saved.values())).norm())) and norm > 0
