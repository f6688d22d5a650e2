"""`SparseState.auto` on a link without a limit: its step beside plain DDP's, which it must never slow down by much.

    python scripts/benchmarks/network_auto.py --json docs/performance/network-auto.json

Run as root from the checkout. Hosts on a bridge without tc limits (veth pairs: memory copies, as on loopback). Dense and
auto take turns, so that both see the same machine; the figure is the median over all their steps. auto decides anew in
every turn and gets the buckets that it chose. `plain` is what auto gives for "do not compress" (with DDP's own buckets,
as dense), timed whether or not it was chosen. The records have one key more than those of `scripts/bench network`:
`plans`, what auto decided in each turn and what it was promised, so that a ratio above 1 can be explained.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from benchmarks.namespaces import Network, why_not
from benchmarks.network import plan_text, run_job
from benchmarks.network_models import MODELS, numel
from benchmarks.network_rank import Case
from benchmarks.network_records import KEYS

SCHEMES = ("dense", "auto", "plain")


def records_of(found: Sequence[dict[str, Any]], model: str, ranks: int) -> list[dict[str, Any]]:
    """Step times of auto and plain over dense's in the same turns; `plans`: auto's decisions, empty for plain."""
    steps = {s: median(t for c in found if c["scheme"] == s for t in c["seconds"]) for s in SCHEMES}
    plans = {"auto": [c["plan"] for c in found if c["scheme"] == "auto"], "plain": []}
    records = []
    for scheme, decisions in plans.items():
        value, dense = steps[scheme], steps["dense"]
        row = ["auto", scheme, model, numel(MODELS[model]()), None, ranks, "unlimited", "step", "s"]
        row += [value, "dense", value / dense]
        records.append(dict(zip(KEYS, row, strict=True)) | {"plans": decisions})
    return records


def _print(records: Sequence[dict[str, Any]]) -> None:
    for r in records:
        dense = r["value"] / r["ratio"]
        print(f"{r['model']}, {r['ranks']} ranks, {r['scheme']}: {r['value'] * 1e3:.1f} ms, dense {dense * 1e3:.1f} ms, "
              f"ratio {r['ratio']:.2f}")  # fmt: skip
        for plan in r["plans"]:
            print(f"  {plan_text(plan)}", flush=True)


def main() -> int:
    """Measures, prints and writes records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet50"], choices=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    records: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with Network(ranks, None) as network:
            for model in options.models:
                turn = [asdict(Case(s, model, steps=7, budget_s=20)) for s in SCHEMES]
                found, error = run_job(network, "network_rank.py", turn * options.turns, 500)
                if error is not None:
                    print(f"failed: {error}", file=sys.stderr)
                    return 1
                records += records_of(found, model, ranks)
                _print(records[-2:])
                options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
