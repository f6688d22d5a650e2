"""The page of results: a table of verdicts, then each claim with its figure."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.table import page

from .claims import PAPERS
from .judged import JUDGED

HEAD = """# The papers' claims, looked for on small problems

Made by `scripts/reproduce` (one module: `scripts/reproduce --only m_avg`). Each claim has one figure, one
verdict and a sentence with the numbers behind it; the verdict is computed from the numbers by the criterion
in `scripts/studies/papers/`. The problems are small on purpose: a strongly convex quadratic, logistic
regression on scikit-learn's breast-cancer data, perceptrons, a ResNet-20 and an LSTM on the digits and on
text of the Python standard library.

**One seed, one rate.** Every verdict but that of m_avg_networks comes from one seed (of one or more repeats),
and from one learning rate where the text names no other. Where another seed, another rate or a second reading
speaks against a verdict, the table says so in brackets, and a sentence below the verdict says why.

"Simulation" means a vectorised simulation of all workers in one process. `checks` holds that of the averagers
against the library sample for sample, and a test holds that of M-DSGD with top-k against it step by step.
Random-k draws a mask for each worker in the simulation, as in the paper, and one shared mask in the library.
"Library" means commhooks itself over its in-process transport, one thread per rank.
"""


def render(results: dict[str, dict[str, Any]]) -> str:
    """The README's text from what `claims.json` holds."""
    lines = [HEAD, "| claim | paper | verdict |", "|---|---|---|"]
    ordered = [c for paper in (*PAPERS, "") for c in results.values() if c["paper"] == paper]
    for claim in ordered:
        short = claim["claim"].rstrip(".")
        mark = f" ({JUDGED[claim['name']][0]})" if claim["name"] in JUDGED else ""
        lines.append(
            f"| [{short}](#{claim['name']}) | {claim['paper'] or 'this page'} | {claim['seen']}{mark} |"
        )
    for paper, title in (*PAPERS.items(), ("", "This page's own simulation")):
        mine = [c for c in ordered if c["paper"] == paper]
        if not mine:
            continue
        lines += ["", f"## {title}"]
        for claim in mine:
            lines += ["", f"### {claim['name']}", "", f"**Claim.** {claim['claim']}", ""]
            lines += [f"**{claim['seen'].capitalize()}.** {claim['finding']}", ""]
            if claim["name"] in JUDGED:
                mark, sentence = JUDGED[claim["name"]]
                lines += [f"**{mark[0].upper()}{mark[1:]}.** {sentence}", ""]
            seconds = claim.get("cpu_seconds")
            cost = f" ({seconds:.0f} s of CPU time)" if seconds else ""
            lines += [f"*How:* {claim['how']}{cost}", "", f"![{claim['name']}]({claim['name']}.png)"]
    return page(lines)
