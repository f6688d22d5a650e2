"""The measured tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from ..harness.records import Record, load, one, select
from ..harness.table import markdown, number

_SIZES = (1_000_000, 6_550_000, 25_000_000, 100_000_000)
_LARGE = _SIZES[2:]
_DENSITIES = (0.001, 0.01)
_FASTER = 25.0
_DATA = {"gaussian": "gaussian", "heavy": "heavy", "real": "real", "missed": "missed twice"}


@cache
def _records() -> tuple[Record, ...]:
    return tuple(load("kernels-cpu"))


def _time(kernel: str, data: str, numel: int, density: float) -> Record:
    return one(_records(), kernel=kernel, data=data, numel=numel, density=density, metric="time")


def _over(record: Record, baseline: str) -> float:
    return float(record["value"] / record["baselines"][baseline])


def topk() -> list[str]:
    """select_topk over `r += g`."""
    rows = []
    for data, name in _DATA.items():
        for numel in _LARGE if data == "missed" else _SIZES:
            over = (_over(_time("select_topk", data, numel, density), "r+=g") for density in _DENSITIES)
            rows.append((name, f"{numel:,}", *map(number, over)))
    return markdown(("data", "n", "0.1 %", "1 %"), rows)


def target() -> list[str]:
    """From 25M elements on: what was aimed at, the range of what was measured, and whether that meets it."""
    rows = []
    for density, most in ((0.001, 1.3), (0.01, 1.6)):
        times = [
            _over(_time("select_topk", data, numel, density), "r+=g")
            for data in ("gaussian", "heavy", "real")
            for numel in _LARGE
        ]
        aim = f"{density * 100:g} %: at most {most:g} times `r += g`"
        rows.append((aim, _span(times), _met(max(times) <= most)))
        faster = [1 / _over(_time("select_topk", "gaussian", numel, density), "torch") for numel in _LARGE]
        aim = f"{density * 100:g} %: {_FASTER:g} times faster than `add_, abs, topk, gather, scatter`"
        rows.append((aim, _span(faster), _met(min(faster) >= _FASTER)))
    hits = [r["value"] for r in select(_records(), metric="hit_rate")]
    rows.append(("the guess holds on gaussian, heavy and real gradients", f"in {min(hits):.0%} of calls", ""))
    return markdown(("select_topk, 25M and 100M", "measured", "met"), rows, left=3)


def _met(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _span(values: list[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


_OTHERS = (
    ("select_threshold", "r+=g"),
    ("select_indices", "r+=g"),
    ("write_back", "r+=g"),
    ("write_back", "torch"),
    ("scatter_add", "torch"),
    ("random_indices", "torch"),
)


def others() -> list[str]:
    """The other kernels over their baselines."""
    cases = [(numel, density) for numel in _LARGE for density in _DENSITIES]
    rows = [
        (kernel, baseline, *(number(_over(_time(kernel, "gaussian", *case), baseline)) for case in cases))
        for kernel, baseline in _OTHERS
    ]
    head = [f"{numel // 10**6}M, {density * 100:g} %" for numel, density in cases]
    return markdown(("kernel", "baseline", *head), rows, left=2)


def merge() -> list[str]:
    """merge_topk over a copy of its inputs, numpy and torch."""
    return markdown(("k", "density", "ms", "memcpy", "numpy", "torch"), list(_merges()), left=0)


def _merges() -> Iterator[tuple[str, ...]]:
    for k in (25_000, 250_000):
        for density in _DENSITIES:
            record = _time("merge_topk", "gaussian", int(k / density), density)
            over = (number(_over(record, baseline)) for baseline in ("memcpy", "numpy", "torch"))
            yield f"{k:,}", f"{density:g}", number(record["value"]), *over


def apart() -> list[str]:
    """select_topk that writes the new memory apart, over the same in place."""
    cases = [(numel, density) for numel in _SIZES for density in _DENSITIES]
    head = [f"{numel / 10**6:g}M, {density * 100:g} %" for numel, density in cases]
    rows = []
    for kernel, name in (("select_topk, apart", "no"), ("select_topk, apart, velocity", "yes")):
        times = (_time(kernel, "gaussian", *case) for case in cases)
        rows.append((name, *(number(_over(time, "in place")) for time in times)))
    return markdown(("momentum", *head), rows)


_MOST_LOW_BIT = 1.5


def low_bit() -> list[str]:
    """The low-bit kernels over one pass that reads and writes the vector, and whether that meets the aim."""
    rows = []
    for kernel in ("low_bit_encode", "low_bit_decode_add"):
        for bits in (1, 2, 4, 8):
            times = [_over(_time(kernel, f"gaussian, {bits} bits", numel, 1.0), "r*=a") for numel in _LARGE]
            rows.append((kernel, str(bits), *map(number, times), _met(max(times) <= _MOST_LOW_BIT)))
    return markdown(("kernel", "bits", "25M", "100M", f"at most {_MOST_LOW_BIT:g}"), rows)


TABLES = {
    "topk": topk,
    "target": target,
    "others": others,
    "merge": merge,
    "apart": apart,
    "low_bit": low_bit,
}
