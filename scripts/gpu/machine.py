"""What there is on this machine: tools, versions, and the GPU's clocks, power and temperature."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watt",
    "temperature.gpu": "celsius",
}
_EVERY_MS = 500


def tool(name: str) -> str | None:
    """A program on PATH, beside this Python, or of the CUDA toolkit."""
    cuda = [folder for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    folders = [str(Path(sys.executable).parent)]
    folders += [f"{c}/{part}" for c in cuda for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def about(dry: bool) -> dict[str, Any]:
    """Device, versions, commit and date. In a dry run the device is this machine's CPU."""
    import torch

    result: dict[str, Any] = {"device": f"none ({platform.machine()})"}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        result = {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
        }
    return {
        **result,
        "nvcc": _last_line("nvcc", "--version"),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": _last_line("git", "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _last_line(name: str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            [tool(name) or name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


class Clocks:
    """Reads the GPU's clocks, power and temperature twice a second; changes nothing.

    Args:
        file: gets a line ``sm MHz, memory MHz, watt, degrees Celsius`` per reading.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins to read; does nothing where there is no nvidia-smi."""
        found = tool("nvidia-smi")
        if found is None:
            return
        command = [found, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        command += [f"--loop-ms={_EVERY_MS}", "--id=0"]
        with self.file.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def mark(self) -> int:
        """How many readings there are."""
        return len(self._lines())

    def since(self, mark: int) -> dict[str, list[float]]:
        """Lowest and highest value of each quantity since ``mark``; empty without readings."""
        rows = []
        for line in self._lines()[mark:]:
            try:
                values = [float(part) for part in line.split(",")]
            except ValueError:  # "[N/A]", or the last line, half written
                continue
            if len(values) == len(FIELDS):
                rows.append(values)
        if not rows:
            return {}
        return {name: [min(column), max(column)] for name, column in zip(FIELDS.values(), zip(*rows))}

    def _lines(self) -> list[str]:
        return self.file.read_text(errors="replace").splitlines() if self.file.is_file() else []

    def stop(self) -> None:
        """Ends the readings."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
