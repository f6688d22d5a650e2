"""What goes wrong: disagreement, ranks that stay away or fall out of step, bad arguments."""

import re
from functools import partial

import pytest
import torch

from commhooks import Dense, ErrorFeedback, Reducer
from commhooks.averaging import (
    BlockMomentum,
    DecentralizedMomentum,
    Every,
    LocalSGD,
    OutputAverage,
    RestartedMomentum,
    Uniform,
    topology,
)
from commhooks.errors import CommHooksError, PeerLostError, PeerTimeoutError, SettingsMismatchError
from commhooks.transports import in_process

from .workers import Pieces, averagers, run_steps, start


@pytest.mark.parametrize(
    ("sync", "steps", "width", "shown"),
    [
        ((2, 4), (4, 4), (3, 3), r"disagree on period: [24] here, [24] on rank [01]$"),
        ((2, 2), (4, 6), (3, 3), "disagree on step: . here, . on rank ."),
        ((2, 2), (4, 4), (3, 5), r"disagree on parameter shapes: \d elements"),
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

    shown = r"disagree on options: \['II?'\] here, \['II?'\] on ranks? [0-3, ]+$"
    with pytest.raises(SettingsMismatchError, match=shown):
        in_process.run(4, work, timeout_s=10)


def test_each_setting_that_differs_is_told_once():
    def work(transport):
        model = Pieces(start())
        if transport.rank == 0:
            averager = BlockMomentum(0.5, 2, params=model.parameters(), transport=transport)
        else:
            averager = BlockMomentum(0.7, Every(2, 4), params=model.parameters(), transport=transport)
        with pytest.raises(SettingsMismatchError) as caught:
            averager.synchronise(model.parameters())
        return str(caught.value)

    assert in_process.run(2, work, timeout_s=10)[0].endswith(
        "disagree on mu: 0.5 here, 0.7 on rank 1; "
        "period: 2 here, Every(period=2, start=4, total_steps=None) on rank 1"
    )


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

    seen = in_process.run(3, work, timeout_s=10.0 if comes else 1.5)
    if comes:
        assert {type(error) for error in seen} <= {SettingsMismatchError, PeerLostError}
        assert any(
            re.search(r"disagree on step: (2 here, 3|3 here, 2) on rank", str(error)) for error in seen
        )
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


@pytest.mark.parametrize(
    "call", ("synchronise", "broadcast_parameters", "consensus_distance", "average_now", "OutputAverage")
)
def test_every_call_that_communicates_tells_the_transport_of_its_failure(call):
    """Over MPI the process then leaves by Abort; Finalize would wait for the peer that is gone."""
    transport, _ = in_process.group(2, timeout_s=0.2)
    told = []
    transport.fail = told.append
    model = Pieces(start())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if call == "OutputAverage":
        output = OutputAverage(model.parameters(), Uniform())
        output.update()
        act = partial(output.result, transport)
    else:
        averager = DecentralizedMomentum(optimizer, topology.complete(2), transport=transport)
        act = partial(
            getattr(averager, call), model.parameters(), **({"root": 1} if call.startswith("b") else {})
        )
    with pytest.raises(PeerTimeoutError) as caught:
        act()
    assert told == [caught.value]


def test_the_reducers_own_transport_is_told_as_well():
    transport, _ = in_process.group(2, timeout_s=0.2)
    reducing, _ = in_process.group(2, timeout_s=0.2)
    told = []
    reducing.fail = told.append
    reducer = Reducer(None, Dense(transport=reducing), ErrorFeedback())
    reducer.open()
    averager = LocalSGD(1, params=ONE, transport=transport, reducer=reducer)
    with pytest.raises(PeerTimeoutError):
        averager.synchronise(ONE)
    assert len(told) == 1


ONE = [torch.nn.Parameter(torch.zeros(1))]


def make_sgd(**options):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, **options)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda t: LocalSGD(0, transport=t), "period.*0"),
        (lambda t: LocalSGD(4, weight=0.0, transport=t), "weight.*0"),
        (lambda t: LocalSGD(4, weight=float("nan"), transport=t), "weight.*nan"),
        (lambda t: LocalSGD(4, buffers="mean", transport=t), "buffers.*mean"),
        (lambda t: LocalSGD(4, transport="carrier pigeon"), "transport.*carrier pigeon"),
        (lambda t: LocalSGD(4, transport=t, reducer=object()), "params.*None"),
        (lambda t: BlockMomentum(1.0, 4, params=ONE, transport=t), "mu.*1.0"),
        (lambda t: BlockMomentum(-0.1, 4, params=ONE, transport=t), "mu.*-0.1"),
        (lambda t: BlockMomentum(0.5, 0, params=ONE, transport=t), "period.*0"),
        (lambda t: BlockMomentum(0.5, 2, params=[], transport=t), "params.*none"),
        (lambda t: RestartedMomentum(make_sgd(), 0, transport=t), "period.*0"),
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
    with pytest.raises(ValueError, match="int64"):
        LocalSGD(1, transport=transport, also=[torch.zeros(2, dtype=torch.int64)])
    optimizer = make_sgd(momentum=0.9)
    with pytest.raises(ValueError, match=r"belong to the optimizer.*\(2,\)"):
        RestartedMomentum(optimizer, 1, transport=transport).synchronise([torch.nn.Parameter(torch.zeros(2))])
    block = BlockMomentum(0.5, 1, params=[torch.nn.Parameter(torch.zeros(3))], transport=transport)
    with pytest.raises(ValueError, match="3 elements.*4"):
        block.average_parameters([torch.nn.Parameter(torch.zeros(4))])
