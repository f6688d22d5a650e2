"""What docs/averaging.md and docs/kernels.md say in words about their tables holds in the records."""

from benchmarks.harness.records import ROOT, load
from benchmarks.pages import averaging, kernels
from studies import averagers


def test_the_advice_on_averagers():
    found = averagers.rows(load(ROOT / "docs" / "results" / "averagers.jsonl"))
    rows = {(row.arm.averager, row.arm.period): row for row in found}
    dense, packed = rows[averagers.DENSE, 1], rows["DiLoCo, top-k", 10]
    for name in ("Local SGD", "M-AVG"):
        often, rarely = (rows[name, period] for period in averagers.PERIODS)
        assert often.above < rows["DiLoCo", 10].above and rarely.above < rows["DiLoCo", 30].above
        assert rarely.lr < often.lr < dense.lr, "the lower the inner rate, the larger H"
    for row in found:
        if row.arm.period == 30:
            assert packed.above < row.above, "top-k every 10 steps lost less than any averager every 30"
            if row.arm.averager != packed.arm.averager:
                assert packed.bytes_sent_per_step < row.bytes_sent_per_step, "and sent less"


def test_the_words_below_the_comparison_with_torchft():
    _, _, torchft, plain, halves, bits = averaging.torchft()
    columns = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (torchft, plain, halves, bits)]
    (_, _, ours, large, size, lines), half = columns[1], columns[2]
    assert (columns[0][5], lines) == ("4", "2")
    assert 1.9 < float(size) / float(half[4]) < 2.1, "bfloat16 halves the bytes"
    assert float(half[2]) >= float(ours) and float(half[3].replace(",", "")) >= float(large.replace(",", ""))


def test_what_undoable_costs():
    _, _, plain, momentum = kernels.apart()
    without, with_it = (
        [float(cell) for cell in line.split("|")[2:-1]] for line in (plain, momentum)
    )  # sizes from 1M to 100M, each at 0.1 % and 1 %
    assert max(without[4:]) <= 1.1, "met from 25M elements on without momentum"
    assert min(with_it[1::2]) > 1.1, "not reached with momentum where 1 % is selected"
