"""The tables of docs/performance.md."""

from __future__ import annotations

from functools import cache, partial

from gpu import page
from training import demo

from ..harness import names
from ..harness.records import ROOT, Record, load, one, select
from ..harness.table import markdown, ms, number, paragraph
from ..network import accuracy, auto, exchange, overlap, step

_RESNET50 = "resnet50"
_SLOW = ("1gbit", "100mbit")
_RIVALS = ("topk", "gtopk")


@cache
def _records(name: str) -> tuple[Record, ...]:
    return tuple(load(name))


@cache
def starts() -> dict[tuple[str, int, str], dict[str, Record]]:
    """Steps by (model, ranks, network) and scheme."""
    return step.starts(_records("network"))


def lead() -> list[str]:
    """What the page says first."""
    slow, fast = starts()[_RESNET50, 4, "100mbit"], starts()[_RESNET50, 4, "1gbit"]
    times = [number(step.times_faster(s["gtopk"], s, "dense")) for s in (slow, fast)]
    return paragraph(
        f"A step of ResNet-50's 25.6M parameters on 4 ranks is {times[0]} times faster with gTop-k at "
        f"density 0.001 than with a dense all-reduce at 100 Mbit/s, and {times[1]} times faster at 1 Gbit/s."
    )


def steps(ranks: int) -> list[str]:
    """ResNet-50 on `ranks` ranks: milliseconds, times faster than dense, times the bound, at two rates."""
    columns = [starts()[_RESNET50, ranks, network] for network in _SLOW]
    rows = []
    for scheme, name in names.SCHEMES.items():
        cells = [name]
        for schemes in columns:
            record = schemes[scheme]
            faster = step.times_faster(record, schemes, "dense")
            cells += [ms(record["step_s"]), "" if scheme == "none" else number(faster)]
            cells.append(number(step.over_bound(record, schemes)))
        rows.append(cells)
    head = [f"{ranks} ranks"]
    for network in _SLOW:
        head += [f"{names.NETWORKS[network]}, ms", "faster", "/ bound"]
    return markdown(head, rows)


_SHOWN = ("dense", "topk", "gtopk", "randomk", "fp16", "powersgd1")


def models() -> list[str]:
    """The other models, times faster than dense, and gTop-k's bound. A star: of an earlier version."""
    rows = []
    for (model, ranks, network), schemes in starts().items():
        if model == _RESNET50:
            continue
        star = " *" if schemes["dense"].get("earlier_version") else ""
        cells = [
            f"{ranks}, {names.NETWORKS[network]}",
            names.MODELS[model] + star,
            ms(schemes["dense"]["step_s"]),
        ]
        cells += [number(step.times_faster(schemes[s], schemes, "dense")) for s in _SHOWN[1:]]
        rows.append([*cells, number(step.over_bound(schemes["gtopk"], schemes))])
    rows.sort(key=lambda row: (row[0].split(", ")[0], row[0].endswith("100 Mbit/s")))
    head = ("ranks, network", "model", "dense, ms", "top-k", "gTop-k", "random-k", "fp16", "PowerSGD rank 1")
    return markdown((*head, "gTop-k / bound"), rows, left=2)


def fast() -> list[str]:
    """ResNet-50 at 10 Gbit/s."""
    schemes = starts()[_RESNET50, 4, "10gbit"]
    rows = [
        (
            names.SCHEMES[s],
            ms(schemes[s]["step_s"]),
            number(step.times_faster(schemes[s], schemes, "dense")),
        )
        for s in ("none", *_SHOWN, "auto")
    ]
    return markdown(("4 ranks", "10 Gbit/s, ms", "faster"), rows)


def exchanges() -> list[str]:
    """The exchange alone: milliseconds and times its bound."""
    rows = []
    found = [r for r in _records("network") if r["bench"] == "exchange"]
    for ranks in (4, 8):
        for scheme in ("topk", "gtopk", "gtopk-tree", "randomk"):
            for of_mpi in ("", "-mpi"):
                cells = [str(ranks), names.SCHEMES[scheme + of_mpi]]
                for network in _SLOW:
                    record = one(found, ranks=ranks, network=network, scheme=scheme + of_mpi)
                    cells += [ms(record["exchange_s"]), number(exchange.over_bound(record))]
                rows.append(cells)
    head = ("ranks", "exchange of 25,558 pairs", "1 Gbit/s, ms", "/ bound", "100 Mbit/s, ms", "/ bound")
    return markdown(head, rows, left=2)


def phases() -> list[str]:
    """Where a step of ours spends its time."""
    rows = []
    for ranks in (4, 8):
        for network in _SLOW:
            schemes = starts()[_RESNET50, ranks, network]
            for scheme in ("topk", "gtopk", "randomk"):
                record = schemes[scheme]
                cells = [f"{ranks}, {names.NETWORKS[network]}", names.SCHEMES[scheme], ms(record["step_s"])]
                cells += [ms(record[f"{phase}_s"]) for phase in step.PHASES]
                rows.append([*cells, f"{record['counted_bytes'] / 1e6:.2f}"])
    head = (
        "ranks, network",
        "scheme",
        "step, ms",
        "select",
        "exchange",
        "write back",
        "MB sent a step and rank",
    )
    return markdown(head, rows, left=2)


def aims() -> list[str]:
    """What was aimed at, what was measured, and whether that meets it."""
    rows = [
        *(_faster("100mbit", wanted, than) for wanted, than in ((40.0, "dense"), (2.0, "powersgd1"))),
        *(
            _faster("1gbit", wanted, than)
            for wanted, than in ((5.0, "dense"), (2.0, "powersgd1"), (2.5, "fp16"))
        ),
        *(_bound(network, suffix) for network in ("100mbit", "1gbit") for suffix in ("", "-mpi")),
        *(_bare(ranks) for ranks in (4, 8)),
        *(_doubling(network, suffix) for network in ("100mbit", "1gbit") for suffix in ("", "-mpi")),
        _overlap(),
        _auto(),
    ]
    return markdown(("aim", "measured", "met"), rows, left=3)


Aim = tuple[str, str, str]


def _met(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _faster(network: str, wanted: float, than: str) -> Aim:
    schemes = starts()[_RESNET50, 4, network]
    times = [step.times_faster(schemes[scheme], schemes, than) for scheme in _RIVALS]
    aim = f"{names.NETWORKS[network]}: {wanted:g} times faster than {names.SCHEMES[than]}"
    return aim, " and ".join(map(number, times)), _met(min(times) >= wanted)


def _bound(network: str, suffix: str) -> Aim:
    schemes = starts()[_RESNET50, 4, network]
    over = [step.over_bound(schemes[scheme + suffix], schemes) for scheme in _RIVALS]
    aim = f"{names.NETWORKS[network]}{', MPI' if suffix else ''}: at most 1.5 times the bound"
    return aim, " and ".join(map(number, over)), _met(max(over) <= 1.5)


def _bare(ranks: int) -> Aim:
    found = select(_records("network"), bench="exchange", ranks=ranks, network="100mbit")
    over = [exchange.over_bound(one(found, scheme=scheme)) for scheme in ("gtopk", "gtopk-mpi")]
    aim = f"bare exchange, gTop-k, 100 Mbit/s, {ranks} ranks: at most 1.3 times its bound"
    return aim, f"{number(over[0])}; MPI {number(over[1])}", _met(max(over) <= 1.3)


def _doubling(network: str, suffix: str) -> Aim:
    found = select(_records("network"), bench="exchange", ranks=8, network=network)
    bare = [one(found, scheme=scheme + suffix)["exchange_s"] for scheme in ("gtopk", "topk")]
    schemes = starts()[_RESNET50, 8, network]
    whole = [schemes[scheme + suffix]["step_s"] for scheme in ("gtopk", "topk")]
    aim = f"{names.NETWORKS[network]}{', MPI' if suffix else ''}, 8 ranks: doubling faster than all-gather"
    measured = [
        f"{what} {ms(ours)} and {ms(theirs)} ms"
        for what, (ours, theirs) in (("exchange", bare), ("step", whole))
    ]
    return aim, ", ".join(measured), _met(bare[0] < bare[1] and whole[0] < whole[1])


def _overlap() -> Aim:
    found = _records("overlap")
    overlapped, after = (overlap.exposed_s(found, way) for way in ("overlapped", "after"))
    measured = f"{ms(overlapped)} of {ms(after)} ms"
    return "overlap, 10 buckets: at most a third exposed", measured, _met(overlapped <= after / 3)


def clips() -> list[str]:
    """What clipping before the memory adds to the overlapped hook, by what the norm is over."""
    found = _records("overlap")
    after = overlap.exposed_s(found, "after")
    rows = [
        (name, ms(exposed), f"{exposed / after:.2f}")
        for name, way in (
            ("no clipping", "overlapped"),
            *((f"`{over}`", way) for way, over in overlap.NORMS.items()),
        )
        for exposed in (overlap.exposed_s(found, way),)
    ]
    return markdown(("norm over", "exposed, ms", "of the same after backward"), rows)


def _auto() -> Aim:
    over = [auto.over_dense(r, _records("auto")) for r in select(_records("auto"), scheme="auto")]
    measured = f"{number(min(over))} to {number(max(over))}"
    return "no limit: auto at most 1.1 times a dense step", measured, _met(max(over) <= 1.1)


def autos() -> list[str]:
    """auto and plain beside dense where no link is limited."""
    rows = []
    found = _records("auto")
    for record in select(found, scheme="auto"):
        here = select(found, model=record["model"], ranks=record["ranks"])
        plain, dense = one(here, scheme="plain"), one(here, scheme="dense")
        chosen = ", ".join(dict.fromkeys(f"{plan['scheme']} {plan['density']:g}" for plan in record["plans"]))
        cells = [
            str(record["ranks"]),
            names.MODELS[record["model"]],
            ms(dense["step_s"]),
            ms(record["step_s"]),
        ]
        rows.append(
            [*cells, number(auto.over_dense(record, found)), number(auto.over_dense(plain, found)), chosen]
        )
    head = (
        "ranks",
        "model",
        "dense, ms",
        "auto, ms",
        "auto / dense",
        "plain / dense",
        "auto chose (scheme, density)",
    )
    return markdown(head, rows, left=2)


_LOSSES = {"resnet20": (0.1, 0.01), "lstm": (4.0, 3.0, 2.5, 2.0)}
_SCHEMES = {
    "dense": "dense",
    "fp16": "fp16",
    "powersgd2": "PowerSGD rank 2",
    "topk": "top-k",
    "gtopk": "gTop-k",
}


def accuracies(job: str) -> list[str]:
    """Milliseconds a step, seconds to each loss, and the test accuracy at the end."""
    rows = []
    for record in select(_records("accuracy"), job=job):
        reached = [accuracy.seconds_to(record, loss) for loss in _LOSSES[job]]
        cells = [_SCHEMES[record["scheme"]], ms(accuracy.step_s(record))]
        cells += ["-" if seconds is None else f"{seconds:.1f}" for seconds in reached]
        rows.append([*cells, f"{record['test_accuracy']:.1%}"])
    limit_s = accuracy.JOBS[job]["seconds"]
    title = {"resnet20": "ResNet-20 on digits", "lstm": "2-layer LSTM, 1.6M parameters"}[job]
    losses = [f"s to loss {loss:g}" for loss in _LOSSES[job]]
    return markdown((title, "ms a step", *losses, f"test accuracy after {limit_s:.0f} s"), rows)


def demonstration() -> list[str]:
    """What `scripts/demo` prints."""
    return markdown(demo.HEAD, demo.rows(load(ROOT / "docs" / "results" / "demo.jsonl")))


TABLES = {
    "demo": demonstration,
    "gpu": page.figures,
    "lead": lead,
    "steps-4": partial(steps, 4),
    "steps-8": partial(steps, 8),
    "models": models,
    "10gbit": fast,
    "exchange": exchanges,
    "aims": aims,
    "clips": clips,
    "phases": phases,
    "auto": autos,
    "accuracy-resnet20": partial(accuracies, "resnet20"),
    "accuracy-lstm": partial(accuracies, "lstm"),
}
