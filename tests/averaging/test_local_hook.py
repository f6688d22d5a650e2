"""PostLocalState: what it takes for a step, and that its checkpoint holds what the sparse hook withholds."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from launch import spawn_gloo
from torch.nn.parallel import DistributedDataParallel

from commhooks import SparseState, prime_layout, sparse_hook
from commhooks.averaging import Every, LocalSGD, PostLocalState, average_checkpoints, post_local_hook

START, STEPS = 4, 8


class Product(torch.nn.Module):
    """A model whose gradient is its input, (n,) float32."""

    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(n))

    def forward(self, gradient):
        return (self.w * gradient).sum()


class Job:
    """A post-local job on this rank: DDP, top-k of one place in ten for START steps, then averages."""

    def __init__(self, n=10, linked=False, sparse=True, period=2):
        self.net = Product(n)
        self.ddp = DistributedDataParallel(self.net)
        self.averager = LocalSGD(Every(period, start=START), module=self.net, timeout_s=20.0)
        self.hook_state = SparseState.topk(0.1, dense_crossover=False, timeout_s=20.0) if sparse else None
        given = (sparse_hook, self.hook_state) if sparse else ()
        if sparse:
            self.hook_state.set_names(self.net.named_parameters())
            self.hook_state.attach(self.ddp)
        self.post = PostLocalState(START, *given, averager=self.averager if linked else None)
        self.ddp.register_comm_hook(self.post, post_local_hook)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5)

    def step(self, *gradients):
        """One optimizer step of as many backward passes as gradients; returns the weights."""
        self.optimizer.zero_grad()
        for gradient in gradients:
            self.ddp(gradient).backward()
        self.optimizer.step()
        self.averager.average_parameters(self.net.parameters())
        return self.net.w.detach().clone()

    def parts(self):
        return {
            "model": self.net,
            "optimizer": self.optimizer,
            "averager": self.averager,
            "post_local": self.post,
        }

    def close(self):
        if self.hook_state is not None:
            self.hook_state.close()
        self.averager.close()


def gradients(rank, n=10):
    """(STEPS, n) float32 integers of this rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-8, 9, (STEPS, n), generator=generator).float()


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_backward_passes_between_two_optimizer_steps_are_one_step(passes, linked):
    def work(rank, size):
        job = Job(linked=linked, sparse=False)
        weights = [job.step(*[g] * passes) for g in gradients(rank)]
        assert job.post.local and job.post.step >= START
        return weights

    first, second = spawn_gloo(work, 2)
    equal = [torch.equal(a, b) for a, b in zip(first, second)]
    assert equal == [True, True, True, True, False, True, False, True]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def test_the_steps_of_torchs_optimizers_are_seen_and_others_are_warned_of():
    class Foreign:
        """No torch optimizer, and writes through `data`."""

        def __init__(self, parameters):
            self.parameters = list(parameters)

        def zero_grad(self):
            for parameter in self.parameters:
                parameter.grad = None

        def step(self):
            for parameter in self.parameters:
                parameter.data.sub_(0.1 * parameter.grad)

    def local_from(make, linked, passes, warnings):
        job = Job(linked=linked, sparse=False, period=1000)  # an averaging would be a change in place
        job.optimizer = make(job.net.parameters())
        logging.getLogger("commhooks.averaging.local_hook").warning = lambda text, *given: warnings.append(
            text % given
        )
        for number in range(passes):
            job.step(torch.ones(10))
            if job.post.local:
                return number
        return None

    def work(rank, size):
        said = []
        for name, make in OPTIMIZERS.items():
            assert local_from(make, False, 6, said) == START, name
        assert local_from(Foreign, True, 6, said) == START and not said
        assert local_from(Foreign, False, 140, said) is None
        return said

    for said in spawn_gloo(work, 2):
        assert len(said) == 1 and "128 backward passes" in said[0] and "averager=" in said[0]


def test_a_step_that_the_scaler_skips_makes_it_late_and_never_early():
    """Without the averager's count gradients are reduced for one step more; with it both change over together."""

    def work(rank, size, linked):
        job, scaler = Job(linked=linked, sparse=False), torch.amp.GradScaler("cpu", init_scale=1.0)
        local = []
        for step, gradient in enumerate(gradients(rank)):
            job.optimizer.zero_grad()
            scaler.scale(job.ddp(gradient * (float("inf") if step == 1 else 1.0))).backward()
            scaler.step(job.optimizer)
            scaler.update()
            job.averager.average_parameters(job.net.parameters())
            local.append(job.post.local)
        return local

    assert spawn_gloo(work, 2, args=(True,))[0] == [False] * START + [True] * (STEPS - START)
    assert spawn_gloo(work, 2, args=(False,))[0] == [False] * (START + 1) + [True] * (STEPS - START - 1)


@pytest.mark.parametrize("linked", [False, True])
def test_resumes_bit_for_bit_before_while_and_after_the_residual_is_handed_over(linked):
    def work(rank, size):
        given = gradients(rank)
        job, weights, saved, norms = Job(linked=linked), [], [], []
        for gradient in given:
            weights.append(job.step(gradient))
            saved.append({name: copy.deepcopy(part.state_dict()) for name, part in job.parts().items()})
            norms.append(job.hook_state.stats()["residual_norm"])
        job.close()
        assert all(norm > 0 for norm in norms[: START - 1]) and norms[START - 1] == 0.0
        for done in range(1, STEPS):
            job = Job(linked=linked)
            prime_layout(job.ddp, job.hook_state, lambda job=job: job.ddp(given[0]).backward())
            for name, part in job.parts().items():
                part.load_state_dict(saved[done - 1][name])
            assert job.post.step == min(done, job.post.step if linked else START)
            for step in range(done, STEPS):
                assert torch.equal(job.step(given[step]), weights[step]), (done, step)
            job.close()
        return True

    assert spawn_gloo(work, 2, timeout=120) == [True, True]


def test_another_number_of_ranks_keeps_the_mean_residual():
    def first(rank, size):
        job = Job()
        for gradient in gradients(rank)[:2]:
            job.step(gradient)
        saved = {name: part.state_dict() for name, part in job.parts().items()}
        job.close()
        return saved

    joined = average_checkpoints(spawn_gloo(first, 3))
    residuals = [part["residual"]["w"] for part in joined["post_local"]["reducers"]]
    mean = torch.stack(residuals).mean(0)
    assert len(residuals) == 3 and mean.abs().sum() > 0

    def second(rank, size):
        job = Job()
        job.post.load_state_dict(joined["post_local"])
        held = job.post.state_dict()
        dist.barrier()  # a group that one rank closes while another still opens it is an error of gloo's
        job.close()
        return held["step"], held["reducers"][0]["residual"]["w"]

    found = spawn_gloo(second, 2)
    assert [step for step, _ in found] == [2, 2]
    assert torch.allclose(torch.stack([residual for _, residual in found]).mean(0), mean)


def test_refuses_what_would_lose_residuals():
    def work(rank, size):
        job, dense, said = Job(), Job(sparse=False), []
        job.step(gradients(rank)[0])
        saved = job.post.state_dict()
        with pytest.raises(ValueError, match="state of a sparse hook.*hook_state=None"):
            dense.post.load_state_dict(saved)
        with pytest.raises(ValueError):
            job.post.load_state_dict({**saved, "reducers": [{**saved["reducers"][0], "world_size": 5}]})
        assert dense.post.state_dict() == {"step": 0}
        logging.getLogger("commhooks.averaging.local_hook").warning = said.append
        job.post.load_state_dict({"step": 3})  # what version 0.1 wrote
        assert job.post.step == 3 and "no residuals" in said[0]
        with pytest.raises(TypeError, match="averager.*str"):
            PostLocalState(3, averager="local")
        job.close()
        return True

    assert spawn_gloo(work, 2) == [True, True]
