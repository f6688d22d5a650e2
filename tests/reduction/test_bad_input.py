"""Bad arguments, bad gradients and ranks that disagree: a clear error with name and value, never a hang."""

import re
import warnings

import pytest
import torch
from ranks import reducer

from commhooks import (
    AllGather,
    Bucket,
    Dense,
    ErrorFeedback,
    ExponentialWarmup,
    GTopK,
    RandomK,
    Reducer,
    SettingsMismatchError,
    SharedIndices,
    SparseGrad,
    SparseState,
    ThresholdTopK,
    TopK,
    sparse_hook,
)
from commhooks.exchange.voting_sum import summed
from commhooks.selection.density import ConstantDensity
from commhooks.transports import in_process, make
from commhooks.wire.message import Context


def complaint(error, call, *parts):
    """``call()`` raises ``error`` and the message holds every part."""
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert str(part) in str(caught.value), (part, str(caught.value))


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.1", None])
@pytest.mark.parametrize(
    "make_one",
    [TopK, RandomK, ThresholdTopK, ConstantDensity, SparseState.topk, SparseState.gtopk, SparseState.randomk],
)
def test_density_is_in_0_1(make_one, density):
    complaint(ValueError, lambda: make_one(density), "density", repr(density))


@pytest.mark.parametrize("density", [1, 1.0, 1e-9])
def test_good_densities(density):
    assert TopK(density).k(1000, 0) == max(1, round(density * 1000))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, float("nan")])
def test_momentum_is_in_0_1(momentum):
    complaint(ValueError, lambda: ErrorFeedback(momentum), "momentum", repr(momentum))


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda: ErrorFeedback(factor_masking=True), ["factor_masking", "momentum"]),
        (lambda: ErrorFeedback(clip_norm=0.0), ["clip_norm", "0.0"]),
        (lambda: ErrorFeedback(clip_norm=-1), ["clip_norm", "-1"]),
        (lambda: RandomK(0.1, seed=-1), ["seed", "-1"]),
        (lambda: RandomK(0.1, seed=1.5), ["seed", "1.5"]),
        (lambda: GTopK(algorithm="ring"), ["algorithm", "ring", "doubling", "tree"]),
        (lambda: GTopK("carrier pigeon"), ["transport", "carrier pigeon", "mpi", "distributed"]),
        (lambda: AllGather(transport="in_process"), ["transport", "in_process"]),
        (lambda: SparseState.topk(0.1, transport="infiniband"), ["transport", "infiniband"]),
        (lambda: make("smoke"), ["transport", "smoke"]),
        (
            lambda: SparseState.topk(0.1, nonfinite="ignore"),
            ["nonfinite", "ignore", "propagate", "skip", "error"],
        ),
        (lambda: SparseState.topk(0.1, delta_every=-1), ["delta_every", "-1"]),
        (lambda: SparseState.topk(0.1, delta_every=0.5), ["delta_every", "0.5"]),
        (lambda: SparseState.topk(0.1, timeout_s=0), ["timeout_s", "0"]),
        (lambda: SparseState.topk(0.1, timeout_s=float("nan")), ["timeout_s", "nan"]),
        (lambda: SparseState(None, AllGather()), ["selector", "None", "AllGather"]),
        (lambda: SparseState(TopK(0.1), Dense()), ["selector", "TopK", "Dense"]),
        (lambda: SparseState(TopK(0.1), SharedIndices()), ["SharedIndices", "TopK", "RandomK"]),
        (lambda: ExponentialWarmup(0.01), ["warmup_steps", "warmup_epochs"]),
        (lambda: ExponentialWarmup(0.01, 5, warmup_epochs=2), ["warmup_steps", "warmup_epochs", "5", "2"]),
        (lambda: ExponentialWarmup(0.01, warmup_epochs=2), ["steps_per_epoch"]),
        (lambda: ExponentialWarmup(0.01, 0), ["warmup", "0"]),
        (lambda: ExponentialWarmup(0.01, 5, start=2.0), ["start", "2.0"]),
        (lambda: in_process.group(0), ["world_size", "0"]),
        (lambda: in_process.group(2, timeout_s=-1), ["timeout_s", "-1"]),
    ],
)
def test_bad_arguments(call, parts):
    complaint(ValueError, call, *parts)


@pytest.mark.parametrize(
    "call, parts",
    [
        (lambda: Reducer(TopK(0.1), "gtopk"), ["aggregator", "str"]),
        (lambda: Reducer("topk", AllGather()), ["selector", "str"]),
        (lambda: ErrorFeedback(rescale_with_lr=0.1), ["rescale_with_lr", "float"]),
        (lambda: SparseState.topk(0.1, grad_scaler=2.0), ["grad_scaler", "float"]),
    ],
)
def test_wrong_types(call, parts):
    complaint(TypeError, call, *parts)


@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float64],
)
def test_gradients_of_other_dtypes(dtype):
    buffer = torch.zeros(4, dtype=dtype)
    complaint(
        TypeError, lambda: Bucket(3, buffer, ("p",), (4,)), "bucket 3", dtype, "float32, bfloat16 or float16"
    )


def test_sparse_gradients():
    sparse = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)
    complaint(TypeError, lambda: Bucket(3, sparse, ("p",), (4,)), "bucket 3", "dense")


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**33])
def test_a_bucket_beyond_int32(numel):
    buffer = torch.empty(numel, device="meta")
    complaint(
        ValueError, lambda: Bucket(1, buffer, ("p",), (numel,)), "bucket 1", numel, "2**31", "bucket_cap_mb"
    )


def test_buckets_that_do_not_add_up():
    complaint(ValueError, lambda: Bucket(0, torch.zeros(4), ("p", "q"), (1, 2)), "bucket 0", 4)
    complaint(ValueError, lambda: Bucket(0, torch.zeros(4), ("p",), (2, 2)), "bucket 0")
    complaint(ValueError, lambda: Bucket(0, torch.zeros(2, 2), ("p",), (4,)), "flat")
    complaint(ValueError, lambda: Bucket(0, torch.zeros(8)[::2], ("p",), (4,)), "contiguous")


def test_sparse_grads_check_their_parts():
    values, indices = torch.ones(2), torch.tensor([0, 3], dtype=torch.int32)
    complaint(TypeError, lambda: SparseGrad(values.double(), indices, 5), "float64")
    complaint(TypeError, lambda: SparseGrad(values, indices.long(), 5), "int64")
    complaint(ValueError, lambda: SparseGrad(values[:1], indices, 5), "(1,)", "(2,)")
    complaint(ValueError, lambda: SparseGrad(values, indices, 2**31), "numel", 2**31)


def test_buffers_a_transport_would_send_wrongly():
    a, _ = in_process.group(2)
    square = torch.zeros(3, 3)
    complaint(ValueError, lambda: a.exchange([(1, square.t())], [], tag=0, what=""), "contiguous")
    complaint(ValueError, lambda: a.exchange([(2, square)], [], tag=0, what=""), "peer", "2")
    complaint(ValueError, lambda: a.exchange([(0, square)], [], tag=0, what=""), "peer", "0")
    complaint(ValueError, lambda: a.all_gather(square, square, tag=0, what=""), "receive")
    complaint(TypeError, lambda: a.all_reduce(torch.zeros(2, device="meta"), tag=0, what=""), "meta")


def test_what_is_not_ddps_bucket_is_refused_with_a_way_out():
    state = SparseState.topk(0.1)
    grad = torch.zeros(4)
    complaint(
        TypeError, lambda: sparse_hook(state, (grad, torch.nn.Parameter(grad))), "tuple", "DistributedDataParallel",
        "Compiled DDP",
    )  # fmt: skip
    complaint(TypeError, lambda: sparse_hook(state, grad), "DistributedDataParallel", "FSDP")
    complaint(TypeError, lambda: sparse_hook(state, grad, grad[:2]), "DistributedDataParallel", "FSDP")
    complaint(TypeError, lambda: sparse_hook("state", grad), "SparseState", "str")


def disagreement(world_size, odd, settings, odd_settings, n=40, odd_n=40, dtype=torch.float32):
    """All ranks' errors when rank ``odd`` has other settings. ``settings`` make a Reducer from a transport."""

    def work(transport):
        mine, numel = (odd_settings, odd_n) if transport.rank == odd else (settings, n)
        red = mine(transport)
        buffer = torch.zeros(numel)
        try:
            red.reduce(Bucket(0, buffer, ("p",), (numel,)))
        except SettingsMismatchError as error:
            return error
        return None

    return in_process.run(world_size, work, timeout_s=5.0)


@pytest.mark.parametrize(
    "settings, odd_settings, parts",
    [
        (
            lambda t: reducer("union", t, 0.1),
            lambda t: reducer("union", t, 0.2),
            ["density: 0.1 here, 0.2 on rank 2"],
        ),
        (lambda t: reducer("union", t, 0.1), lambda t: reducer("gtopk", t, 0.1), ["AllGather", "GTopK"]),
        (lambda t: reducer("gtopk", t, 0.1), lambda t: reducer("gtopk-tree", t, 0.1), ["doubling", "tree"]),
        (lambda t: reducer("union", t, 0.1), lambda t: reducer("dense", t, 0.1), ["AllGather", "Dense"]),
        (
            lambda t: reducer("union", t, 0.1, ErrorFeedback(0.9)),
            lambda t: reducer("union", t, 0.1, ErrorFeedback(0.9000001)),
            ["0.9000001"],
        ),
        (
            lambda t: Reducer(RandomK(0.1, seed=1), SharedIndices(t)),
            lambda t: Reducer(RandomK(0.1, seed=2), SharedIndices(t)),
            ["seed: 1 here", "2 on rank 2"],
        ),
        (
            lambda t: reducer("union", t, 0.1, nonfinite="skip"),
            lambda t: reducer("union", t, 0.1, nonfinite="error"),
            ["skip", "error"],
        ),
        (
            lambda t: reducer("union", t, 0.1, dense_crossover=True),
            lambda t: reducer("union", t, 0.1),
            ["dense_crossover"],
        ),
        (
            lambda t: reducer("union", t, 0.1, delta_every=1),
            lambda t: reducer("union", t, 0.1),
            ["delta_every"],
        ),
        (
            lambda t: reducer("union", t, 0.1, ErrorFeedback(clip_norm=1.0)),
            lambda t: reducer("union", t, 0.1, ErrorFeedback()),
            ["clip_norm: 1.0 here", "None on rank 2"],
        ),
        (
            lambda t: Reducer(TopK(ExponentialWarmup(0.1, 10, start=0.2)), AllGather(t)),
            lambda t: Reducer(TopK(ExponentialWarmup(0.1, 11, start=0.2)), AllGather(t)),
            ["10", "11"],
        ),
    ],
)
def test_ranks_that_disagree_on_settings(settings, odd_settings, parts):
    errors = disagreement(3, 2, settings, odd_settings)
    for part in (*parts, "rank 0, bucket 0", "on rank 2"):
        assert part in str(errors[0])
    assert "on ranks 0, 1" in str(errors[2]) and all(isinstance(error, ValueError) for error in errors)
    assert "k:" not in str(errors[0])  # the cause alone is told


@pytest.mark.parametrize("scheme", ["union", "gtopk", "gtopk-tree", "shared", "dense"])
def test_ranks_that_disagree_on_bucket_sizes(scheme):
    make_one = lambda t: reducer(scheme, t, 0.1)  # noqa: E731
    for odd in (0, 1, 3):
        errors = disagreement(4, odd, make_one, make_one, n=40, odd_n=41)
        assert all("40" in str(e) and "41" in str(e) for e in errors), errors


def test_ranks_out_of_step_are_told_apart():
    """After a layout was agreed on, one rank reduces another bucket: the header of its message says so."""

    def work(transport):
        red = reducer("gtopk", transport, 0.5)
        for index in (0, 1):
            red.reduce(Bucket(index, torch.ones(4), (f"p{index}",), (4,), index == 1))
        index = 32 * 32 if transport.rank else 0  # the same tag
        red.memory.table._of_bucket[index] = red.memory.table._of_bucket[0]
        red.reduce(Bucket(index, torch.ones(4), ("p0",), (4,)))

    with pytest.raises(SettingsMismatchError, match=re.compile("expected bucket .* from rank .*out of step")):
        in_process.run(2, work, timeout_s=5.0)


@pytest.mark.parametrize("scheme", ["shared", "dense"])
def test_an_all_reduce_of_ranks_out_of_step_is_noticed(scheme):
    """No header travels with it: a stamp that is summed beside the values tells."""

    def work(transport):
        red = reducer(scheme, transport, 0.5)
        red.reduce(Bucket(0, torch.ones(4), ("p",), (4,)))
        red.step += 5 * transport.rank
        red.reduce(Bucket(0, torch.ones(4), ("p",), (4,)))

    with pytest.raises(SettingsMismatchError, match="rank ., bucket 0, step .*disagree on step: "):
        in_process.run(3, work, timeout_s=5.0)


def test_all_reduces_of_two_steps_look_different():
    """Checksums of these steps are equal modulo 4,093, and neighbours differ as all others do."""

    def work(transport):
        found = []
        for step, other in [(103, 161), (48, 168), (65, 171), (7, 8), (4092, 4093)]:
            context = Context(0, other if transport.rank else step, next_k=3)
            with pytest.raises(SettingsMismatchError, match="disagree on step: ") as error:
                summed(transport, torch.zeros(1), False, context)
            found.append(str(error.value))
        return found

    first, second = in_process.run(2, work, timeout_s=5.0)
    assert "step: 103 here, 161 on rank 1" in first[0] and "step: 161 here, 103 on rank 0" in second[0]


def test_ranks_that_disagree_on_the_loss_scale():
    """A GradScaler given to the state on one rank only: the sum would mix units."""

    def work(transport):
        red = reducer("union", transport, 0.5)
        try:
            red.reduce(Bucket(0, torch.ones(4), ("p",), (4,)), scale=1024.0 if transport.rank else 1.0)
        except SettingsMismatchError as error:
            return str(error)

    for message in in_process.run(2, work, timeout_s=5.0):
        assert "loss scale: 1" in message and ("1024 here" in message or "1024 on rank 1" in message)


def test_a_second_momentum_is_warned_of_once():
    from commhooks.ddp.optimizers import check_optimizer

    parameter = torch.nn.Parameter(torch.zeros(1))
    with_momentum = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    without = torch.optim.SGD([parameter], lr=0.1)
    with pytest.warns(UserWarning, match="0.9.*0.5.*one place") as caught:
        check_optimizer(ErrorFeedback(0.5), TopK(0.1), with_momentum)
    assert len(caught) == 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(ErrorFeedback(), TopK(0.1), with_momentum)
        check_optimizer(ErrorFeedback(0.5), TopK(0.1), without)
        check_optimizer(ErrorFeedback(0.5), TopK(0.1), None)


def test_a_parameter_the_optimizer_does_not_know():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    def work(transport):
        red = reducer("union", transport, 0.5, ErrorFeedback(rescale_with_lr=optimizer))
        red.reduce(Bucket(0, torch.ones(4), (torch.nn.Parameter(torch.ones(4)),), (4,)))

    with pytest.raises(ValueError, match=r"rescale_with_lr.*\(4,\)"):
        in_process.run(1, work)


def test_a_closed_transport_is_not_used_again():
    state = SparseState.topk(0.1)
    with pytest.raises(RuntimeError, match="not open"):
        _ = state.reducer.transport
    with pytest.raises(RuntimeError, match="init_process_group"):
        state.open()
