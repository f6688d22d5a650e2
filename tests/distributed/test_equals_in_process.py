"""Every scheme over gloo gives the bits, the memories and the bytes that P ranks as threads give."""

import sys
from pathlib import Path

import pytest
from launch import spawn_gloo

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
from twins import assert_equals_in_process  # noqa: E402

from commhooks.transports.distributed import DistributedTransport  # noqa: E402


def compare(rank, size):
    transport = DistributedTransport(timeout_s=60.0)
    assert (transport.rank, transport.world_size) == (rank, size)
    assert_equals_in_process(transport)
    transport.close()
    return True


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_every_scheme_over_gloo_equals_in_process(world_size):
    assert spawn_gloo(compare, world_size, timeout=120) == [True] * world_size
