"""A checkpoint that a signal handler saves within a step: the memory from before the step, or an error."""

import copy
import os
import signal

import pytest
import torch
from launch import spawn_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import (
    AllGather,
    Bucket,
    ErrorFeedback,
    NonFiniteGradientError,
    Reducer,
    SparseState,
    TopK,
    register,
)

STEPS, STOP = 8, 4


class Two(nn.Module):
    """Two parameters whose gradients are the module's input, each in a bucket of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(300))

    def forward(self, a, b):
        return (self.a * a).sum() + (self.b * b).sum()


def gradients(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, generator=generator), torch.randn(300, generator=generator)


class Job:
    """A run with a handler that saves model, optimizer and memory."""

    def __init__(self, scheme, undoable, saved=None, memory=None):
        self.model = DistributedDataParallel(Two(), bucket_cap_mb=1e-6)
        options = {"memory": memory() if memory else ErrorFeedback(), "undoable": undoable, "timeout_s": 20.0}
        options["dense_crossover"] = False
        make = {
            "topk": lambda: SparseState.topk(0.1, **options),
            "lowbit": lambda: SparseState.lowbit(2, **options),
        }
        self.state = register(self.model, make[scheme]())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.saved = self.error = None
        if saved is not None:
            self.model.module.load_state_dict(saved[0])
            self.optimizer.load_state_dict(saved[1])
            self.state.load_state_dict(saved[2])

    def save(self, *_):
        try:
            parts = self.model.module.state_dict(), self.optimizer.state_dict(), self.state.state_dict()
            self.saved = copy.deepcopy(parts)
        except RuntimeError as error:
            self.error = str(error)

    def backward(self, rank, step):
        self.optimizer.zero_grad()
        self.model(*gradients(rank, step)).backward()

    def run(self, rank, steps):
        for step in steps:
            self.backward(rank, step)
            self.optimizer.step()
        return self


def interrupted(rank, scheme, undoable, where, memory=None):
    """Trains to the step ``STOP`` and gets a signal there; returns the job."""
    job = Job(scheme, undoable, memory=memory).run(rank, range(STOP))
    signal.signal(signal.SIGUSR1, job.save)

    def send(gradient=None):
        os.kill(os.getpid(), signal.SIGUSR1)

    if where == "between the buckets":  # b's bucket has been handed over: it is the last in the forward pass
        hook = job.model.module.a.register_hook(send)
    job.backward(rank, STOP)
    if where == "between the buckets":
        hook.remove()
    elif where == "after backward":
        send()
    elif where == "after the step":
        job.optimizer.step()
        send()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return job


def goes_on(rank, job, scheme, memory=None, first=STOP):
    """The model and the memory of a run that goes on from what the handler saved."""
    again = Job(scheme, False, job.saved, memory).run(rank, range(first, STEPS))
    state, size = again.state.state_dict(), 2
    owed = {name: residual.clone() for name, residual in state["residual"].items()}
    for name, pieces in state.get("owned", {}).items():
        for start, kept in pieces.items():
            owed[name][start : start + kept.numel()] += size * kept
    again.state.close()
    return {name: value.clone() for name, value in again.model.module.state_dict().items()}, owed


def ranks(rank, size):
    results = []
    for scheme in ("topk", "lowbit"):
        for where in ("between the buckets", "after backward"):
            job = interrupted(rank, scheme, False, where)
            assert job.saved is None and "undoable=True" in job.error, (scheme, where, job.error)
            assert ("inside a step" in job.error) == (where == "between the buckets"), job.error
            job.state.close()
            job = interrupted(rank, scheme, True, where)
            assert job.error is None and job.saved[2]["step"] == STOP, (scheme, where)
            job.state.close()
            results.append((scheme, where, *goes_on(rank, job, scheme)))
    job = interrupted(rank, "topk", False, "after the step")
    assert job.error is None and job.saved[2]["step"] == STOP + 1
    job.state.close()
    results.append(("topk", "after the step", *goes_on(rank, job, "topk", first=STOP + 1)))
    return results


def test_the_law_holds_in_a_run_that_goes_on_from_it():
    """applied + mean of what is withheld == the mean over ranks of all gradients, each counted once."""
    by_rank = spawn_gloo(ranks, 2, timeout=90)
    total = [
        sum(g) / 2 for g in zip(*(map(sum, zip(*(gradients(r, s) for s in range(STEPS)))) for r in (0, 1)))
    ]
    for ours, others in zip(*by_rank, strict=True):
        assert ours[:2] == others[:2]
        for name, expected in zip("ab", total, strict=True):
            assert torch.equal(ours[2][name], others[2][name])
            owed = (ours[3][name] + others[3][name]) / 2
            assert owed.any()
            torch.testing.assert_close(
                owed - ours[2][name], expected, rtol=1e-4, atol=1e-4, msg=str(ours[:2])
            )


def momentum(rank, size):
    """With momentum and learning-rate units what the handler saves is what a save between the steps has."""
    make = lambda: ErrorFeedback(momentum=0.5)  # noqa: E731
    expected = Job("topk", True, memory=make).run(rank, range(STOP))
    expected.save()
    for where in ("between the buckets", "after backward"):
        job = interrupted(rank, "topk", True, where, make)
        for kind in ("residual", "velocity"):
            for name in "ab":
                assert torch.equal(job.saved[2][kind][name], expected.saved[2][kind][name]), (where, kind)
        assert job.saved[2]["step"] == STOP
        # The run itself goes on as if nothing had been asked.
        if where == "between the buckets":
            job.optimizer.step()
            job.run(rank, range(STOP + 1, STEPS))
            whole = Job("topk", True, memory=make).run(rank, range(STEPS))
            assert torch.equal(job.model.module.b, whole.model.module.b)
            whole.state.close()
        job.state.close()
    expected.state.close()


def test_the_memory_is_that_of_the_start_of_the_step_bit_for_bit():
    spawn_gloo(momentum, 2, timeout=90)


def cannot_tell(rank, size):
    """Under an optimizer that is not torch's the state is as it is, and after discard() or zero_grad()."""
    job = Job("topk", True)
    for step in range(2):
        job.model.zero_grad()
        job.model(*gradients(rank, step)).backward()
        with torch.no_grad():
            for p in job.model.parameters():
                p -= p.grad
    assert job.state.state_dict()["step"] == 2
    job.run(rank, (2, 3))
    job.backward(rank, 4)
    assert job.state.state_dict()["step"] == 4
    job.optimizer.zero_grad()  # the averages are gone: what is left is the memory of now
    assert job.state.state_dict()["step"] == 5
    job.run(rank, (5,))
    job.backward(rank, 6)
    job.state.discard()
    assert job.state.state_dict()["step"] == 6
    job.state.close()


def accumulates(rank, size):
    """Two passes of one optimizer step: only the last can be taken back, so there is no state to save."""
    job = Job("topk", True).run(rank, range(2))
    job.optimizer.zero_grad()
    for step in (2, 3):
        job.model(*gradients(rank, step)).backward()
    with pytest.raises(RuntimeError, match="several backward passes"):
        job.state.state_dict()
    job.optimizer.step()
    assert job.state.state_dict()["step"] == 4
    job.run(rank, (4,))
    job.backward(rank, 5)
    assert job.state.state_dict()["step"] == 5
    job.state.close()


def test_between_the_passes_of_one_optimizer_step_it_is_an_error():
    spawn_gloo(accumulates, 2, timeout=60)


def test_where_it_cannot_be_told_the_state_is_as_it_is():
    spawn_gloo(cannot_tell, 2, timeout=60)


def test_a_step_that_is_rolled_back_may_be_saved():
    def work(rank, size):
        reducer = Reducer(TopK(0.5), AllGather("distributed"), nonfinite="error", dense_crossover=False)
        reducer.reduce(Bucket(0, torch.ones(4), ("p",), (4,)))
        with pytest.raises(NonFiniteGradientError):
            reducer.reduce(Bucket(0, torch.full((4,), float("inf")), ("p",), (4,)))
        saved = reducer.state_dict()["residual"]["p"]
        reducer.reduce(Bucket(0, torch.ones(4), ("p",), (4,), is_last=False))
        with pytest.raises(RuntimeError, match="inside a step"):
            reducer.state_dict()
        reducer.connection.close()
        return saved

    assert all(saved.any() for saved in spawn_gloo(work, 2, timeout=60))
