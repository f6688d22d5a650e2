"""`scripts/bench render`: writes the tables of the documentation, rendered from the records, into its pages.

In a page a table stands between `<!-- rendered: NAME -->` and `<!-- end -->`; NAME is a function in the
`TABLES` of the page's module in `benchmarks/pages`, which returns lines of Markdown. A test compares each
page with its rendering.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping

from .records import ROOT

Tables = Mapping[str, Callable[[], list[str]]]
#: Page, and the module with its tables.
PAGES = {
    "docs/averaging.md": "benchmarks.pages.averaging",
    "README.md": "benchmarks.pages.readme",
    "docs/performance.md": "benchmarks.pages.performance",
    "docs/cost-model.md": "benchmarks.pages.cost_model",
    "docs/kernels.md": "benchmarks.pages.kernels",
    "docs/kernels-cuda.md": "benchmarks.pages.kernels_cuda",
    "docs/recipes.md": "benchmarks.pages.recipes",
    "docs/slow-links.md": "benchmarks.pages.slow_links",
}
_BLOCK = re.compile(r"<!-- rendered: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def render(text: str, tables: Tables) -> str:
    """The page with every table rendered anew.

    Raises:
        ValueError: a name in the page that is no table, or a table that is not in the page exactly once.
    """
    names = [match[1] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"the page has the tables {sorted(names)}, its module {sorted(tables)}")

    def block(match: re.Match[str]) -> str:
        lines = "\n".join(tables[match[1]]())
        return f"<!-- rendered: {match[1]} -->\n{lines}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def rendered(page: str) -> tuple[str, str]:
    """A page of `PAGES` as it is, and as its records render it."""
    text = (ROOT / page).read_text()
    tables: Tables = importlib.import_module(PAGES[page]).TABLES
    return text, render(text, tables)


def draw() -> None:
    """Draws every picture of docs/performance from the records."""
    for file, plot in importlib.import_module("benchmarks.pages.pictures").PICTURES.items():
        plot(file)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scripts/bench render`."""
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where a page differs"
    )
    parser.add_argument("--pictures", action="store_true", help="draw docs/performance/*.png too")


def run(options: argparse.Namespace) -> int:
    """Renders all pages; returns the exit status."""
    differ = False
    for page in PAGES:
        old, new = rendered(page)
        if old == new:
            continue
        differ = True
        if options.check:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), page, "its records", lineterm="")
            print("\n".join(lines), file=sys.stderr)
        else:
            (ROOT / page).write_text(new)
            print(f"{page} written")
    if options.pictures:
        draw()
    return int(differ and options.check)
