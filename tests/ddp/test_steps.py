"""What is a step: gradients that are discarded, accumulated or left behind between two backward passes.

``W`` (step_models.py) is a module whose gradient is its input, so that ``grad + residual`` can be held against the
gradients that count. Passes onto averages that ``.grad`` still holds: test_accumulation.py.
"""

import math

import pytest
import torch
from launch import spawn_gloo
from step_models import PAIRS, Branches, W, each, in_turn, law, made, told
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, ExponentialWarmup, SparseState, register


def _accumulates_by_no_sync(rank, size, to_none, view):
    ddp, state = made(momentum=0.9, gradient_as_bucket_view=view)
    g = torch.tensor([4.0, 3.0, 2.0, 1.0])
    laws = []
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    for _ in range(2):
        state.reset()
        optimizer.zero_grad(set_to_none=to_none)
        with ddp.no_sync():
            ddp(g).backward()
        ddp(g).backward()
        laws.append(law(ddp, state))
        optimizer.step()
    return laws, state.stats()["step"]


def test_accumulation_inside_no_sync_is_one_step_of_the_sum():
    for case, ranks in each(_accumulates_by_no_sync, PAIRS):
        for laws, step in ranks:
            assert laws == [[8.0, 6.0, 4.0, 2.0]] * 2, case
            assert step == 1  # since the last reset


def _discards(rank, size, to_none, view):
    ddp, state = made(gradient_as_bucket_view=view)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    g = torch.tensor([4.0, 3.0, 2.0, 1.0])

    def used():
        optimizer.zero_grad(set_to_none=to_none)
        ddp(g).backward()
        optimizer.step()

    def discarded():
        optimizer.zero_grad(set_to_none=to_none)
        ddp(g).backward()

    before_any_step = told(lambda: [discarded(), discarded()])
    ordinary = told(lambda: [used(), used(), used()])
    skipped = told(lambda: [discarded(), used()])
    again = told(lambda: [discarded(), used()])
    return before_any_step, ordinary, skipped, again


def test_discarded_averages_are_warned_of_once():
    for case, ranks in each(_discards, PAIRS):
        assert ranks == ((0, 0, 1, 0),) * 2, case


def _nothing_to_warn_of(rank, size):
    ddp, state = made()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled(g):
        optimizer.zero_grad()
        scaler.scale(ddp(g)).backward()
        scaler.step(optimizer)
        scaler.update()

    def run():
        good, bad = torch.ones(4), torch.tensor([1.0, float("inf"), 1.0, 1.0])
        for g in (good, bad, good, bad, bad, good):  # steps that the ranks voted out
            scaled(g)
        with state.passthrough():
            ddp(good).backward()
        scaled(good)

    return told(run)


def test_voted_out_steps_and_passthrough_warn_of_nothing():
    assert spawn_gloo(_nothing_to_warn_of, 2) == [0, 0]


def _other_optimizers(rank, size):
    ddp, _ = made()
    stranger = nn.Linear(3, 3)
    other = torch.optim.SGD(stranger.parameters(), lr=1.0)

    def run():
        for _ in range(3):  # an optimizer of another model says nothing of this one's gradients
            ddp.zero_grad()
            ddp(torch.ones(4)).backward()
            other.step()

    return told(run)


def test_an_optimizer_of_another_model_does_not_count():
    assert spawn_gloo(_other_optimizers, 2) == [0, 0]


def _branches_in_turn(rank, size, raw):
    ddp, _ = made(Branches(), raw=raw, find_unused_parameters=True)
    optimizers = {n: torch.optim.SGD([getattr(ddp.module, n)], lr=1.0) for n in "ab"}

    def run():
        for branch in "aababba":
            optimizers[branch].zero_grad()
            ddp(torch.ones(4), branch).backward()
            optimizers[branch].step()

    return told(run)


def test_branches_with_an_optimizer_each_warn_of_nothing():
    for case, ranks in each(_branches_in_turn, [(False,), (True,)]):
        assert ranks == (0, 0), case


def _stale(rank, size, view, raw):
    """One branch gets one gradient ever; then the other trains while its ``.grad`` still holds the average."""
    ddp, state = made(Branches(), raw=raw, find_unused_parameters=True, gradient_as_bucket_view=view)
    of_a, of_b = (torch.optim.SGD([getattr(ddp.module, n)], lr=1.0) for n in "ab")
    g = torch.tensor([4.0, 3.0, 2.0, 1.0] if rank == 0 else [3.0, 4.0, 1.0, 2.0])
    if raw:  # a raw hook sees the parameters at its first call: the first pass is not watched
        of_a.zero_grad()
        ddp(g, "a").backward()
    of_b.zero_grad()
    ddp(g, "b").backward()
    of_b.step()
    for _ in range(3):
        of_a.zero_grad()
        ddp(g, "a").backward()
        of_a.step()
    return -ddp.module.b.detach(), state.reducer.state_dict()["residual"]["b"]


def test_the_old_gradient_of_an_unused_parameter_does_not_enter_the_memory():
    for case, ((applied, first), (_, second)) in each(_stale, PAIRS):
        assert (applied + (first + second) / 2).tolist() == [3.5, 3.5, 1.5, 1.5], case


def _held_by_the_unused(rank, size, view):
    ddp, state = made(Branches(), find_unused_parameters=True, gradient_as_bucket_view=view)
    g = torch.tensor([4.0, 3.0, 2.0, 1.0] if rank == 0 else [3.0, 4.0, 1.0, 2.0])
    ddp(g, "b").backward()
    ddp(g, "a").backward()
    return ddp.module.b.grad, state.reducer.state_dict()["residual"]["b"]


def test_an_unused_parameter_keeps_the_gradient_it_holds():
    for _, ((grad, first), (other, second)) in each(_held_by_the_unused, [(False,), (True,)]):
        assert torch.equal(grad, other)
        assert (grad + (first + second) / 2).tolist() == [3.5, 3.5, 1.5, 1.5]


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.D, self.G = nn.Linear(6, 1, bias=False), nn.Linear(3, 6)

    def forward(self, z, real, part):
        fake = self.G(z)
        if part == "D":
            return F.softplus(-self.D(real)).mean() + F.softplus(self.D(fake.detach())).mean()
        return F.softplus(-self.D(fake)).mean()


def _one_module_gan(rank, size):
    ddp, state = made(Gan(), find_unused_parameters=True)
    m = ddp.module
    of_d, of_g = torch.optim.SGD(m.D.parameters(), lr=0.05), torch.optim.SGD(m.G.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    sums = {name: torch.zeros_like(p) for name, p in m.named_parameters()}  # of what every optimizer was due
    applied = {name: p.detach().clone() for name, p in m.named_parameters()}
    twin = Gan()
    for _ in range(40):
        real, z = torch.randn(8, 6) + 1.0, torch.randn(8, 3)
        for part, optimizer in (("D", of_d), ("G", of_g)):
            m.G.requires_grad_(part == "G")
            m.D.requires_grad_(part == "D")
            twin.load_state_dict(m.state_dict())
            twin.zero_grad()
            twin(z, real, part).backward()
            optimizer.zero_grad()
            ddp(z, real, part).backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            for name, p in twin.named_parameters():
                if name.startswith(part):
                    sums[name] += rate * p.grad
    residual = state.reducer.state_dict()["residual"]
    return {
        n: (applied[n] - p.detach(), residual[n] * (0.05 if n[0] == "D" else 0.01), sums[n].reshape(-1))
        for n, p in m.named_parameters()
    }


def test_a_gan_in_one_module_with_branches_in_turns_keeps_the_law():
    first, second = spawn_gloo(_one_module_gan, 2)
    for name, (applied, residual, due) in first.items():
        withheld = (residual + second[name][1]) / 2
        mean_due = (due + second[name][2]) / 2
        torch.testing.assert_close(applied.reshape(-1) + withheld, mean_due, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["held", "discarded"])
def test_messages_name_the_remedies(what):
    from commhooks.ddp import step_watch

    text = {"held": step_watch.HELD, "discarded": step_watch.DISCARDED}[what]
    for remedy in {
        "held": ("zero_grad", "no_sync", "passthrough"),
        "discarded": ("discard()", "passthrough", "taken elsewhere and used later"),
    }[what]:
        assert remedy in text


def _discarded(rank, size, momentum, scheme):
    """A discarded pass leaves no trace: the run goes on bit for bit like one without it."""
    runs = []
    for discards in (True, False):
        torch.manual_seed(rank)
        memory = ErrorFeedback(momentum=momentum, factor_masking=momentum > 0)
        ddp = DistributedDataParallel(W())
        make = {"topk": SparseState.topk, "gtopk": SparseState.gtopk, "randomk": SparseState.randomk}[scheme]
        options = {"memory": memory, "dense_crossover": False, "timeout_s": 20.0, "undoable": True}
        state = register(ddp, make(0.25, **options))
        optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
        for step in range(5):
            g = torch.randn(4)
            optimizer.zero_grad()
            ddp(g).backward()
            optimizer.step()
            if discards and step in (0, 2, 3):
                optimizer.zero_grad()
                ddp(torch.full((4,), 8.0)).backward()
                state.discard()
        saved = state.reducer.state_dict()
        velocity = saved["velocity"].get("w", torch.zeros(4))
        runs.append((ddp.module.w.detach().clone(), saved["residual"]["w"], velocity, saved["step"]))
    (w, r, v, n), (w2, r2, v2, n2) = runs
    return torch.equal(w, w2) and torch.equal(r, r2) and torch.equal(v, v2) and n == n2 == 5


def test_a_discarded_pass_leaves_no_trace():
    cases = [(m, scheme) for m in (0.0, 0.9) for scheme in ("topk", "gtopk", "randomk")]
    for case, ranks in each(_discarded, cases):
        assert ranks == (True, True), case


def _issue_example(rank, size):
    ddp, state = made(state_options={"undoable": True})
    ddp(torch.tensor([8.0, 4.0, 2.0, 1.0])).backward()
    state.discard()
    ddp.zero_grad()
    ddp(torch.tensor([0.0, 0.0, 0.0, 0.5])).backward()
    return law(ddp, state)


def test_what_was_discarded_is_in_no_residual():
    assert spawn_gloo(_issue_example, 2) == [[0.0, 0.0, 0.0, 0.5]] * 2


def _alone(rank, size):
    ddp, state = made(state_options={"undoable": True})
    ddp(torch.ones(4)).backward()
    ddp.zero_grad()
    if rank == 0:
        state.discard()
    try:
        ddp(torch.ones(4)).backward()
    except RuntimeError:
        return f"{type(state.error).__name__}: {state.error}"
    return "nothing"


@pytest.mark.parametrize("size", [2, 5])
def test_a_rank_that_discards_alone_is_a_typed_error(size):
    for rank, text in enumerate(spawn_gloo(_alone, size)):
        assert text.startswith("SettingsMismatchError: "), text
        assert ("step: 1 here, 0 on rank 0" if rank else "step: 0 here, 1 on rank") in text, text


def _warm_up_state(scheme, **options):
    density = ExponentialWarmup(0.125, warmup_steps=3, start=1.0)  # 16, 8, 4 and 2 of 16 elements
    if scheme == "lowbit":
        return SparseState.lowbit(8, timeout_s=20.0, **options)
    if scheme == "dense":
        return SparseState.dense(memory=ErrorFeedback(momentum=0.9), timeout_s=20.0, **options)
    return getattr(SparseState, scheme)(density, timeout_s=20.0, **options)


def _alone_in_a_warm_up(rank, size, what, scheme, steps, dense_crossover, undoable, last=1.0):
    """Rank 0 goes back alone after ``steps`` steps, between which the number of pairs changes.

    ``last`` is the last rank's gradient in the step after.
    """
    ddp = DistributedDataParallel(W(16))
    state = register(ddp, _warm_up_state(scheme, dense_crossover=dense_crossover, undoable=undoable))
    saved = []
    for _ in range(steps):
        saved.append(state.state_dict())
        ddp.zero_grad()
        ddp(torch.ones(16)).backward()
    if rank == 0:
        if what == "load":
            state.load_state_dict(saved[1])
        elif what == "load the same step":
            state.load_state_dict({**saved[1], "step": steps})
        else:
            getattr(state, what)()
    ddp.zero_grad()
    try:
        ddp(torch.full((16,), last if rank == size - 1 else 1.0)).backward()
    except RuntimeError:
        text = str(state.error)
        state.close()
        return type(state.error).__name__, text
    return "nothing", ""


@pytest.mark.parametrize("size", [2, 5])
def test_a_rank_that_goes_back_alone_is_a_typed_error_on_all(size):
    """While the density falls their messages had unequal sizes, at which gloo ended the process."""
    cases = [
        ("discard", "topk", 2, False, True),
        ("discard", "gtopk", 3, True, True),
        ("discard", "randomk", 2, False, True),
        ("reset", "topk", 2, False, False),
        ("reset", "topk", 5, False, True),
        ("reset", "gtopk", 5, True, False),
        ("reset", "randomk", 2, False, True),
        ("reset", "lowbit", 3, False, False),
        ("load", "topk", 5, True, False),
        ("load", "gtopk", 3, False, False),
        ("load", "randomk", 5, False, False),
        ("load", "dense", 3, False, False),
        ("load", "lowbit", 3, False, True),
        ("load the same step", "gtopk", 4, False, False),
        ("load the same step", "lowbit", 4, False, False),
        # beside a rank that votes the same step out
        *[("reset", scheme, 2, False, False, math.inf) for scheme in ("topk", "gtopk", "randomk", "lowbit")],
        ("load", "dense", 3, False, False, math.inf),
        ("reset", "gtopk", 5, True, False, math.nan),
    ]
    for rank, outcomes in enumerate(spawn_gloo(in_turn, size, (_alone_in_a_warm_up, cases))):
        for case, (name, text) in zip(cases, outcomes, strict=True):
            assert name == "SettingsMismatchError", (case, name, text)
            if case[0] == "load the same step":
                here, there = (False, "True on rank 0") if rank else (True, "False on rank")
                assert f"reset or loaded since the last step: {here} here, {there}" in text, (case, text)
            else:
                went_back_to = {"discard": case[2] - 1, "reset": 0, "load": 1}[case[0]]
                here, there = (case[2], f"{went_back_to} on rank 0") if rank else (went_back_to, case[2])
                assert f"step: {here} here, {there}" in text, (case, text)


def _all_go_back(rank, size, what, scheme, dense_crossover):
    """Five steps of ranks that went back together before, and five steps of ranks that did not."""
    torch.manual_seed(rank)
    gradients, runs = torch.randn(5, 16), []
    for goes_back in (True, False):
        ddp = DistributedDataParallel(W(16))
        state = register(ddp, _warm_up_state(scheme, dense_crossover=dense_crossover))

        def train(first, last, ddp=ddp):
            for g in gradients[first:last]:
                ddp.zero_grad()
                ddp(g).backward()

        train(0, 2)
        saved = state.state_dict()
        train(2, 4)
        if goes_back:
            for _ in range(2):  # the second time nothing was exchanged in between
                state.reset() if what == "reset" else state.load_state_dict(saved)
            train(*((0, 5) if what == "reset" else (2, 5)))
        else:
            train(4, 5)
        held = state.state_dict()
        runs.append((ddp.module.w.grad, held["residual"]["w"], held["step"], state.stats()["bytes_sent"]))
        state.close()
    return (
        all(torch.equal(*pair) for pair in zip(runs[0][:2], runs[1][:2], strict=True)),
        runs[0][2:],
        runs[1][2:],
    )


def test_all_ranks_go_back_together():
    cases = [("reset", "topk", False), ("reset", "gtopk", True), ("load", "randomk", False)]
    cases += [("load", "gtopk", False), ("reset", "lowbit", False), ("load", "dense", False)]
    for case, ranks in each(_all_go_back, cases):
        for equal, here, there in ranks:
            assert equal and here == there and here[0] == 5, case


def _alone_without_memory(rank, size, what):
    """Rank 0 discards alone, or is undoable alone; every bucket is summed as it is."""
    undoable = what == "discards" or rank == 0
    ddp = DistributedDataParallel(W())
    state = register(ddp, SparseState.dense(timeout_s=20.0, undoable=undoable))
    text = "nothing"
    try:
        for step in range(3):
            ddp.zero_grad()
            ddp(torch.ones(4)).backward()
            if what == "discards" and (rank == 0 or step == 0):
                state.discard()  # the first time on both ranks
    except RuntimeError:
        text = f"{type(state.error).__name__}: {state.error}"
    state.close()
    return text


def test_a_rank_that_discards_alone_is_a_typed_error_also_without_a_memory():
    for (what,), ranks in each(_alone_without_memory, [("discards",), ("is undoable",)]):
        for rank, text in enumerate(ranks):
            here, there = {"discards": (0, 1), "is undoable": (True, False)}[what][:: 1 - 2 * rank]
            name = {"discards": "step", "is undoable": "undoable"}[what]
            assert text.startswith("SettingsMismatchError: "), (what, rank, text)
            assert f"{name}: {here} here, {there} on rank {1 - rank}" in text, (what, rank, text)


def _refusals(rank, size):
    texts = []
    for undoable in (False, True):
        ddp, state = made(state_options={"undoable": undoable})
        for _ in range(2):
            try:
                state.discard()
            except RuntimeError as error:
                texts.append(str(error))
            ddp.zero_grad()
            ddp(torch.ones(4)).backward()
        if undoable:
            state.discard()
            try:
                state.discard()
            except RuntimeError as error:
                texts.append(str(error))
    return texts


def test_discard_says_what_it_needs():
    for texts in spawn_gloo(_refusals, 2):
        assert [("undoable=True" in t, "no step to discard" in t) for t in texts] == [
            (True, False),
            (True, False),
            (False, True),
            (False, True),
        ]


def _discards_too_little_or_too_much(rank, size):
    """Two passes of a step of which one is discarded, and a pass that sent nothing."""
    ddp, state = made(state_options={"undoable": True})
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1.0)
    g = torch.tensor([4.0, 3.0, 2.0, 1.0])

    def used():
        optimizer.zero_grad()
        ddp(g).backward()
        optimizer.step()

    def discards_one_of_two():
        optimizer.zero_grad()
        ddp(g).backward()
        ddp(9.0 * g).backward()
        state.discard()
        used()

    def discards_inside_no_sync():
        optimizer.zero_grad()
        with ddp.no_sync():
            ddp(9.0 * g).backward()
        with pytest.raises(RuntimeError, match=r"inside no_sync\(\), so zero_grad\(\) alone"):
            state.discard()
        used()
        return applied_and_withheld()

    def applied_and_withheld():
        return -ddp.module.w.detach() + state.reducer.state_dict()["residual"]["w"]

    used()
    refused = discards_inside_no_sync()
    optimizer.zero_grad()
    ddp(9.0 * g).backward()
    ddp.module(g).backward()  # a penalty on the bare module, after the exchange
    state.discard()
    used()
    right = torch.equal(refused, 2 * g) and torch.equal(applied_and_withheld(), 3 * g)
    return told(used), right, told(discards_one_of_two)


def test_a_discard_that_would_lose_a_pass_is_refused_or_warned_of():
    assert spawn_gloo(_discards_too_little_or_too_much, 2) == [(0, True, 1)] * 2


def _voted_out(rank, size):
    """With ``undoable`` a bucket that the ranks voted out goes back bit for bit, not to rounding."""
    ddp, state = made(momentum=0.9, state_options={"undoable": True})
    torch.manual_seed(rank)
    ddp(torch.randn(4) * 1e-3).backward()
    ddp.zero_grad()
    before = state.reducer.state_dict()
    bad = torch.randn(4) * 1e6
    bad[rank] = float("inf")
    ddp(bad).backward()
    after = state.reducer.state_dict()
    return all(torch.equal(before[kind]["w"], after[kind]["w"]) for kind in ("residual", "velocity"))


def test_a_voted_out_step_goes_back_bit_for_bit():
    assert spawn_gloo(_voted_out, 2) == [True, True]


def _follows_the_rate(rank, size):
    model = W()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ddp = DistributedDataParallel(model)
    memory = ErrorFeedback(rescale_with_lr=optimizer)
    state = register(
        ddp, SparseState.topk(0.25, memory=memory, dense_crossover=False, timeout_s=20.0, undoable=True)
    )
    ddp(torch.tensor([4.0, 3.0, 2.0, 1.0])).backward()
    optimizer.zero_grad()
    before = state.reducer.state_dict()
    optimizer.param_groups[0]["lr"] = 0.5
    ddp(torch.ones(4)).backward()
    state.discard()
    after = state.reducer.state_dict()
    return (
        torch.equal(before["residual"]["w"], after["residual"]["w"]) and before["last_lr"] == after["last_lr"]
    )


def test_the_rate_of_the_residual_goes_back_too():
    assert spawn_gloo(_follows_the_rate, 2) == [True, True]
