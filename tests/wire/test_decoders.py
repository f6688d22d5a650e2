"""Bytes of anybody: a decoder gives pairs in range or a typed error, and nothing is written outside a buffer."""

import pytest
import torch

from commhooks import ErrorFeedback, SettingsMismatchError, SparseGrad
from commhooks.exchange.agreement import MESSAGE_BYTES, compare, encode
from commhooks.gradient.bucket import Bucket
from commhooks.gradient.sparse_grad import HEADER_WORDS
from commhooks.native.fused import PAD
from commhooks.reduction.write_back import write_sparse
from commhooks.wire.message import Context, pack, unpack, unpack_all

N, K = 50, 6
CONTEXT = Context(3, 7, K)
HOSTILE = (-(2**31), -1, -N, N, N + 1, 2**20, 2**31 - 2, PAD)


def message(generator):
    indices = torch.randperm(N, generator=generator)[:K].sort().values.int()
    values = torch.randn(K, generator=generator)
    return pack(SparseGrad(values, indices, N), False, CONTEXT)


def damaged(generator, number):
    """A message in which words were replaced: by hostile ones in the body, or by random ones anywhere."""
    words = message(generator)
    for _ in range(1 + number % 3):
        if number % 2:
            place = HEADER_WORDS + int(torch.randint(K, (1,), generator=generator))
            words[place] = HOSTILE[int(torch.randint(len(HOSTILE), (1,), generator=generator))]
        else:
            place = int(torch.randint(words.numel(), (1,), generator=generator))
            words[place] = int(torch.randint(-(2**31), 2**31, (1,), generator=generator))
    return words


def in_range(indices):
    used = indices[indices != PAD]
    return bool(((used >= 0) & (used < N)).all()) and bool((used[1:] > used[:-1]).all())


def test_damaged_messages_are_refused_or_harmless():
    generator, refused = torch.Generator().manual_seed(0), 0
    for number in range(3000):
        words, good = damaged(generator, number), message(generator)
        for read in (
            lambda words=words: unpack(words, N, 1, CONTEXT)[0].indices[None],
            lambda good=good, words=words: unpack_all(torch.stack([good, words]), N, CONTEXT)[1],
        ):
            try:
                rows = read()
            except SettingsMismatchError as error:
                refused += 1
                assert "rank 1" in str(error)
            else:
                assert all(in_range(row) for row in rows), rows
    assert refused > 3000


@pytest.mark.parametrize("place", range(K))
@pytest.mark.parametrize("index", HOSTILE[:-1])
def test_an_index_out_of_place_is_refused(place, index):
    words = message(torch.Generator().manual_seed(place))
    words[HEADER_WORDS + place] = index
    for read in (
        lambda: unpack(words, N, 1, CONTEXT),
        lambda: unpack_all(words[None].repeat(2, 1), N, CONTEXT),
    ):
        with pytest.raises(
            SettingsMismatchError, match=f"bucket 3, step 7: rank [01] sent indices .* below {N}"
        ):
            read()


def test_settings_of_anybody_are_compared():
    generator = torch.Generator().manual_seed(1)
    mine = encode({"density": 0.01, "step": 3})
    for number in range(500):
        noise = torch.randint(256, (MESSAGE_BYTES,), generator=generator, dtype=torch.uint8)
        theirs = torch.where(torch.rand(MESSAGE_BYTES, generator=generator) < (number % 5) / 4, noise, mine)
        if torch.equal(theirs, mine):
            compare(torch.stack([mine, theirs]), 0, "test")
        else:
            with pytest.raises(SettingsMismatchError, match="rank 0, test: "):
                compare(torch.stack([mine, theirs]), 0, "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hostile_indices_write_nothing_outside(dtype):
    """As on a GPU, where nothing is checked before: what is out of range is left out, or all is refused."""
    around = torch.full((3 * N,), 9.0, dtype=dtype)
    velocity = torch.full((3 * N,), 9.0)
    for index in HOSTILE:
        indices = torch.tensor([[3, min(index, 7), max(index, 7)]], dtype=torch.int32).sort(1).values
        values = torch.ones(1, 3)
        try:
            write_sparse(around[N : 2 * N], values, indices, 1.0, 1.0)
        except ValueError:
            pass
        else:
            assert around[N + 3] == 1.0
        assert (around[:N] == 9.0).all() and (around[2 * N :] == 9.0).all(), index
        memory = ErrorFeedback(momentum=0.9, factor_masking=True)
        held, _ = memory.for_bucket(Bucket(0, torch.zeros(N), ("p",), (N,)))
        held.velocity = velocity[N : 2 * N].fill_(9.0)
        memory.mask_velocity(held, SparseGrad(values[0], indices[0], N))
        expected = torch.full((3 * N,), 9.0)
        expected[N + torch.tensor([i for i in indices[0].tolist() if 0 <= i < N])] = 0.0
        assert torch.equal(velocity, expected), index


def test_rounding_is_returned_only_where_something_was_written():
    """A negative index counts from the end in torch: the rounding error of another element would return."""
    buffer = torch.zeros(N, dtype=torch.bfloat16)
    indices = torch.tensor([[-2, 4, N + 3]], dtype=torch.int32)
    lost = write_sparse(buffer, torch.full((1, 3), 1.0 + 2**-12), indices, 1.0, 1.0)
    assert lost.indices.tolist() == [4] and lost.values.tolist() == [2**-12]
    assert buffer.nonzero().flatten().tolist() == [4]
