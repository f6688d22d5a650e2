"""scripts/setup, as far as it goes without an index: whose torch is kept, and what is never cleared."""

import sys
import venv
from pathlib import Path

import pytest
from launch import ROOT, run

pytest.importorskip("ensurepip")


def environment_with_torch(folder, version):
    """The interpreter of a bare virtual environment that has a torch of this version, or none."""
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    if version:
        (packages / "torch").mkdir()
        (packages / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
        metadata = packages / f"torch-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder / "bin" / "python"


def setup(tmp_path, target, **env):
    """Runs scripts/setup where pip finds nothing to install."""
    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
    env = {"COMMHOOKS_PYTHON": "", "COMMHOOKS_VENV": str(target), **nothing, **env}
    return run([str(ROOT / "scripts" / "setup")], timeout=120, env=env, check=False)


@pytest.mark.parametrize(
    "version, said",
    [
        ("2.5.1", "keeping torch 2.5.1"),
        ("2.3.1", "torch 2.3.1 is older than 2.4"),
        (None, "python has no torch"),
    ],
)
def test_the_torch_of_another_virtual_environment_is_kept(tmp_path, version, said):
    python = environment_with_torch(tmp_path / "theirs", version)
    before = sorted((tmp_path / "theirs").rglob("*.py"))
    done = setup(tmp_path, tmp_path / "ours", PYTHON=str(python), COMMHOOKS_KEEP_TORCH="1")
    assert done.returncode == 1 and said in done.stderr, done.show()
    assert sorted((tmp_path / "theirs").rglob("*.py")) == before
    if version:
        code = "import torch; print(torch.__file__)"
        shown = run([str(tmp_path / "ours" / "bin" / "python"), "-c", code], timeout=30, cwd=tmp_path)
        assert Path(shown.stdout).is_relative_to(tmp_path / "theirs")


def test_an_environment_that_setup_did_not_make_is_not_cleared(tmp_path):
    python = environment_with_torch(tmp_path / "theirs", "2.5.1")
    for env in ({}, {"COMMHOOKS_KEEP_TORCH": "1", "PYTHON": str(python)}):
        done = setup(tmp_path, tmp_path / "theirs", **env)
        assert done.returncode == 1 and "not touching it" in done.stderr, done.show()
    assert run([str(python), "-c", "import torch; print(torch.__version__)"], timeout=30).stdout == "2.5.1\n"
