"""Which backend the distributed transport takes, and what it warns of, without a GPU."""

import types
import warnings

import pytest
import torch
import torch.distributed as dist
from launch import spawn_gloo

from commhooks import PeerLostError, SparseState
from commhooks.transports import connection, distributed
from commhooks.transports.distributed import DistributedTransport, backend_for


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("cpu:gloo,cuda:nccl", "nccl"),
        ("cuda:nccl", "nccl"),
        ("cuda:nccl,cpu:gloo", "nccl"),
        ("cpu:gloo,cuda:gloo", "gloo"),
        ("cpu:gloo", "gloo"),
        ("cpu:gloo,cuda:ucc", "gloo"),
    ],
)
def test_the_backend_is_the_one_that_serves_the_device(monkeypatch, config, expected):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)
    assert backend_for(None, "cuda") == expected
    assert backend_for(None, "cpu") == "gloo"


def test_a_group_made_without_a_backend_is_asked_by_device():
    """Torch calls such a group "undefined"."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert backend_for(None, "cuda") == ("nccl" if torch.cuda.is_available() else "gloo")
    finally:
        dist.destroy_process_group()


def test_the_watchdog_of_nccl_comes_long_after_our_own_error():
    assert distributed._group_timeout_s("nccl", 300.0) >= 2 * 300.0
    assert distributed._group_timeout_s("gloo", 300.0) == 300.0


@pytest.mark.parametrize("name", ["CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_LAUNCH_ORDER_IMPLICIT"])
def test_variables_that_serialise_launches_are_warned_of(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.warns(UserWarning, match=f"{name}=1.*deadlock"):
        distributed._warn_of_launch_order()
    monkeypatch.setenv(name, "8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distributed._warn_of_launch_order()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_nccls_own_group_gets_the_longer_timeout_and_the_warning(one_rank, monkeypatch):
    """At the transport itself: what the two functions above say is used there."""
    made = []

    class Group:
        def __init__(self, ranks, backend, timeout_s):
            made.append((ranks, backend, timeout_s))

        def leave_as_garbage(self):
            """Nothing is open."""

    monkeypatch.setattr(distributed, "OwnGroup", Group)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.warns(UserWarning, match="CUDA_DEVICE_MAX_CONNECTIONS=1"):
        transport = DistributedTransport(backend="nccl", timeout_s=300.0)
    assert transport.device_type == "cuda" and transport.timeout_s == 300.0
    assert made == [([0], "nccl", 660.0)]


@pytest.mark.parametrize(("config", "expected"), [("cpu:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cuda")])
def test_a_state_that_is_loaded_first_sends_from_where_its_group_does(
    one_rank, monkeypatch, config, expected
):
    """``load_state_dict`` before ``register`` opens the transport, and no gradient has said its device yet."""
    opened = []
    real = connection.make

    def make(transport, **options):
        opened.append(options.pop("device_type"))
        return real(transport, **options)

    state, saved = SparseState.topk(0.1), SparseState.topk(0.1).state_dict()
    monkeypatch.setattr(connection, "make", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)
    state.load_state_dict(saved)
    assert opened == [expected]
    state.close()


def test_nccl_is_waited_for_on_the_device_of_the_tensors(monkeypatch):
    """Which need not be the thread's current one: on another stream the deadline would see nothing."""
    recorded = []

    class Event:
        def record(self, stream="of the current device"):
            recorded.append(stream)

        def query(self):
            return True

    transport = object.__new__(DistributedTransport)
    transport.backend, transport.rank, transport.world_size, transport._ranks = "nccl", 0, 2, [0, 1]
    transport.timeout_s, transport._collectives = 5.0, 0
    transport._own = types.SimpleNamespace(is_alive=True, group=None)
    transport._stragglers = types.SimpleNamespace(wait_in=lambda number: False)
    work = types.SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(dist, "P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [work])
    monkeypatch.setattr(dist, "all_reduce", lambda buffer, **options: work)
    monkeypatch.setattr(distributed, "_gather", lambda *tensors, **options: work)
    there = torch.device("cuda", 1)

    def tensor():
        made = types.SimpleNamespace(device=there)
        made.view = lambda shape: made
        return made

    transport.move([(1, tensor())], [(1, tensor())], 0, "bucket 0")
    transport._all_reduce(tensor(), 0, "bucket 0")
    transport._all_gather(tensor(), tensor(), 0, "bucket 0")
    assert recorded == [there] * 3


def test_a_failure_of_nccl_to_start_is_a_lost_peer(monkeypatch):
    """Outside of torch's type a Reducer would not fail the transport, and the ranks would wait for each other."""
    transport = object.__new__(DistributedTransport)
    transport.backend, transport.rank, transport._ranks = "nccl", 0, [0, 1]
    transport._own = types.SimpleNamespace(is_alive=True, group=None)

    def fails(operations):
        raise RuntimeError("NCCL error: unhandled system error. Last error: connection closed")

    monkeypatch.setattr(dist, "P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(dist, "batch_isend_irecv", fails)
    with pytest.raises(PeerLostError, match="rank 0, bucket 2: lost a connection .* any peer"):
        transport.move([(1, torch.zeros(1))], [], 0, "bucket 2")


def _gathers(rank, size):
    transport = DistributedTransport(timeout_s=30.0)
    send = torch.arange(70_000, dtype=torch.int32).view(7, 10_000) + rank
    receive = torch.empty((size, 7, 10_000), dtype=torch.int32)
    transport.all_gather(send, receive, tag=0, what="test")
    transport.close()
    return all(torch.equal(receive[r], send - rank + r) for r in range(size))


def test_the_ring_gathers_into_one_tensor():
    """Five ranks: neither the pairwise all-gather nor recursive doubling serves them."""
    assert spawn_gloo(_gathers, 5) == [True] * 5


def _collectives(rank, size):
    transport, rows = DistributedTransport(timeout_s=20.0), torch.empty(size, 1000)
    total = torch.full((1000,), 1.0 + rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transport.all_gather(total, rows, tag=0, what="test")
        transport.all_reduce(total, tag=1, what="test")
    transport.close()
    return rows[:, 0].tolist(), total[0].item()


def test_collectives_of_torch_are_called_by_names_that_do_not_warn():
    assert spawn_gloo(_collectives, 5) == [([1.0, 2.0, 3.0, 4.0, 5.0], 15.0)] * 5
