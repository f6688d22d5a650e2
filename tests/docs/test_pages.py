"""The pages: every Python block runs, every link leads somewhere, lines are short.

A block runs on two gloo ranks with the names of :func:`given` and no others: it imports what it uses. A block below
``<!-- file: PATH -->`` is that file's text, and the file is run by a test of its own. Pseudo-code is fenced as ``text``.
"""

import os
import re
import tempfile

import pytest
from launch import ROOT, spawn_gloo

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RENDERED = {"docs/results/accuracy.md", "docs/results/horovod.md", "docs/results/reproduce/README.md"}
BLOCK = re.compile(r"^(?:<!-- file: (?P<file>\S+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^(```+|~~~+).*?^\1`*$", re.M | re.S)
COLUMNS = 110


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """``(line number, code, file or None)`` of every Python block."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start("code")) + 1, found["code"], found["file"]


def given(rank, size):
    """What a block may use: a model, its DDP wrapper, a plain SGD, a loader of two batches, and a loss."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    ddp_model = DistributedDataParallel(model)
    torch.manual_seed(rank)
    return {
        "torch": torch,
        "model": model,
        "ddp_model": ddp_model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(2)],
        "loss_fn": nn.functional.mse_loss,
        "evaluate": lambda model: model(torch.randn(4, 8)),
        "rank": rank,
        "world_size": size,
    }


def run_blocks(rank, size, found):
    """Runs the blocks one after the other, each with names of its own, in an empty folder that the ranks share."""
    import torch.distributed as dist

    for page, line, code, folder in found:
        os.chdir(folder)
        names = given(rank, size)
        try:
            exec(compile("\n" * (line - 1) + code, page, "exec"), names)
        except BaseException as error:
            raise RuntimeError(f"the block at line {line} of {page} fails") from error
        dist.barrier()
        for value in names.values():
            if type(value).__module__.startswith("commhooks") and hasattr(value, "close"):
                value.close()


def test_every_python_block_runs():
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for page in PAGES:
            for line, code, file in blocks(page):
                if file is None:
                    found.append((name_of(page), line, code, tempfile.mkdtemp(dir=folder)))
        assert found
        spawn_gloo(run_blocks, 2, [found], timeout=120)


def test_a_block_that_fails_is_named():
    with pytest.raises(AssertionError, match="the block at line 7 of page.md fails"):
        spawn_gloo(run_blocks, 1, [[("page.md", 7, "missing\n", tempfile.gettempdir())]])


def test_blocks_of_files_are_their_text():
    for page in PAGES:
        for line, code, file in blocks(page):
            if file is not None:
                text = (ROOT / file).read_text()
                assert code in text, f"{name_of(page)}, line {line}: not the text of {file}"


def anchors(page):
    """The anchors of a page, as GitHub and MyST make them from its headings."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def broken_links(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n[a](#one-two) [b](#one) [c](page.md#one-two) [d](none.md)\n```\n[e](#e)\n```\n"
    )
    assert list(broken_links(page)) == ["#one", "none.md"]


FOLDERS = {p.name for top in (ROOT, ROOT / "commhooks") for p in top.iterdir() if p.is_dir()} - {
    "build",
    "dist",
}


def missing_paths(page):
    """Paths in backticks that begin with a folder of the repository or of the package, and do not exist."""
    for code in re.findall(r"`([^`\n]*)`", FENCE.sub("", page.read_text())):
        for word in code.split():
            folder, slash, rest = word.partition("/")
            if not slash or folder not in FOLDERS or rest.isupper():  # NAME stands for any
                continue
            if not any(rest == "" or list((top / folder).glob(rest)) for top in (ROOT, ROOT / "commhooks")):
                yield word


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    assert not list(missing_paths(page))


def test_a_missing_path_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`reduction/step.py` `scripts/bench --none` `scripts/none` `docs/*.none` `docs/*.md` `k/n`\n"
    )
    assert list(missing_paths(page)) == ["scripts/none", "docs/*.none"]


def long_lines(text):
    """Numbers of the lines that could be shorter: not code, tables, rendered blocks, headings or pictures."""
    kept = re.sub(r"<!-- rendered: .*?<!-- end -->", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    kept = FENCE.sub(lambda m: "\n" * m[0].count("\n"), kept)
    return [
        number
        for number, line in enumerate(kept.splitlines(), 1)
        if len(line) > COLUMNS and not line.startswith(("|", "#", "    ", "!["))
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if name_of(p) not in RENDERED], ids=name_of)
def test_lines_are_short(page):
    assert not long_lines(page.read_text())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def variables(folder):
    """The environment variables of commhooks that the Python sources of a folder mention; the other name is of C."""
    texts = [path.read_text() for path in folder.rglob("*.py")]
    return {name for text in texts for name in re.findall(r"COMMHOOKS_[A-Z_]+", text)} - {
        "COMMHOOKS_ABI_VERSION"
    }


def test_the_reference_is_complete():
    """Every figure of stats(), every environment variable and every logger of the package is on the page."""
    import commhooks
    from commhooks.averaging import LocalSGD

    page = (ROOT / "docs" / "reference" / "figures.md").read_text()
    reducer = commhooks.Reducer(commhooks.TopK(0.1), commhooks.AllGather())
    averager = LocalSGD(period=2)
    figures = reducer.stats()
    words = {*figures, *figures["seconds"], "averaged_by", *averager.stats()}
    folder = ROOT / "commhooks"
    logging = [path for path in folder.rglob("*.py") if "getLogger" in path.read_text()]
    words |= {f"commhooks.{path.relative_to(folder).parts[0]}" for path in logging}
    words |= variables(folder)
    assert not {word for word in words if f"`{word}`" not in page and f"`{word}=" not in page}


def test_every_error_is_in_troubleshooting():
    import commhooks

    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    named = [name for name in commhooks.__all__ if name.endswith("Error") and name != "CommHooksError"]
    assert len(named) >= 4
    assert not [name for name in named if name not in page]
