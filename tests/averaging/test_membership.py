"""Who takes part: frozen and new parameters, teachers, generators, models loaded late or rolled back."""

import copy
import logging

import pytest
import torch

from commhooks import AllGather, ErrorFeedback, Reducer, TopK
from commhooks.averaging import (
    AveragedOptimizer,
    BlockMomentum,
    DecentralizedMomentum,
    DiLoCo,
    Every,
    LocalSGD,
    OutputAverage,
    PostLocal,
    RestartedMomentum,
    SlowMo,
    Stagewise,
    Uniform,
    topology,
)
from commhooks.errors import SettingsMismatchError
from commhooks.transports import in_process

from .workers import in_ranks

KINDS = ("local", "block", "diloco", "slowmo", "restarted", "decentralized")
COMPRESSED = ("local+topk", "block+topk", "diloco+topk", "slowmo+topk", "restarted+topk")
ANCHORED = ("block", "diloco", "slowmo", *COMPRESSED)


def make(kind, params, transport, period=2, optimizer=None, density=1.0, **options):
    """An averager without momentum, so that each averaging is the mean."""
    name, _, compressed = kind.partition("+")
    optimizer = optimizer or torch.optim.SGD(params, lr=1.0)
    options["transport"] = transport
    if compressed:
        aggregator = AllGather(transport=transport)
        options["reducer"] = Reducer(TopK(density), aggregator, ErrorFeedback(), dense_crossover=False)
    if name == "local":
        return LocalSGD(period, params=params, **options)
    if name == "block":
        return BlockMomentum(0.0, period, params=params, **options)
    if name == "diloco":
        return DiLoCo(params, torch.optim.SGD(params, lr=1.0), sync_every=period, **options)
    if name == "slowmo":
        return SlowMo(optimizer, 0.0, period, **options)
    if name == "restarted":
        return RestartedMomentum(optimizer, period, **options)
    return DecentralizedMomentum(optimizer, topology.complete(transport.world_size), period=period, **options)


def parameters(*values):
    return [torch.nn.Parameter(torch.full((2,), float(v))) for v in values]


def filled(model):
    """All zero: torch's seeds are shared by threads."""
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    return model


def train(params, optimizer, steps, gradient):
    for p in params:
        p.grad = torch.full_like(p, float(gradient)) if p.requires_grad else None
    for _ in range(steps):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_a_layer_frozen_inside_a_block_is_averaged_once_more_and_then_rests(kind):
    def work(transport):
        params = body, head = parameters(0, 0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        averager = make(kind, params, transport, optimizer=optimizer)
        history = []
        for step in range(1, 9):
            train(params, optimizer, 1, -transport.rank)
            if step == 3:
                body.requires_grad_(False)
            averager.average_parameters(params)
            history.append([body[0].item(), head[0].item()])
        return torch.tensor(history)

    result = in_ranks(2, work)  # (step, rank, parameter)
    assert result[2].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert result[3].tolist() == [[1.5, 2.0], [1.5, 2.0]]
    assert result[-1].tolist() == [[1.5, 4.0], [1.5, 4.0]]


@pytest.mark.parametrize("kind", ("block", "diloco", "slowmo"))
def test_a_frozen_layer_loses_its_outer_momentum_and_starts_without_when_unfrozen(kind):
    mu = 0.9

    def work(transport):
        params = body, head = parameters(0, 0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        if kind == "diloco":
            outer = torch.optim.SGD(params, lr=1.0, momentum=mu)
            averager = DiLoCo(params, outer, sync_every=1, transport=transport)
        elif kind == "slowmo":
            averager = SlowMo(optimizer, mu, 1, transport=transport)
        else:
            averager = BlockMomentum(mu, 1, params=params, transport=transport)
        history = []
        for step in range(1, 7):
            body.requires_grad_(step in (1, 4, 5, 6))
            train(params, optimizer, 1, -1)
            averager.average_parameters(params)
            history.append(body[0].item())
        return history, averager.anchor.numel()

    (history, numel), _ = in_process.run(2, work)
    # d = 1, frozen: v = mu once more; then it rests; unfrozen: a plain mean, then d = 1 without old momentum
    expected = [1.0, 1.0 + mu, 1.0 + mu, 2.0 + mu, 3.0 + mu, 4.0 + 2 * mu]
    assert history == pytest.approx(expected) and numel == 4


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_parameters_added_later_are_averaged(kind):
    def work(transport):
        first, second = parameters(0, transport.rank)
        optimizer = torch.optim.SGD([first], lr=1.0)
        averager = make(kind, [first], transport, period=1, optimizer=optimizer)
        averager.average_parameters([first])
        optimizer.add_param_group({"params": [second]})
        if kind.startswith("diloco"):
            averager.outer_optimizer.add_param_group({"params": [second]})
        for _ in range(2):
            train([first, second], optimizer, 1, -transport.rank)
            averager.average_parameters([first, second])
        return torch.stack([first.detach(), second.detach()])

    result = in_ranks(2, work)
    assert torch.equal(result[:, 0], result[:, 1])
    assert result[:, 0].tolist() == [[1.0, 1.0], [1.5, 1.5]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_without_gradients_is_averaged_when_it_moves(kind):
    """On rank 0 it does not move at all: the ranks unite on who takes part. Neighbours alone cannot, and say
    so.
    """

    def work(transport, also):
        student, teacher = parameters(0, 0)
        teacher.requires_grad_(False)
        optimizer = torch.optim.SGD([student], lr=1.0)
        averager = make(
            kind, [student], transport, optimizer=optimizer, **({"also": [teacher]} if also else {})
        )
        for _ in range(4):
            train([student], optimizer, 1, -transport.rank)
            if transport.rank == 1:  # by .data, which torch's own counter of versions does not see
                teacher.data.lerp_(student.detach(), 0.5)
            averager.average_parameters([student] if also else [student, teacher])
        return teacher.detach().clone()

    for also in (False, True):
        if kind == "decentralized" and not also:
            with pytest.raises(SettingsMismatchError, match="also="):
                in_ranks(2, lambda t: work(t, False))
            continue
        result = in_ranks(2, lambda t, also=also: work(t, also))
        assert torch.equal(result[:, 0], result[:, 1]) and result[0, 0] > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64, torch.complex64))
def test_one_element_that_moves_without_a_gradient_is_seen(dtype):
    """As in a table of which few rows are used."""

    def work(transport):
        table = torch.nn.Parameter(torch.zeros(100, 10, dtype=dtype).t(), requires_grad=False)
        averager = make("local", parameters(0), transport, period=1)
        for _ in range(2):
            table.data[3, 7] += 2.0 * transport.rank
            averager.average_parameters([*averager._watched, table])
        return table.data[3, 7].real.item(), table.abs().sum().item()

    assert in_process.run(2, work) == [(2.0, 2.0)] * 2


def test_frozen_parameters_that_rest_are_not_sent():
    def work(transport):
        params = parameters(0, 0)
        params[0].requires_grad_(False)
        averager = make("local", params, transport, period=1)
        for _ in range(3):
            averager.average_parameters(params)
        return averager.stats()["bytes_sent"]

    header, data = 48, 2 * 4
    assert in_process.run(2, work)[0] == 3 * (header + data)


@pytest.mark.parametrize("kind", KINDS)
def test_broadcasting_takes_frozen_parameters_and_all_dtypes(kind):
    """As DDP does: [0, 0] on both ranks."""

    def work(transport):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        kinds = (torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn)
        for dtype in kinds:
            values = torch.arange(3) % 2 if dtype == torch.bool else torch.arange(3)
            model.register_buffer(f"of_{str(dtype)[6:]}", (values * (1 - transport.rank)).to(dtype))
        for p in model.parameters():
            p.data.fill_(float(transport.rank))
        model[0].requires_grad_(False)
        averager = make(kind, list(model.parameters()), transport, module=model)
        averager.broadcast_parameters(model.parameters())
        rows = [p.flatten()[0].item() for p in model.parameters()]
        return rows, [b.to(torch.complex64).real.tolist() for b in model.buffers()]

    for rows, buffers in in_process.run(2, work):
        assert rows == [0.0, 0.0]
        assert buffers == [[0.0, 1.0, 0.0], *[[0.0, 1.0, 2.0]] * 5]


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_a_generator_that_is_used_up_is_an_error(kind):
    def work(transport):
        model = filled(torch.nn.Linear(1, 1))
        averager = make(kind, list(model.parameters()), transport, period=1)
        given = model.parameters()
        averager.average_parameters(given)
        with pytest.raises(ValueError, match="at least one tensor, got none.*generator"):
            averager.average_parameters(given)
        with pytest.raises(ValueError, match="at least one tensor"):
            averager.synchronise([])
        return averager.synchronisations

    assert in_process.run(2, work) == [1, 1]
    frozen = [torch.nn.Parameter(torch.zeros(1), requires_grad=False)]
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        LocalSGD(1, transport=in_process.group(1)[0]).average_parameters(frozen)


def test_a_tied_parameter_counts_once():
    def work(transport):
        p, q = parameters(transport.rank, 0)
        make("local", [p, q, p], transport, period=1).average_parameters([p, q, p])
        return p.detach().clone()

    assert in_ranks(2, work).tolist() == [[0.5, 0.5], [0.5, 0.5]]


# -- models that are not where the averager left them -------------------------------------------------------


@pytest.mark.parametrize("kind", ANCHORED)
def test_weights_loaded_after_the_averager_was_made_are_the_start(kind):
    """Nothing is trained, and nothing moves: three synchronisations leave [4, 3, 2, 1]."""

    def work(transport):
        model = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
        name = kind if not kind.startswith("block") else kind
        averager = make(name, list(model.parameters()), transport, 1, optimizer, density=0.25)
        if kind.startswith("block"):
            averager.mu = 0.9
        model.load_state_dict({"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
        for _ in range(3):
            model.weight.grad = torch.ones(1, 4)
            optimizer.step()
            averager.average_parameters(model.parameters())
        return model.weight.detach().flatten()

    assert in_ranks(2, work)[:, 0].tolist() == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("kind", ANCHORED)
def test_a_model_rolled_back_is_noticed_and_broadcasting_makes_it_the_start(kind, caplog):
    def work(transport, tells):
        model = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        averager = make(kind, list(model.parameters()), transport, 1, optimizer, density=0.25)
        if kind.startswith("block"):
            averager.mu = 0.9
        for rate in (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0):
            if rate == 0.0 and optimizer.param_groups[0]["lr"] == 1.0:
                torch.nn.init.zeros_(model.weight)
                if tells:
                    averager.broadcast_parameters(model.parameters())
            optimizer.param_groups[0]["lr"] = rate or 1e-30
            model.weight.grad = torch.tensor([[-4.0, -3.0, -2.0, -1.0]])
            optimizer.step()
            averager.average_parameters(model.parameters())
        return model.weight.detach().flatten()

    with caplog.at_level(logging.WARNING):
        in_ranks(2, lambda t: work(t, False))
    assert sum("not where the averager left it" in r.message for r in caplog.records) == 2  # once a rank
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rested = in_ranks(2, lambda t: work(t, True))
    assert rested.abs().max() < 1e-20
    assert not any("not where" in r.message for r in caplog.records)
    if "topk" in kind:
        assert any("residual of norm" in r.message for r in caplog.records)  # what was withheld is told


@pytest.mark.parametrize("kind", ANCHORED)
def test_a_model_that_moves_without_an_optimizer_is_told_once(kind, caplog):
    """A load cannot be told from a step of one's own then; a model that rests is nothing to tell."""

    def work(transport, loads):
        params = parameters(0)
        averager = make(kind, params, transport, period=1)
        for _ in range(3):
            if loads:
                params[0].data.add_(4.0)
            averager.average_parameters(params)

    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, False))
        assert not any("no torch optimizer" in r.message for r in caplog.records)
        in_process.run(2, lambda t: work(t, True))
    told = [
        r.message for r in caplog.records if "no torch optimizer of its parameters has stepped" in r.message
    ]
    assert len(told) == 2 and all("after step 1" in m and "broadcast_parameters" in m for m in told)


@pytest.mark.parametrize("kind", KINDS + COMPRESSED)
def test_replaced_parameters_take_over(kind):
    """load_state_dict(assign=True) makes new Parameters."""

    def work(transport):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        averager = make(kind, list(model.parameters()), transport, period=1)
        model.load_state_dict({"weight": torch.tensor([[5.0 + transport.rank]])}, assign=True)
        averager.average_parameters(model.parameters())
        return model.weight.detach().flatten()

    if kind.startswith(("restarted", "decentralized", "slowmo")):  # the optimizer has the old ones
        with pytest.raises((ValueError, KeyError)):
            in_ranks(2, work)
    else:
        assert in_ranks(2, work).tolist() == [[5.5, 5.5]] or in_ranks(2, work)[0].tolist() == [5.5, 5.5]


@pytest.mark.parametrize("form", ("module", "params", "hook", "wrapper"))
def test_different_starts_of_local_sgd_are_told(form, caplog):
    def work(transport, seed):
        model = torch.nn.Linear(2, 1)
        for p in model.parameters():
            torch.nn.init.constant_(p, float(seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"module": {"module": model}, "params": {"params": model.parameters()}}.get(form, {})
        averager = LocalSGD(2, transport=transport, **options)
        if form == "hook":
            averager.hook(optimizer)
        elif form == "wrapper":
            optimizer = AveragedOptimizer(optimizer, averager)
        for step in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + transport.rank)
            optimizer.step()
            if form in ("module", "params"):
                averager.average_parameters(model.parameters())

    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, 1))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, t.rank))
    assert ["started from different models" in r.message for r in caplog.records] == [True, True]


def test_models_that_are_equal_before_they_are_averaged_are_told_once(caplog):
    """As under a DDP that reduces gradients at every step."""

    def work(transport, gradient):
        params = parameters(0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        averager = LocalSGD(2, transport=transport)
        for _ in range(6):
            train(params, optimizer, 1, gradient(transport.rank))
            averager.average_parameters(params)

    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, lambda rank: rank))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        in_process.run(2, lambda t: work(t, lambda rank: 1.0))
    (record,) = caplog.records
    assert "averaging saves nothing" in record.message and "local_hook" in record.message


@pytest.mark.parametrize("kind", ANCHORED)
@pytest.mark.parametrize("sync", (Every(2, start=3), PostLocal(0, Every(2, start=3))))
def test_the_first_block_starts_where_local_steps_do(kind, sync):
    """Up to the start gradients are reduced by other means; that way is no block's change."""

    def work(transport):
        params = parameters(0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        averager = make(kind, params, transport, sync, optimizer, density=0.5)
        if kind.startswith("block"):
            averager.mu = 0.5
        for step in range(1, 6):
            params[0].grad = torch.tensor([-2.0, -1.0]) * (1.0 if step <= 3 else transport.rank)
            optimizer.step()
            averager.average_parameters(params)
        return params[0].detach().clone()

    expected = [8.0, 4.0] if "topk" not in kind else [8.0, 3.0]  # the smaller part of the change waits
    assert in_ranks(2, work).tolist() == [[expected[0]] * 2, [expected[1]] * 2] or in_ranks(2, work).T[
        0
    ].tolist() == pytest.approx(expected)


def test_a_reducer_belongs_to_one_averager():
    transport = in_process.group(1)[0]
    reducer = Reducer(TopK(0.5), AllGather(transport=transport), ErrorFeedback())
    first = LocalSGD(1, params=parameters(0), transport=transport, reducer=reducer)
    with pytest.raises(ValueError, match="reducer belongs to another averager or state"):
        BlockMomentum(0.5, 1, params=parameters(0), transport=transport, reducer=reducer)
    del first
    BlockMomentum(0.5, 1, params=parameters(0), transport=transport, reducer=reducer)


def test_a_state_saved_with_other_settings_is_told(caplog):
    transport = in_process.group(1)[0]
    saved = BlockMomentum(0.7, 5, params=parameters(0), transport=transport).state_dict()
    other = BlockMomentum(0.1, 7, params=parameters(0), transport=transport)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(saved)
    (record,) = caplog.records
    assert "mu: 0.7 saved, 0.1 here" in record.message and "period: 5 saved, 7 here" in record.message
    caplog.clear()
    BlockMomentum(0.7, 5, params=parameters(0), transport=transport).load_state_dict(copy.deepcopy(saved))
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_averaging_inside_inference_mode_leaves_a_model_that_trains(kind):
    def work(transport):
        model = filled(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averager = make(kind, list(model.parameters()), transport, 1, optimizer)
        with torch.inference_mode():
            averager.average_parameters(model.parameters())
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    in_process.run(2, work)


def test_stagewise_starts_from_weights_that_are_loaded_later():
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stages = Stagewise(optimizer, gamma=1.0, eta0=1.0)
    model.load_state_dict({"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
    assert stages.penalty().item() == 0.0
    for _ in range(12):
        stages.penalty()
        stages.step()
    assert stages.stage == 1 and model.weight.flatten().tolist() == [4.0, 3.0, 2.0, 1.0]


def test_output_average_of_a_model_follows_replaced_and_unfrozen_parameters():
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.constant_(model.bias, 3.0)
    model.bias.requires_grad_(False)
    output = OutputAverage(model, Uniform())
    output.update()
    model.load_state_dict({"weight": torch.tensor([[4.0]]), "bias": torch.tensor([3.0])}, assign=True)
    model.bias.requires_grad_(True)
    output.update()
    with torch.no_grad():
        model.bias.fill_(9.0)
        model.weight.fill_(5.0)
    output.update()
    assert output.result().tolist() == pytest.approx([3.0, 5.0])  # (0 + 4 + 5) / 3, (3 + 3 + 9) / 3
    with output.applied():
        assert [model.weight.item(), model.bias.item()] == pytest.approx([3.0, 5.0])
    assert [model.weight.item(), model.bias.item()] == [5.0, 9.0]
