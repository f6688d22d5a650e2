"""Bytes per step, counted under the transport's own counters, equal the formulas."""

import math
import threading

import pytest
import torch
from ranks import reducer

from commhooks import Bucket, SettingsMismatchError, SparseGrad
from commhooks.gradient.sparse_grad import places
from commhooks.native import ops
from commhooks.transports import in_process
from commhooks.wire.message import Context, pack, unpack, unpack_all

HEADER = 16
SIZES = (1, 2, 3, 4, 5, 8)


def traffic(scheme, world_size, n, k, steps=3):
    """What each rank sent and received in the last of ``steps`` steps.

    Returns:
        for each rank (stats, sent bytes per message, received bytes per message), from outside the counters.
    """

    def work(transport):
        sent, received = [], []
        exchange = transport.move

        def counted(sends, receives, tag, what):
            sent.extend(b.numel() * b.element_size() for _, b in sends)
            received.extend(b.numel() * b.element_size() for _, b in receives)
            exchange(sends, receives, tag, what)

        transport.move = counted
        red = reducer(scheme, transport, k / n)
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(steps):
            sent.clear(), received.clear()
            red.reduce(Bucket(0, torch.randn(n, generator=generator), ("p",), (n,)))
        return red.stats(), list(sent), list(received)

    return in_process.run(world_size, work)


def core(world_size):
    return 2 ** int(math.log2(world_size))


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("k", [3, 50])
def test_doubling_sends_at_most_ceil_log2_messages_of_8k_and_a_header(world_size, k):
    message, bits = 8 * k + HEADER, math.ceil(k / 8)
    rounds, folds = int(math.log2(core(world_size))), world_size - core(world_size)
    for rank, (stats, sent, received) in enumerate(traffic("gtopk", world_size, 400, k)):
        if rank >= core(world_size):
            expected = [message]
        elif rank < folds:
            expected = [message] * rounds + [message + bits]
        else:
            expected = [message] * rounds
        assert sent == expected
        assert stats["bytes_sent"] == sum(expected)
        assert stats["bytes_received"] == sum(received)
        steps = math.ceil(math.log2(world_size))
        assert sum(sent) <= steps * (8 * k + HEADER) + (bits if rank < folds else 0)


@pytest.mark.parametrize("world_size", SIZES)
def test_the_tree_sends_log2_p_messages_and_survival_bits(world_size):
    k = 20
    results = traffic("gtopk-tree", world_size, 400, k)
    message, bits = 8 * k + HEADER, math.ceil(k / 8)
    everything = sum(stats["bytes_sent"] for stats, _, _ in results)
    assert everything == (world_size - 1) * (2 * message + bits)
    assert everything == sum(stats["bytes_received"] for stats, _, _ in results)
    assert everything == sum(sum(sent) for _, sent, _ in results)
    if world_size > 1:
        assert max(stats["bytes_sent"] for stats, _, _ in results) <= math.ceil(math.log2(world_size)) * (
            message + bits
        )


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("k", [3, 50])
def test_all_gather_receives_every_other_ranks_message(world_size, k):
    for stats, sent, received in traffic("union", world_size, 400, k):
        assert received == [8 * k + HEADER] * (world_size - 1)
        assert stats["bytes_received"] == (8 * k + HEADER) * (world_size - 1) == stats["bytes_sent"]


@pytest.mark.parametrize("world_size", SIZES)
def test_shared_indices_and_dense_all_reduce_values_alone(world_size):
    """Counted as a ring all-reduce of the values and one vote."""
    for scheme, elements in (("shared", 20 + 1), ("dense", 400 + 1)):
        for stats, _, _ in traffic(scheme, world_size, 400, 20):
            assert stats["bytes_sent"] == 2 * (world_size - 1) * 4 * elements // world_size, scheme
            assert stats["dense_bytes"] == 1600


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("scheme", ["union", "gtopk", "gtopk-tree", "shared"])
def test_what_an_aggregator_promises_is_what_its_busiest_rank_sends(scheme, world_size):
    promised = []

    def work(transport):
        promised.append(reducer(scheme, transport, 0.05).aggregator.wire_bytes(20, world_size))

    in_process.run(world_size, work)
    busiest = max(stats["bytes_sent"] for stats, _, _ in traffic(scheme, world_size, 400, 20))
    assert busiest <= promised[0] <= busiest + 2 * (20 * 8 + HEADER + 3)
    if scheme != "gtopk-tree":
        assert busiest == promised[0]


def test_compression_ratio_is_dense_bytes_over_bytes_sent():
    stats, sent, _ = traffic("gtopk", 4, 4000, 4)[0]
    assert stats["compression_ratio"] == 16000 / (2 * (32 + 16)) == 16000 / sum(sent)


def test_a_message_says_what_it_is():
    """Bucket, step, vote and number of pairs are read before any pair is used."""
    pairs = SparseGrad(torch.tensor([1.5, -0.0]), torch.tensor([3, 9], dtype=torch.int32), 10)
    for step, vote in ((0, False), (0, True), (2**31 + 5, True), (7, False)):
        context = Context(4, step)
        message = pack(pairs, vote, context)
        back, voted = unpack(message, 10, 1, context)
        assert voted is vote and back.indices.tolist() == [3, 9]
        assert torch.equal(back.values.view(torch.int32), pairs.values.view(torch.int32))
        values, indices, any_vote = unpack_all(
            torch.stack([pack(pairs, False, context), message]), 10, context
        )
        assert any_vote is vote and indices.tolist() == [[3, 9]] * 2 and values.tolist() == [[1.5, -0.0]] * 2
    for other in (Context(5, 7), Context(4, 8)):
        with pytest.raises(
            SettingsMismatchError, match=f"expected {other} from rank 1, got bucket 4, step 7"
        ):
            unpack(message, 10, 1, other)
    shorter = pack(SparseGrad(pairs.values[:1], pairs.indices[:1], 10), False, context)
    padded = torch.cat((shorter, torch.zeros(2, dtype=torch.int32)))  # what MPI leaves in a longer buffer
    for read in (
        lambda m: unpack(m, 10, 1, context),
        lambda m: unpack_all(torch.stack([message, m]), 10, context),
    ):
        with pytest.raises(SettingsMismatchError, match="expected 2 pairs from rank 1, got a message of 1"):
            read(padded)


@pytest.mark.parametrize("scheme", ("union", "union-random", "threshold", "gtopk", "gtopk-tree"))
def test_pairs_are_selected_and_merged_straight_into_the_message(scheme, monkeypatch):
    """No pair is copied between the kernel that writes it and the transport that sends it."""
    written, lock = {}, threading.Lock()  # by rank: the messages that kernels wrote

    def spied(kernel):
        def run(*arguments, **options):
            result = kernel(*arguments, **options)
            with lock:
                written.setdefault(threading.get_ident(), []).append(
                    (result.indices.data_ptr(), result.values.data_ptr(), result)
                )
            return result

        return run

    for name in ("select_topk", "select_threshold", "select_indices", "merge_topk"):
        monkeypatch.setattr(ops, name, spied(getattr(ops, name)))

    def work(transport):
        red = reducer(scheme, transport, 0.1)
        red.open()
        sent = []
        for name in ("exchange", "all_gather"):
            plain = getattr(transport, name)

            def spy(first, *rest, plain=plain, **options):
                if options["tag"] < 30:  # not the settings, nor the result with its bits
                    buffers = [buffer for _, buffer in first] if isinstance(first, list) else [first]
                    sent.extend(b.data_ptr() for b in buffers if b.dtype == torch.int32 and b.numel() > 4)
                plain(first, *rest, **options)

            monkeypatch.setattr(transport, name, spy)
        red.reduce(Bucket(0, torch.randn(400), ("p",), (400,)))
        mine = written[threading.get_ident()]
        return sent, [(i, v) for i, v, _ in mine]

    torch.manual_seed(0)
    results = in_process.run(4, work)
    for sent, found in results:
        for pointer in sent:
            assert (pointer + 16, pointer + 16 + 40 * 4) in found
    assert all(sent for sent, _ in results[1:]) and any(len(found) > 1 for _, found in results) == (
        "gtopk" in scheme
    )


def test_pairs_of_no_message_are_copied_into_one():
    pairs = SparseGrad(torch.tensor([1.0, 2.0]), torch.tensor([3, 9], dtype=torch.int32), 10)
    message = pack(pairs, False, Context(1, 2))
    inside = SparseGrad(*places(message), 10, message)
    again = pack(inside, True, Context(1, 3))
    assert again is message and unpack(again, 10, 0, Context(1, 3))[1]
    assert pairs.values.tolist() == [1.0, 2.0] and inside.indices.tolist() == [3, 9]
