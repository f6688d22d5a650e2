"""What `scripts/bench plan-check` makes of its turns."""

import pytest
from benchmarks.network.plan_check import line, ratio, summary


def test_a_record_is_the_least_of_all_turns_and_the_range_of_single_ones():
    case = {
        "transport": "mpi",
        "model": "small",
        "numel": 10,
        "buckets": 1,
        "scheme": "topk",
        "density": 0.01,
    }
    turns = {"predicted_s": [1.0, 3.0], "least_s": [2.0, 1.5], "median_s": [4.0, 6.0], "probe_s": [0.5, 0.7]}
    record = summary(case | turns)
    assert ratio(record) == pytest.approx(1.0 / 1.5)
    assert (record["least_ratio"], record["largest_ratio"]) == (0.5, 2.0)
    assert (record["predicted_s"], record["least_s"], record["median_s"]) == (1.0, 1.5, 5.0)
    assert record["turns"] == 2
    assert "ratio 0.67 (single turns 0.50 to 2.00)" in line(record)
