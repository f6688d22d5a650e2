"""scripts/docs builds the site, and refuses warnings, broken links and broken anchors."""

import os
import re
import subprocess
import sys

import pytest
from launch import ROOT

TOOLS = ROOT / ".venv-docs"

pytestmark = pytest.mark.skipif(not (TOOLS / "stamp").exists(), reason="no Sphinx: run scripts/docs once")


def sphinx(source, out):
    """Builds ``source`` with the site's settings; returns exit status and output."""
    command = [sys.executable, "-m", "sphinx", "-c", str(ROOT / "docs"), "-b", "html", "-n", "-W", "-q"]
    environment = {**os.environ, "PYTHONPATH": f"{TOOLS}:{ROOT}"}
    done = subprocess.run(
        [*command, str(source), str(out)], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("# A page\n\n[there](index.md#a-page)\n", None), ("# A page\n\n[no](index.md#b)\n", "'b'")]
    + [("# A page\n\n[no](none.md)\n", "none.md"), ("# A page\n\n{py:class}`None1`\n", "None1")],
    ids=["good", "anchor", "link", "name"],
)
def test_what_is_broken_fails(tmp_path, text, wrong):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(text)
    status, output = sphinx(tmp_path / "docs", tmp_path / "html")
    assert (status == 0) == (wrong is None), output
    assert wrong is None or wrong in output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path):
    environment = {**os.environ, "COMMHOOKS_PYTHON": sys.executable}
    command = [str(ROOT / "scripts" / "docs"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "html" / "reference" / "api-gradients.html").read_text()
    assert "timeout_s" in page and 'class="default_value"' in page
    for html in (tmp_path / "html").rglob("*.html"):
        loads = re.findall(
            r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"((?:https?:)?//[^\"]*)", html.read_text()
        )
        assert not loads, f"{html.name} loads {loads}"
