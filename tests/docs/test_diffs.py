"""What the pages' `diff` blocks add: it parses, and its calls of commhooks have arguments that exist."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest
from launch import spawn_gloo
from test_pages import PAGES, given, name_of

BLOCK = re.compile(r"^```diff\n(?P<code>.*?)^```$", re.M | re.S)
DIFFS = [(page, code["code"]) for page in PAGES for code in BLOCK.finditer(page.read_text())]
RUN = {"README.md", "docs/averaging.md"}
"""Pages whose blocks run: their names are those that every block may use."""


def behind(code):
    """The text behind the change: without the lines that it takes away."""
    return textwrap.dedent("\n".join(line[1:] for line in code.splitlines() if not line.startswith("-")))


def ours(tree):
    """The names that a block imports from commhooks, as objects."""
    found = {"commhooks": importlib.import_module("commhooks")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("commhooks"):
            module = importlib.import_module(node.module)
            found |= {alias.name: getattr(module, alias.name) for alias in node.names}
    return found


def target(node, known):
    """What a call calls, if its first name is ours; else None."""
    if isinstance(node, ast.Attribute):
        owner = target(node.value, known)
        return None if owner is None else getattr(owner, node.attr)
    return known.get(node.id) if isinstance(node, ast.Name) else None


def test_there_are_some():
    assert len(DIFFS) >= 5 and {name_of(page) for page, _ in DIFFS} >= RUN


@pytest.mark.parametrize(("page", "code"), DIFFS, ids=[name_of(page) for page, _ in DIFFS])
def test_calls_have_arguments_that_exist(page, code):
    if "commhooks.horovod" in code:
        pytest.importorskip("horovod.torch")
    tree = ast.parse(behind(code))
    known, checked = ours(tree), 0
    for node in ast.walk(tree):
        called = target(node.func, known) if isinstance(node, ast.Call) else None
        if called is not None:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(called).bind(*[None] * len(node.args), **keywords)
            checked += 1
    assert checked, "the block calls nothing of commhooks"


@pytest.mark.parametrize(("page", "code"), [d for d in DIFFS if name_of(d[0]) in RUN], ids=sorted(RUN))
def test_a_loop_with_the_change_runs(page, code):
    def run(rank, size):
        from torch.nn.parallel import DistributedDataParallel

        names = {**given(rank, size), "DistributedDataParallel": DistributedDataParallel}
        exec(behind(code), names)

    spawn_gloo(run, 2)
