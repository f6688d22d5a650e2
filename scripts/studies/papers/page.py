"""The page of results: a table of verdicts, then each claim with its figure."""

from __future__ import annotations

from typing import Any

from .claims import PAPERS

HEAD = """# The papers' claims, looked for on small problems

Made by `scripts/reproduce` (one module: `scripts/reproduce --only m_avg`). Each claim has one figure, one verdict and a
sentence with the numbers behind it; the verdict is computed from the numbers by the criterion in
`scripts/studies/papers/`. The problems are small on purpose: a strongly convex quadratic, logistic regression on
scikit-learn's breast-cancer data, perceptrons, a ResNet-20 and an LSTM on the digits and on text of the Python
standard library. "Simulation" means a vectorised simulation of all workers in one process, which `checks` holds against
the library sample for sample; "library" means commhooks itself over its in-process transport, one thread per rank.
"""


def render(results: dict[str, dict[str, Any]]) -> str:
    """The README's text from what `claims.json` holds."""
    lines = [HEAD, "| claim | paper | verdict |", "|---|---|---|"]
    ordered = [c for paper in (*PAPERS, "") for c in results.values() if c["paper"] == paper]
    for claim in ordered:
        short = claim["claim"].rstrip(".")
        lines.append(f"| [{short}](#{claim['name']}) | {claim['paper'] or 'this page'} | {claim['seen']} |")
    for paper, title in (*PAPERS.items(), ("", "This page's own simulation")):
        mine = [c for c in ordered if c["paper"] == paper]
        if not mine:
            continue
        lines += ["", f"## {title}"]
        for claim in mine:
            lines += ["", f"### {claim['name']}", "", f"**Claim.** {claim['claim']}", ""]
            lines += [f"**{claim['seen'].capitalize()}.** {claim['finding']}", ""]
            seconds = claim.get("cpu_seconds")
            cost = f" ({seconds:.0f} s of CPU time)" if seconds else ""
            lines += [f"*How:* {claim['how']}{cost}", "", f"![{claim['name']}]({claim['name']}.png)"]
    return "\n".join(lines) + "\n"
