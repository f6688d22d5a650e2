"""`SparseState.auto` on a link without a limit: its step beside plain DDP's, which it must never slow down by much.

    python scripts/benchmarks/network_auto.py --json docs/performance/network-auto.json

Run as root from the checkout. 4 hosts on a bridge without tc limits (veth pairs: memory copies, as on loopback). Dense and
auto take turns, so that both see the same machine; the figure is the median over all their steps. `plain` is what
auto gives for "do not compress", timed whether or not it was chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from benchmarks.namespaces import Network, why_not
from benchmarks.network import run_job
from benchmarks.network_models import MODELS, numel
from benchmarks.network_rank import Case
from benchmarks.network_records import KEYS


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
    records = []
    for ranks in options.ranks:
        with Network(ranks, None) as network:
            for model in options.models:
                cases = [
                    Case(s, model, steps=7, budget_s=20)
                    for _ in range(options.turns)
                    for s in ("dense", "auto", "plain")
                ]
                found, error = run_job(network, "network_rank.py", [asdict(c) for c in cases], 500)
                if error is not None:
                    print(f"failed: {error}", file=sys.stderr)
                    return 1
                steps = {
                    s: [t for c in found if c["scheme"] == s for t in c["seconds"]]
                    for s in ("dense", "auto", "plain")
                }
                plan = next(c["plan"] for c in found if c["scheme"] == "auto")
                dense = median(steps["dense"])
                print(f"{model}, {ranks} ranks: dense {dense * 1e3:.1f} ms; auto chose {plan}")
                for scheme in ("auto", "plain"):
                    value = median(steps[scheme])
                    print(f"  {scheme}: {value * 1e3:.1f} ms, ratio {value / dense:.2f}", flush=True)
                    row = [
                        "auto",
                        scheme,
                        model,
                        numel(MODELS[model]()),
                        None,
                        ranks,
                        "unlimited",
                        "step",
                        "s",
                    ]
                    records.append(dict(zip(KEYS, [*row, value, "dense", value / dense], strict=True)))
                options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
