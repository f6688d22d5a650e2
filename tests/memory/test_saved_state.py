"""What a Reducer saves and loads: bit for bit, into other world sizes, and what does not fit is refused."""

import io
import logging
import pickle

import pytest
import torch
from ranks import ALL_SCHEMES, BUCKETS, NAMES, integers, memory_of, reducer, step

from commhooks import Bucket, Dense, ErrorFeedback, GTopK, NoMemory, Reducer, TopK
from commhooks.memory.parameter_memory import ParameterMemory
from commhooks.memory.resharding import redistributed
from commhooks.transports import in_process


def test_saved_state_continues_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    gradients = [[torch.randn(30, generator=generator) for _ in range(BUCKETS)] for _ in range(6)]
    for scheme in ALL_SCHEMES:

        def work(transport, scheme=scheme):
            make_one = lambda: reducer(scheme, transport, 0.1, ErrorFeedback(0.9))  # noqa: E731
            whole = make_one()
            expected = [step(whole, g) for g in gradients]
            first = make_one()
            [step(first, g) for g in gradients[:3]]
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            buffer.seek(0)
            second = make_one()
            second.load_state_dict(torch.load(buffer, weights_only=True))
            for t in (3, 4, 5):
                for a, b in zip(step(second, gradients[t]), expected[t]):
                    assert torch.equal(a, b), t
            assert second.stats()["residual_norm"] == whole.stats()["residual_norm"]

        in_process.run(3, work)


@pytest.mark.parametrize("old, new", [(1, 3), (2, 4), (4, 2), (3, 5), (5, 3), (4, 1), (3, 3)])
def test_another_world_size_keeps_the_mean_residual(old, new):
    generator = torch.Generator().manual_seed(old)
    gradients = [[integers(generator, 20) for _ in range(BUCKETS)] for _ in range(old)]

    def save(transport):
        red = reducer("union", transport, 0.1, ErrorFeedback(0.5))
        step(red, gradients[transport.rank])
        return red.state_dict()

    states = in_process.run(old, save)

    def load(transport):
        red = reducer("union", transport, 0.1, ErrorFeedback(0.5))
        red.load_state_dict(states)
        assert red.step == 1
        return red.state_dict()

    loaded = in_process.run(new, load)
    for kind in ("residual", "velocity"):
        for name in NAMES:
            zero = torch.zeros(20)
            before = sum(s[kind][name].double() for s in states) / old
            after = sum(s[kind].get(name, zero).double() for s in loaded) / new
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    if old == new:
        assert all(torch.equal(a["residual"]["p0"], b["residual"]["p0"]) for a, b in zip(states, loaded))


def test_states_that_do_not_fit_are_refused():
    states = in_process.run(
        3, lambda t: (lambda r: (step(r, [torch.ones(4)] * 4), r.state_dict())[1])(make_one(t))
    )

    def refuse(transport, state, match):
        with pytest.raises(ValueError, match=match):
            make_one(transport).load_state_dict(state)

    in_process.run(2, lambda t: refuse(t, states[0], "3 ranks and this one has 2.*list of all"))
    in_process.run(2, lambda t: refuse(t, [states[0], states[2]], r"all 3 ranks in rank order.*\[0, 2\]"))
    in_process.run(2, lambda t: refuse(t, [], "empty"))
    in_process.run(3, lambda t: refuse(t, states[(t.rank + 1) % 3], r"this is rank \d and the state is rank"))

    def other_shape(transport):
        red = make_one(transport)
        red.load_state_dict(states[transport.rank])
        with pytest.raises(ValueError, match="residual of p0 has 4 elements, expected 5"):
            red.reduce(Bucket(0, torch.ones(5), ("p0",), (5,)))

    in_process.run(3, other_shape)


def test_redistribution_by_hand():
    states = [{"residual": {"a": torch.tensor([float(p)])}, "velocity": {}} for p in (1, 2, 4)]
    assert redistributed(states, 0, 2)["residual"]["a"].item() == pytest.approx((1 + 4) * 2 / 3)
    assert redistributed(states, 1, 2)["residual"]["a"].item() == pytest.approx(2 * 2 / 3)
    assert redistributed(states, 4, 5)["residual"] == {}


def test_loaded_memory_nobody_can_claim_is_not_dropped_in_silence():
    """Unnamed parameters cannot find what was loaded under a name."""
    parameter = torch.nn.Parameter(torch.zeros(4))

    def work(transport):
        red = make_one(transport)
        red.load_state_dict(
            {"rank": 0, "world_size": 1, "step": 3, "residual": {"w": torch.ones(4)}, "velocity": {}}
        )
        with pytest.raises(ValueError, match="by parameter name.*register"):
            red.reduce(Bucket(0, torch.ones(4), (parameter,), (4,)))

    in_process.run(1, work)


def test_reducers_and_parts_pickle_without_their_transports():
    def work(transport):
        red = Reducer(TopK(0.5), GTopK(transport, "tree"), ErrorFeedback(0.5), nonfinite="skip")
        step(red, [torch.ones(4)] * 4)
        return [pickle.dumps(part) for part in (red.aggregator, red.memory, red.selector, red.connection)]

    aggregator, memory, selector, connection = map(pickle.loads, in_process.run(2, work)[0])
    assert repr(aggregator) == "GTopK(algorithm=tree)" and aggregator.requested == "in_process"
    assert connection.requested == "in_process" and not connection.is_open
    assert repr(memory) == repr(ErrorFeedback(0.5))
    assert selector.k(10, 0) == 5


def test_unpickled_rescaling_asks_for_its_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    memory = pickle.loads(pickle.dumps(ErrorFeedback(rescale_with_lr=optimizer)))
    bucket = Bucket(0, torch.ones(4), (parameter,), (4,))
    held, _ = memory.for_bucket(bucket)
    with pytest.raises(ValueError, match="set memory.optimizer again"):
        memory.operands(held, bucket, scale=None)
    memory.optimizer = optimizer
    memory.operands(held, bucket, scale=None)


def make_one(transport):
    return reducer("union", transport, 0.5)


def test_a_loaded_name_that_no_parameter_has_is_refused():
    """Such as one saved under torch.compile's prefix: it would wait for ever, and its mass with it."""
    parameter = torch.nn.Parameter(torch.zeros(4))

    def work(transport):
        red = reducer("union", transport, 0.5)
        red.memory.table.names[parameter] = "w"
        saved = {"rank": 0, "world_size": 1, "step": 3, "velocity": {}}
        red.load_state_dict({**saved, "residual": {"_orig_mod.w": torch.ones(4)}})
        buffer = torch.ones(4)
        with pytest.raises(ValueError, match="1 parameters.*'_orig_mod.w'.*'w'"):
            red.reduce(Bucket(0, buffer, (parameter,), (4,)))
        assert buffer.tolist() == [1.0] * 4
        red.load_state_dict({**saved, "residual": {"w": torch.full((4,), 2.0)}})
        red.reduce(Bucket(0, buffer, (parameter,), (4,)))
        return buffer.tolist()

    assert in_process.run(1, work) == [[3.0, 3.0, 0.0, 0.0]]


def test_loaded_velocities_without_momentum_are_dropped_only_if_asked(caplog):
    def work(transport):
        red = reducer("union", transport, 0.5)
        saved = {
            "rank": 0,
            "world_size": 1,
            "step": 1,
            "residual": {"p0": torch.ones(4)},
            "velocity": {"p0": torch.ones(4)},
        }
        with pytest.raises(ValueError, match="velocities would be lost.*no momentum.*strict=False"):
            red.load_state_dict(saved)
        assert red.step == 0 and red.state_dict()["residual"] == {}
        red.load_state_dict(saved, strict=False)
        return red.state_dict()["velocity"]

    with caplog.at_level(logging.WARNING):
        assert in_process.run(1, work) == [{}]
    assert "velocities would be lost" in caplog.text


def test_loaded_residuals_without_a_memory_are_dropped_only_if_asked(caplog):
    """As when a job resumes on a faster network and ``auto`` does not compress there."""

    def work(transport, residual, **options):
        red = Reducer(None, Dense(transport))
        saved = reducer("union", transport, 0.5).state_dict()
        red.load_state_dict({**saved, "residual": {"p0": residual}}, **options)
        return red.state_dict()["residual"]

    with caplog.at_level(logging.WARNING):
        assert in_process.run(1, lambda t: work(t, torch.zeros(4))) == [{}]
        assert not caplog.records
        with pytest.raises(ValueError, match="residuals of 1 parameters would be lost.*strict=False"):
            in_process.run(1, lambda t: work(t, torch.ones(4)))
        assert not caplog.records
        assert in_process.run(1, lambda t: work(t, torch.ones(4), strict=False)) == [{}]
    assert "residuals of 1 parameters would be lost" in caplog.text


def test_no_memory_saves_no_residual():
    """What it dropped is not withheld, so its own checkpoint fits. Version 1 saved it, and is only logged."""

    def work(transport):
        red = reducer("union", transport, 0.5, NoMemory())
        step(red, [torch.arange(1.0, 5.0)] * BUCKETS)
        saved = red.state_dict()
        assert saved["residual"] == {} and saved["step"] == 1
        again = reducer("union", transport, 0.5, NoMemory())
        again.load_state_dict(saved)
        old = {name: value for name, value in saved.items() if name != "scheme"}
        again.load_state_dict({**old, "version": 1, "residual": {"p0": torch.ones(4)}})
        return again.step

    assert in_process.run(1, work) == [1]


def test_loading_forgets_a_step_that_was_broken_off():
    """A non-finite bucket of the broken step must not make the next good step go back."""

    def work(transport):
        red = reducer("union", transport, 0.5)
        step(red, [torch.ones(4)] * BUCKETS)
        saved = red.state_dict()
        red.reduce(Bucket(0, torch.full((4,), float("inf")), (NAMES[0],), (4,), False))
        red.load_state_dict(saved)
        outputs = step(red, [torch.ones(4)] * BUCKETS)
        return outputs[0], memory_of(red, NAMES[:1])[0]

    for output, residual in in_process.run(2, work):
        assert output.tolist() == [0.0, 0.0, 4.0, 4.0] and residual.tolist() == [1.0, 1.0, 0.0, 0.0]


class OnGpu(torch.Tensor):
    """Takes itself for a tensor on a GPU and notes which streams it is told to outlive."""

    told = []

    @property
    def is_cuda(self):
        return True

    def record_stream(self, stream):
        self.told.append((self.numel(), stream))


def test_memory_on_a_gpu_outlives_the_copy_on_the_workers_stream(monkeypatch):
    """What was loaded is freed right after its copy is queued: the allocator is told of that stream first."""
    monkeypatch.setattr(OnGpu, "told", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "the worker's")
    table = ErrorFeedback(0.9).table
    loaded = {name: torch.full((n,), 2.0).as_subclass(OnGpu) for name, n in (("p", 3), ("q", 4))}
    table.load({"residual": loaded, "velocity": {name: t.clone() for name, t in loaded.items()}})
    held, _ = table.for_bucket(Bucket(0, torch.zeros(7), ("p", "q"), (3, 4)))
    assert OnGpu.told == [(n, "the worker's") for n in (3, 3, 4, 4)]
    assert held.residual.tolist() == held.velocity.tolist() == [2.0] * 7

    OnGpu.told.clear()
    held.residual, held.velocity = held.residual.as_subclass(OnGpu), held.velocity.as_subclass(OnGpu)
    moved, is_new = table.for_bucket(
        Bucket(0, torch.zeros(7), ("q", "p"), (4, 3))
    )  # DDP lays its buckets anew
    assert is_new and moved.residual.tolist() == [2.0] * 7
    assert OnGpu.told == [(n, "the worker's") for n in (4, 4, 3, 3)]


def test_the_residual_norm_waits_for_the_device_once(monkeypatch):
    """Whoever logs stats() at every step must not pay a wait for each of a model's parameters."""
    table, expected = ParameterMemory(with_velocity=False), 0.0
    for index in range(3):
        names = tuple(f"b{index}.p{i}" for i in range(20))
        held, _ = table.for_bucket(Bucket(index, torch.zeros(100), names, (5,) * 20))
        held.residual.normal_(generator=torch.Generator().manual_seed(index))
        expected += float(held.residual.double().square().sum())
    # Two parameters move on to a bucket of their own: what stays of the old memory does not count twice.
    moved, _ = table.for_bucket(Bucket(3, torch.zeros(10), ("b0.p3", "b1.p0"), (5, 5)))
    assert moved.residual.any()
    waits = []
    plain = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: waits.append(1) or plain(tensor))
    norm = table.residual_norm()
    assert norm == pytest.approx(expected**0.5, rel=1e-12) and len(waits) == 1


@pytest.mark.parametrize(
    "wrong, text",
    [
        (lambda state: {"model": {}, "commhooks": state}, "'model', 'commhooks': pass its entry 'commhooks'"),
        (lambda state: [{"commhooks": state}], "pass its entry 'commhooks'"),
        (lambda state: {"residual": {}}, "a mapping with 'residual'$"),
        (lambda state: 3, "got int"),
    ],
)
def test_something_else_than_a_state_is_refused_before_anything_is_changed(wrong, text):
    def work(transport):
        red = reducer("union", transport, 0.5)
        step(red, [torch.ones(4)] * BUCKETS)
        state = red.state_dict()
        with pytest.raises(ValueError, match=text):
            red.load_state_dict(wrong(state))
        assert all(torch.equal(v, state["residual"][n]) for n, v in red.state_dict()["residual"].items())

    in_process.run(1, work)
