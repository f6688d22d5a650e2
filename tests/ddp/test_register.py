"""What ``register`` accepts, refuses and warns of, in one process."""

import contextlib
import random
import time
import warnings

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commhooks import ErrorFeedback, LowBit, NoMemory, SparseState, TopK, prime_layout, register
from commhooks.ddp import optimizer_steps
from commhooks.ddp.optimizers import check_optimizer, has_second_moment, is_plain_sgd
from commhooks.ddp.wrapped import find_ddp, plain_name


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp_model():
    return DistributedDataParallel(nn.Sequential(nn.Linear(8, 4, bias=False)))


class _FabricModule(nn.Module):
    """Built as Lightning Fabric builds it: `module` is the user's own, which has no hook."""

    def __init__(self, forward_module, original_module):
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    @property
    def module(self):
        return self._original_module

    def forward(self, x):
        return self._forward_module(x)


def fabric():
    model = ddp_model()
    return _FabricModule(model, model.module), model


def compiled():
    model = ddp_model()
    return torch.compile(model, backend="eager"), model


def fabric_of_compiled():
    outer, model = compiled()
    return _FabricModule(outer, model.module), model


@pytest.mark.parametrize("make", (fabric, compiled, fabric_of_compiled))
def test_what_wraps_a_ddp_model_is_taken_for_it(make):
    held, model = make()
    assert find_ddp(held) is model
    state = register(held, SparseState.topk(0.25, dense_crossover=False))
    held(torch.ones(2, 8)).sum().backward()
    grad = model.module[0].weight.grad
    assert int((grad != 0).sum()) == 8  # a quarter of 32: the hook ran
    assert list(state.state_dict()["residual"]) == ["0.weight"]
    assert SparseState.auto(held).plan.bucket_mb == pytest.approx(25.0, rel=1e-3)
    state.close()


def test_names_are_alike_with_and_without_compile():
    model = DistributedDataParallel(
        torch.compile(nn.Sequential(nn.Linear(8, 4, bias=False)), backend="eager")
    )
    assert [name for name, _ in model.module.named_parameters()] == ["_orig_mod.0.weight"]
    state = register(model, SparseState.topk(0.25, dense_crossover=False))
    model(torch.ones(2, 8)).sum().backward()
    assert list(state.state_dict()["residual"]) == ["0.weight"]
    state.close()
    assert plain_name("a._orig_mod.b._orig_mod.c") == "a.b.c"


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ddp_model()


@pytest.mark.parametrize(
    "model, words",
    (
        (lambda: nn.Linear(2, 2), "got Linear: wrap it first: model = DistributedDataParallel(model)"),
        (lambda: torch.compile(nn.Linear(2, 2)), "got OptimizedModule: what it wraps is none"),
        (Holder, "got Holder: pass its part 'net', which is one"),
        (lambda: [1], "got list: pass the model that DistributedDataParallel returned"),
        (lambda: type("FullyShardedDataParallel", (nn.Module,), {})(), "FSDP shards gradients"),
    ),
)
def test_anything_else_is_told_what_to_pass(model, words):
    with pytest.raises(TypeError) as error:
        register(model(), SparseState.topk(0.1))
    assert "must be a DistributedDataParallel" in str(error.value) and words in str(error.value)


def optimizers():
    one = [nn.Parameter(torch.zeros(1))]
    return {
        "sgd": torch.optim.SGD(one, lr=0.1),
        "momentum": torch.optim.SGD(one, lr=0.1, momentum=0.9),
        "decay": torch.optim.SGD(one, lr=0.1, weight_decay=5e-4),
        "adamw": torch.optim.AdamW(one),
        "adam": torch.optim.Adam(one),
        "rmsprop": torch.optim.RMSprop(one),
        "adagrad": torch.optim.Adagrad(one),
        "lbfgs": torch.optim.LBFGS(one),
        None: None,
    }


CASES = [
    ("topk", 0.9, "adamw", "error"),
    ("topk", 0.9, "adam", "error"),
    ("topk", 0.9, "rmsprop", "error"),
    ("topk", 0.9, "adagrad", "error"),
    ("randomk", 0.9, "adamw", "error"),
    ("topk", 0.0, "adamw", ""),
    ("topk", 0.9, "sgd", ""),
    ("topk", 0.9, None, ""),
    ("topk", 0.0, "momentum", ""),
    ("topk", 0.9, "momentum", "one place"),
    (
        "topk",
        0.9,
        "decay",
        "weight_decay 0.0005 acts behind .* momentum 0.9: weights decay about 10 times slower",
    ),
    ("topk", 0.0, "decay", ""),
    ("randomk", 0.0, "sgd", ""),
    ("randomk", 0.0, None, ""),
    ("randomk", 0.0, "momentum", "random-k"),
    ("randomk", 0.9, "sgd", "random-k"),
    ("randomk", 0.9, None, "random-k"),
    ("topk", 0.0, "lbfgs", "L-BFGS"),
    ("lowbit", 0.9, "adamw", "error"),
    ("lowbit", 0.0, "adamw", ""),
    ("lowbit", 0.0, "lbfgs", "L-BFGS"),
]


@pytest.mark.parametrize("scheme, momentum, optimizer, outcome", CASES)
def test_an_optimizer_that_does_not_go_with_the_state(scheme, momentum, optimizer, outcome):
    model = ddp_model()
    state = getattr(SparseState, scheme)(4 if scheme == "lowbit" else 0.1, memory=ErrorFeedback(momentum))
    chosen = optimizers()[optimizer]
    expected = contextlib.nullcontext()
    if outcome == "error":
        expected = pytest.raises(ValueError, match=f"momentum 0.9 does not go with {type(chosen).__name__}")
    elif outcome:
        expected = pytest.warns(UserWarning, match=outcome)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with expected:
            register(model, state, chosen)
    if outcome == "error":  # nothing was touched: the state serves another model
        assert not state.reducer.connection.is_open
        register(ddp_model(), state)
    state.close()


def test_the_warning_points_at_the_callers_line():
    state = SparseState.randomk(0.1, memory=ErrorFeedback(0.9))
    with pytest.warns(UserWarning) as caught:
        register(ddp_model(), state)
    assert caught[0].filename == __file__
    state.close()


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got list"):
        check_optimizer(ErrorFeedback(), TopK(0.1), [1])


def test_plain_sgd_is_known_only_where_it_is_told():
    plain = {name for name, optimizer in optimizers().items() if is_plain_sgd(optimizer, None)}
    assert plain == {"sgd", "decay"}
    assert not is_plain_sgd(optimizers()["sgd"], ErrorFeedback(0.9)) and is_plain_sgd(
        optimizers()["sgd"], NoMemory()
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="torch before 2.5")
def test_adafactor_has_a_second_moment():
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.zeros(2, 2))])
    assert has_second_moment(optimizer)
    assert isinstance(SparseState.for_optimizer(optimizer, warmup_steps=0).reducer.aggregator, LowBit)
    with pytest.raises(ValueError, match="momentum 0.9 does not go with Adafactor"):
        check_optimizer(ErrorFeedback(0.9), None, optimizer)


@pytest.mark.parametrize(
    "options",
    (
        {"memory": ErrorFeedback()},
        {"nonfinite": "skip"},
        {"undoable": True},
        {"transport": "mpi"},
    ),
)
def test_what_ddps_all_reduce_cannot_do_is_not_left_to_it(options):
    if options.get("transport") == "mpi":
        pytest.importorskip("mpi4py")
    with pytest.raises(ValueError, match="ddp_allreduce"):
        SparseState.dense(ddp_allreduce=True, **options)
    with pytest.raises(ValueError, match="ddp_allreduce"):
        SparseState.topk(0.1, ddp_allreduce=True)


def test_a_dense_state_left_to_ddp_has_no_hook_and_says_that_nothing_is_counted():
    model, state = ddp_model(), SparseState.dense(ddp_allreduce=True)
    register(model, state)
    model(torch.ones(2, 8)).sum().backward()
    assert torch.equal(model.module[0].weight.grad, torch.full((4, 8), 2.0))
    stats = state.stats()
    assert stats.pop("averaged_by") == "ddp" and set(stats.values()) == {None}
    counted = SparseState.dense()
    register(ddp_model(), counted)
    assert counted.stats()["averaged_by"] == "commhooks" and counted.stats()["step"] == 0
    for each in (state, counted):
        each.close()


def test_a_parameter_of_another_dtype_is_named():
    """The first backward pass refused it, as a RuntimeError."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2).double())
    ddp = DistributedDataParallel(model)
    with pytest.raises(TypeError, match="1.weight is torch.float64: gradients must be float32"):
        register(ddp, SparseState.topk(0.1))
    ignored = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2).double())
    ignored[1].requires_grad_(False)
    register(DistributedDataParallel(ignored), SparseState.topk(0.1))


def everything_random():
    torch_bits = torch.random.get_rng_state().tolist()
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch_bits


@pytest.mark.parametrize("fails", [False, True])
def test_prime_layout_leaves_no_trace(fails):
    """Augmentations draw from Python's and numpy's generators, too."""
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
    state, calls = register(ddp, SparseState.topk(0.1)), []

    def step():
        calls.append(random.random() + numpy.random.rand() + float(torch.rand(())))
        ddp(torch.randn(3, 8)).sum().backward()
        if fails and len(calls) == 2:
            raise KeyError("a bad batch")

    before, buffers = everything_random(), {n: b.clone() for n, b in ddp.module.named_buffers()}
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        prime_layout(ddp, state, step)
    assert len(calls) == 2 and everything_random() == before
    assert all(torch.equal(b, buffers[n]) for n, b in ddp.module.named_buffers())
    assert all(p.grad is None for p in ddp.parameters())


def test_prime_layout_needs_the_hook():
    """Without the hook it would do nothing, and the resume would not be bit-exact."""
    ddp, state = DistributedDataParallel(nn.Linear(8, 4)), SparseState.topk(0.1)

    def step():
        ddp(torch.randn(3, 8)).sum().backward()

    with pytest.raises(RuntimeError, match=r"no bucket came to the state. Call commhooks.register"):
        prime_layout(ddp, state, step)
    register(ddp, state)
    prime_layout(ddp, state, step)
    with pytest.raises(RuntimeError, match="outside no_sync"), ddp.no_sync():
        prime_layout(ddp, state, step)
    assert all(p.grad is None for p in ddp.parameters())


def test_a_parameter_that_replaces_another_in_an_optimizer_is_seen_to_step():
    old, new = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([old], lr=1.0)
    seen = []

    class Listener:
        def stepped(self, held):
            seen.append((id(old) in held, id(new) in held))

    listener = Listener()
    optimizer_steps.listen(listener)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    optimizer.step()
    assert seen == [(True, False), (False, True)]


@pytest.mark.parametrize("forget", ("reset", "load_state_dict", "restart"))
def test_a_step_that_was_begun_is_forgotten(forget):
    """A backward pass that raises fills some buckets only. The next one begins with the first bucket."""
    state, parameters = SparseState.topk(0.5), [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    state.set_names(zip("ab", parameters, strict=True))
    saved = state.state_dict()
    state.submit(torch.tensor([1.0, 2.0]), 0, (parameters[0],), is_last=False).wait()
    getattr(state, forget)(*([] if forget == "reset" else [saved]))
    buffers = [torch.tensor([3.0, 4.0]) for _ in parameters]
    for index, (parameter, buffer) in enumerate(zip(parameters, buffers, strict=True)):
        state.submit(buffer, index, (parameter,), is_last=index == 1).wait()
    assert state.error is None and state.stats()["step"] == 1
    assert [buffer.tolist() for buffer in buffers] == [[0.0, 4.0]] * 2
    state.close()


def test_a_restart_waits_for_the_work_under_way():
    state, order = SparseState.topk(0.5), []
    saved = state.state_dict()
    state._thread.submit(lambda: (time.sleep(0.3), order.append("work")))
    state.restart(saved)
    order.append("restarted")
    state.close()
    assert order == ["work", "restarted"]
