"""scripts/reproduce runs, and writes figures, verdicts and the page."""

import importlib.util
import json
import sys

import pytest
from launch import ROOT, run

MISSING = [name for name in ("sklearn", "matplotlib", "scipy") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed")
def test_two_modules_run_and_the_simulation_is_the_library(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "reproduce"), "--quick", "--out", str(tmp_path)]
    run([*command, "--only", "checks", "local_sgd"], timeout=120)
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert set(claims) >= {"simulation_check", "local_sgd_period"}
    assert claims["simulation_check"]["seen"] == "seen"
    page = " ".join((tmp_path / "README.md").read_text().split())  # its lines are broken
    for name, claim in claims.items():
        assert (tmp_path / f"{name}.png").stat().st_size > 1000 and f"![{name}]" in page
        assert claim["seen"] in ("seen", "partly seen", "not seen") and claim["finding"] in page
