"""What a run writes down: JSON lines, a progress bar, and tables in Markdown that read well on a terminal too.

Records of the log, one JSON object a line, `event` first:
    start    options, ranks, launcher, parameters, steps_per_epoch
    step     step (from 1), epoch, loss (mean over ranks), lr, bytes_sent and bytes_received (mean over ranks, of this step),
             bytes_sent_max (the busiest rank), step_time_s (the slowest rank), delta and residual_norm where known
    epoch    epoch, step, train_loss, test_loss, test_accuracy (of images or of next tokens), test_perplexity for text
    end      the summary
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Sequence


class Log:
    """Appends records to a file; without a path it writes nothing."""

    def __init__(self, path: str | None, resume_step: int | None = None) -> None:
        """Opens the file, anew or, at a resume, without the records from after the checkpoint."""
        self._file = None
        if path is None:
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = _until(target, resume_step) if resume_step is not None and target.exists() else []
        part = target.with_name(target.name + ".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(target)
        self._file = target.open("a", encoding="utf-8")

    def write(self, event: str, **record: Any) -> None:
        """One line, on disk when this returns (as far as the system's cache)."""
        if self._file is not None:
            record = {name: value for name, value in record.items() if value is not None}
            self._file.write(json.dumps({"event": event, **record}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path | str, event: str | None = None) -> list[dict[str, Any]]:
    """The records of a log, or those of one kind."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    return [record for record in records if event in (None, record["event"])]


def _until(path: Path, step: int) -> list[str]:
    """The lines of a log that a run resumed after `step` steps will not write again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        if record["event"] != "end" and record.get("step", 0) <= step:
            kept.append(line)
    return kept


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing on ranks other than the first."""

    def __init__(self, total: int, done: int, title: str, shown: bool) -> None:
        self._bar, self._task, self._title, self._shown = None, None, title, shown
        self._total, self._done, self._last = total, done, 0.0
        if shown and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def step(self, note: str = "") -> None:
        """One step further."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
            return
        now = time.monotonic()
        if self._shown and (now - self._last > 10.0 or self._done == self._total):
            self._last = now
            print(f"{self._title}: step {self._done}/{self._total} {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Bar(*columns, console=Console(stderr=True))


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; all but the first are set to the right."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        first, *rest = [(cell, width) for cell, width in zip(row, widths)]
        return (
            "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"
        )

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def count(number: float) -> str:
    """A number of bytes with thousands separated."""
    return f"{number:,.0f}"
