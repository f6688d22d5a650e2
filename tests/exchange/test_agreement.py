"""What ranks are told when their settings differ: every cause once, with the values and the ranks."""

import pytest
import torch

from commhooks.errors import SettingsMismatchError
from commhooks.exchange.agreement import MESSAGE_BYTES, agree, compare, encode
from commhooks.transports import in_process


def told(settings, rank=0, **options):
    """The error of ``rank`` when rank r has ``settings[r]``, behind its prefix."""
    messages = torch.stack([encode(s) for s in settings])
    with pytest.raises(SettingsMismatchError) as caught:
        compare(messages, rank, "bucket 3", **options)
    prefix = f"rank {rank}, bucket 3: the ranks disagree on "
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def test_one_setting_is_told_from_each_rank():
    ranks = [{"density": 0.01, "seed": 0}, {"density": 0.02, "seed": 0}]
    assert told(ranks) == "density: 0.01 here, 0.02 on rank 1"
    assert told(ranks, rank=1) == "density: 0.02 here, 0.01 on rank 0"


def test_ranks_with_one_value_are_told_together_and_settings_apart():
    ranks = [{"a": 1, "b": 2}, {"a": 5, "b": 2}, {"a": 1, "b": 3}, {"a": 5, "b": 2}]
    assert told(ranks) == "a: 1 here, 5 on ranks 1, 3; b: 2 here, 3 on rank 2"


def test_what_follows_from_another_setting_is_told_only_alone():
    assert told([{"k": 1, "density": 0.1}, {"k": 2, "density": 0.2}]) == "density: 0.1 here, 0.2 on rank 1"
    assert told([{"k": 1, "density": 0.1}, {"k": 2, "density": 0.1}]) == "k: 1 here, 2 on rank 1"


def test_a_setting_that_one_rank_has_not():
    assert told([{"a": 1, "seed": 7}, {"a": 1}]) == "seed: 7 here, nothing on rank 1"


def test_settings_that_do_not_fit_are_compared_by_checksum():
    long = "x" * MESSAGE_BYTES
    assert told([{"a": long, "b": 1}, {"a": long, "b": 2}]) == (
        f"settings beyond the first {MESSAGE_BYTES} bytes differ on rank 1 (by checksum)"
    )
    compare(torch.stack([encode({"a": long, "b": 1})] * 2), 0, "the same")


def test_neighbours_are_told_by_their_own_ranks_and_advice_stands_behind_the_values():
    text = told([{"a": 1}, {"a": 2}], rank=4, ranks=[4, 7], advice={"a": ": load it"})
    assert text == "a: 1 here, 2 on rank 7: load it"


def test_agreement_costs_sixteen_bytes_where_ranks_agree_and_carries_a_note():
    def work(transport):
        notes = agree(transport, {"a": "x" * 500}, tag=0, what="this", note=float(transport.rank))
        return notes, transport.counters.bytes_sent

    assert in_process.run(3, work) == [([0.0, 1.0, 2.0], 2 * 16)] * 3


def test_every_rank_raises():
    def work(transport):
        with pytest.raises(SettingsMismatchError, match="a: . here, . on rank"):
            agree(transport, {"a": int(transport.rank == 2)}, tag=0, what="this")

    in_process.run(4, work, timeout_s=5.0)
