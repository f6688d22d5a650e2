"""What gpu_check found out: checks one after the other within a time that is kept, and a file that is always up to date."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VERDICTS = ("pass", "skip", "fail", "timed out", "stopped", "not run")
_TO_END_S = 5.0  # of the budget: to end what ran too long, and to write


class Skipped(Exception):
    """A check that cannot run here; the text says why."""


class TimedOut(Exception):
    """A check that had no time left, or not enough; the text says how much it had."""


class Report:
    """What was checked, and how it went.

    Args:
        output: the JSON file, written at once and after every check.
        about: device, versions: goes first into the file.
        names: all checks, in order; those not reached keep the verdict "not run".
        budget_s: of seconds for everything, from ``begin`` on. No command outlives it.
        begin: of the time, by ``time.monotonic()``; default now.
    """

    def __init__(
        self,
        output: Path,
        about: Mapping[str, Any],
        names: list[str],
        *,
        budget_s: float,
        begin: float | None = None,
    ) -> None:
        self.output, self.about, self.budget_s = output, dict(about), budget_s
        self.begin = time.monotonic() if begin is None else begin
        self.checks: list[dict[str, Any]] = [
            {"name": name, "verdict": "not run", "seconds": 0.0, "detail": ""} for name in names
        ]
        self.summarise: Callable[[], dict[str, Any]] = dict  # further entries of the file
        self.save()

    def left_s(self) -> float:
        """Seconds that a command may still take."""
        return self.budget_s - _TO_END_S - (time.monotonic() - self.begin)

    def check(self, name: str, call: Callable[[], str]) -> bool:
        """Runs a check and writes the file; True when it passed."""
        (entry,) = (check for check in self.checks if check["name"] == name)
        print(f"gpu_check: {name} ...", flush=True)
        begin = time.monotonic()
        entry["verdict"] = "stopped"  # unless it comes to an end
        try:
            entry["detail"] = call()[-4000:]
            entry["verdict"] = "pass"
        except Skipped as reason:
            entry.update(verdict="skip", detail=str(reason))
        except TimedOut as reason:
            entry.update(verdict="timed out", detail=str(reason)[-4000:])
        except Exception as error:
            entry.update(verdict="fail", detail=f"{type(error).__name__}: {error}"[-4000:])
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            self.save()
        shown = entry["detail"][-1500:] if entry["verdict"] != "pass" else ""
        print(f"gpu_check: {name}: {entry['verdict']} ({entry['seconds']} s) {shown}", flush=True)
        return bool(entry["verdict"] == "pass")

    def named(self, *verdicts: str) -> list[str]:
        """Names of the checks with one of these verdicts."""
        return [check["name"] for check in self.checks if check["verdict"] in verdicts]

    def exit_status(self) -> int:
        """0: all passed or were skipped; 1: something failed; 2: nothing failed, but not all was run to its end."""
        if self.named("fail"):
            return 1
        return 2 if self.named("timed out", "stopped", "not run") else 0

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        everything = {
            **self.about,
            "seconds": round(time.monotonic() - self.begin, 1),
            "passed": self.exit_status() == 0,
            "checks": self.checks,
            **self.summarise(),
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.output.with_name(f".{self.output.name}.new")
        fresh.write_text(json.dumps(everything, indent=1) + "\n")
        os.replace(fresh, self.output)

    def run(self, command: list[str], limit_s: float, cwd: Path, environment: Mapping[str, str]) -> str:
        """Output of a command, which is ended with all it started when the time is over.

        Raises:
            TimedOut: after ``limit_s`` or the end of the budget.
            RuntimeError: another exit status than 0, with the end of the output.
        """
        limit_s = min(limit_s, self.left_s())
        if limit_s <= 0:
            raise TimedOut(f"nothing was left of {self.budget_s:.0f} s")
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **environment}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            said = b""
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=_TO_END_S / 2)
            text = said.decode(errors="replace")[-2000:]
            raise TimedOut(f"not done after {limit_s:.0f} s: {text}") from None
        finally:
            if process.returncode is None:  # this program is being stopped
                _end(process)
        text = said.decode(errors="replace")
        if process.returncode != 0:
            raise RuntimeError(f"exit status {process.returncode}: {text[-3500:]}")
        return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the command and what it started: a sanitizer's target would go on without it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stop_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end the program like Ctrl-C, so that commands are ended and the file is written."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
