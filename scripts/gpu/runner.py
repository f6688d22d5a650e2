"""Runs checks within a time that is kept, and writes everything that they found into one folder.

Three files come out: ``gpu.json``, ``report.md`` and ``logs.tar.gz`` with the whole output of every command. All three are
written anew after every check, so a run that is cut short leaves what it had.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from gpu.machine import ROOT

STEP = ">>> "  # a program prints this and a name before each of its steps: a hang is told by the last one
_TO_END_S = 5.0  # of the budget: to end what ran too long, and to write
_TO_DUMP_S = 2.0  # for a program that is being ended, to print the stacks of its threads
_SHOWN = 4000  # characters of a detail
DRY_FACTOR = 5  # a dry run measures nothing, and may have a busy machine: so many times the limits


class Skipped(Exception):
    """A check that cannot run here; the text says why."""


class TimedOut(Exception):
    """A check that had no time left, or not enough; the text says how much it had and where it stood."""


class Stopped(Exception):
    """The whole run is being stopped from outside."""


class Check(NamedTuple):
    """One line of the table of checks.

    Attributes:
        name: for people, and for ``--only`` and ``--skip``.
        call: does it, and returns a line on what it saw.
        limit_s: seconds for all commands of the check together.
        beside: neighbours in the table with the same text run side by side; empty: alone, as timings must.
    """

    name: str
    call: Callable[[Job], str]
    limit_s: float
    beside: str = ""


class Runner:
    """Runs checks, keeps the clock, and writes the files.

    Args:
        output: the folder that gets the three files.
        work: the folder for libraries, logs and results of programs; logs and results of earlier runs are removed.
        about: device and versions; goes first into the JSON.
        checks: all checks in order; those not reached keep the verdict "not run".
        budget_s: of seconds for everything, from ``begin`` on. No command outlives it.
        begin: of the time, by ``time.monotonic()``; default now.
        dry: no GPU: programs run on the CPU, tools for a GPU are only shown.
        summarise: further entries of the JSON, out of the programs' results and the checks' verdicts.
        page: the text of ``report.md`` out of the JSON.
        clocks: the state of the GPU while a check runs (:class:`gpu.machine.Clocks`), or None.
    """

    def __init__(
        self,
        output: Path,
        work: Path,
        about: Mapping[str, Any],
        checks: Sequence[Check],
        *,
        budget_s: float,
        begin: float | None = None,
        dry: bool = False,
        summarise: Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, Any]] = lambda *_: {},
        page: Callable[[dict[str, Any]], str] = lambda _: "",
        clocks: Any = None,
    ) -> None:
        self.output, self.work, self.about, self.checks = output, work, dict(about), checks
        self.budget_s = budget_s * (DRY_FACTOR if dry else 1)
        self.begin = time.monotonic() if begin is None else begin
        self.dry, self.summarise, self.page, self.clocks = dry, summarise, page, clocks
        self.entries: list[dict[str, Any]] = [
            {"name": check.name, "verdict": "not run", "seconds": 0.0, "detail": ""} for check in checks
        ]
        self.background: dict[str, Command] = {}  # commands that outlive the check that started them
        self._lock, self._running, self.stopping = threading.RLock(), set[Command](), False
        for folder in (self.logs, self.results):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.save()

    @property
    def logs(self) -> Path:
        """Where every command's output goes."""
        return self.work / "logs"

    @property
    def results(self) -> Path:
        """Where programs leave what they measured, as JSON."""
        return self.work / "results"

    def left_s(self) -> float:
        """Seconds that a command may still take."""
        return self.budget_s - _TO_END_S - (time.monotonic() - self.begin)

    def run_all(self) -> None:
        """All checks in order. The first makes what the others need: where it fails nothing else runs.

        In a dry run all others run side by side: there are no timings to disturb.
        """

        def group_of(pair: tuple[int, Check]) -> object:
            return "dry" if self.dry and pair[0] else pair[1].beside or pair[0]

        for _, group in groupby(enumerate(self.checks), key=group_of):
            checks = [check for _, check in group]
            if len(checks) == 1:
                self.run_check(checks[0])
            else:
                self._side_by_side(checks)
            if self.entries[0]["verdict"] not in ("pass", "skip"):
                return

    def _side_by_side(self, checks: Sequence[Check]) -> None:
        """At most as many at once as there are cores."""
        cores = threading.Semaphore(max(2, len(os.sched_getaffinity(0))))

        def run(check: Check) -> None:
            with cores:
                if not self.stopping:
                    self.run_check(check)

        threads = [threading.Thread(target=run, args=(check,), name=check.name) for check in checks]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self.stop()
            for thread in threads:
                thread.join(_TO_END_S)
            raise

    def run_check(self, check: Check) -> bool:
        """Runs one check and writes the files; True when it passed."""
        entry = self.entries[self.checks.index(check)]
        _tell(f"{check.name} ...")
        begin = time.monotonic()
        entry["verdict"] = "stopped"  # unless it comes to an end
        mark = self.clocks.mark() if self.clocks else None
        try:
            detail = check.call(Job(self, check))
            entry.update(verdict="pass", detail=detail[-_SHOWN:])
        except Skipped as reason:
            entry.update(verdict="skip", detail=str(reason))
        except TimedOut as reason:
            entry.update(verdict="timed out", detail=str(reason)[-_SHOWN:])
        except Stopped:
            pass
        except Exception as error:
            entry.update(verdict="fail", detail=f"{type(error).__name__}: {error}"[-_SHOWN:])
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            if self.clocks:
                entry["gpu"] = self.clocks.since(mark)
            self.save()
        shown = entry["detail"][:1500] if entry["verdict"] == "timed out" else entry["detail"][-1500:]
        shown = "" if entry["verdict"] == "pass" else shown
        _tell(f"{check.name}: {entry['verdict']} ({entry['seconds']} s) {shown}")
        return bool(entry["verdict"] == "pass")

    def named(self, *verdicts: str) -> list[str]:
        """Names of the checks with one of these verdicts."""
        return [entry["name"] for entry in self.entries if entry["verdict"] in verdicts]

    def exit_status(self) -> int:
        """0: all passed or were skipped; 1: something failed; 2: nothing failed, but not all was run to its end."""
        if self.named("fail"):
            return 1
        return 2 if self.named("timed out", "stopped", "not run") else 0

    def everything(self) -> dict[str, Any]:
        """What ``gpu.json`` says."""
        found = {}
        for file in sorted(self.results.glob("*.json*")):
            text = file.read_text()
            found[file.stem] = (
                json.loads(text) if file.suffix == ".json" else [json.loads(x) for x in text.splitlines()]
            )
        try:
            summary = self.summarise(found, self.entries)
        except Exception as error:  # of a program that was cut short, say: the checks go on
            summary = {"summary": f"{type(error).__name__}: {error}"}
        return {
            **self.about,
            "dry_run": self.dry,
            "seconds": round(time.monotonic() - self.begin, 1),
            "passed": self.exit_status() == 0,
            "checks": self.entries,
            **summary,
            "results": found,
        }

    def save(self) -> None:
        """Writes the three files, each whole or not at all."""
        with self._lock:
            self.output.mkdir(parents=True, exist_ok=True)
            everything = self.everything()
            with self._written("gpu.json") as fresh:
                fresh.write_text(json.dumps(everything, indent=1) + "\n")
            with self._written("report.md") as fresh:
                fresh.write_text(self._text(everything))
            with (
                self._written("logs.tar.gz") as fresh,
                tarfile.open(fresh, "w:gz", compresslevel=4) as archive,
            ):
                for folder in (self.logs, self.results):
                    archive.add(folder, arcname=folder.name)

    def _text(self, everything: dict[str, Any]) -> str:
        try:
            return self.page(everything)
        except Exception as error:
            return f"No page: {type(error).__name__}: {error}. Everything measured: `gpu.json`.\n"

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        fresh = self.output / f".{name}.new"
        yield fresh
        os.replace(fresh, self.output / name)

    def stop(self) -> None:
        """Ends every command that still runs, with all it started, and lets no other start."""
        with self._lock:
            self.stopping = True
            running = list(self._running)
        for command in running:
            command.end()

    @contextlib.contextmanager
    def starting(self, command: Command) -> Iterator[None]:
        """Around the start of a process, which :meth:`stop` must either prevent or see.

        Raises:
            Stopped: the run is being stopped.
        """
        with self._lock:
            if self.stopping:
                raise Stopped
            yield
            self._running.add(command)

    def ended(self, command: Command) -> None:
        """Told by a command that it has ended."""
        self._running.discard(command)


class Job:
    """A check while it runs: what its function gets.

    Attributes:
        runner: the whole run.
        check: its line in the table.
        log: the file that gets the output of its commands.
    """

    def __init__(self, runner: Runner, check: Check) -> None:
        self.runner, self.check = runner, check
        self.log = runner.logs / (re.sub(r"[^a-z0-9]+", "-", check.name.lower()).strip("-") + ".log")
        self._limit_s = check.limit_s * (DRY_FACTOR if runner.dry else 1)
        self._end = time.monotonic() + self._limit_s

    @property
    def dry(self) -> bool:
        """Whether there is no GPU."""
        return self.runner.dry

    def left_s(self) -> float:
        """Seconds that this check may still take."""
        return min(self._end - time.monotonic(), self.runner.left_s())

    def run(self, command: Sequence[str], **environment: str) -> str:
        """Output of a command; see :meth:`Command.wait`."""
        return self.start(command, **environment).wait(self.left_s())

    def start(self, command: Sequence[str], log: Path | None = None, **environment: str) -> Command:
        """A command that runs beside what follows. ``log``: another file for its output."""
        if self.left_s() <= 0:
            raise TimedOut(f"nothing was left of {min(self._limit_s, self.runner.budget_s):.0f} s")
        return Command(self.runner, [str(part) for part in command], log or self.log, environment)

    def show(self, command: Sequence[str]) -> None:
        """Writes into the log what would run where there is a GPU."""
        with self.log.open("a") as file:
            file.write(f"would run: {shlex.join(str(part) for part in command)}\n")

    def result(self, name: str) -> Path:
        """The file in which a program leaves its figures: ``name.json``, or ``name.jsonl`` with one record a line."""
        return self.runner.results / name


class Command:
    """A process of its own group, whose output goes straight into a log.

    Args:
        runner: told of its begin and end.
        arguments: the command.
        log: gets the command line and all output.
        environment: added to this process's own.
    """

    def __init__(
        self, runner: Runner, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.runner, self.log, self.begin = runner, log, time.monotonic()
        with log.open("ab") as file:
            added = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
            file.write(f"$ {added} {shlex.join(arguments)}\n".encode())
            file.flush()
            self._from = file.tell()
            with runner.starting(self):
                self.process = subprocess.Popen(
                    arguments, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    def wait(self, limit_s: float) -> str:
        """The output, when the command has ended.

        Raises:
            TimedOut: after ``limit_s`` seconds; the command is ended with all it started, and the message names its step.
            RuntimeError: another exit status than 0, with the end of the output.
            Stopped: the run was stopped.
        """
        try:
            self.process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            self._dump()
            text = self.output()
            where = last_step(text)
            told = f" in {where!r}" if where else ""
            waited_s = time.monotonic() - self.begin
            raise TimedOut(f"not done after {waited_s:.0f} s{told}: {_where_it_stood(text)}") from None
        finally:
            self.end()
        text = self.output()
        with self.log.open("a") as file:
            file.write(
                f"[exit status {self.process.returncode} after {time.monotonic() - self.begin:.1f} s]\n\n"
            )
        if self.runner.stopping:
            raise Stopped
        if self.process.returncode != 0:
            raise RuntimeError(f"exit status {self.process.returncode}: {text[-3500:]}")
        return text

    def output(self) -> str:
        """What the command has said so far."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def _dump(self) -> None:
        """SIGABRT: a Python program prints the stacks of all its threads (faulthandler) and ends."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_TO_DUMP_S)

    def end(self) -> None:
        """Kills the command and what it started: a sanitizer's target, say, which would go on using the GPU."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_TO_DUMP_S)
        self.runner.ended(self)


def _where_it_stood(text: str) -> str:
    """The stacks that faulthandler printed, innermost calls first, or the end of the output."""
    stacks = text.find("Fatal Python error")
    return text[-2500:] if stacks < 0 else text[max(0, stacks - 300) : stacks + 2500]


def _tell(text: str) -> None:
    """A line for who watches, in one piece: checks run side by side."""
    sys.stdout.write(f"gpu_check: {text}\n")
    sys.stdout.flush()


def last_step(text: str) -> str:
    """The step in which an output breaks off: after the last ``>>>``, or pytest's last test without a verdict."""
    for line in reversed(text.splitlines()):
        if line.startswith(STEP):
            return line[len(STEP) :].strip()
        test = re.match(r"(\S+\.py::\S+)\s*(PASSED|FAILED|SKIPPED|ERROR|XFAIL)?", line)
        if test:
            return test[1] if test[2] is None else f"after {test[1]}"
    return ""


def stop_on_signals() -> None:
    """Lets SIGTERM and SIGHUP end the program like Ctrl-C, so that commands are ended and the files are written."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
