"""Records: what was measured, one JSON object a line.

A record holds labels (`bench`: which measurement) and measured figures with their unit in the name
(`step_s`). It holds no ratio and nothing that another record says already: both are computed where a table is
rendered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs" / "performance"
MACHINE = "machine"
"""`bench` of the line that says where a file was measured: `cores`, and the machine's `load` just before."""
LINK = "link"
"""`bench` of the lines with a test network's rates, measured first: `mbit_per_s` of each flow."""
_DIGITS = 6


def load(path: Path | str) -> list[Record]:
    """The records of a file; a name alone is one of docs/performance.

    Raises:
        ValueError: a line that is no JSON object, by file and number.
    """
    file = FOLDER / f"{path}.jsonl" if isinstance(path, str) else path
    records = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file}:{number}: a record must be an object, got {line[:60]!r}")
        records.append(record)
    return records


def save(records: Iterable[Record], file: Path) -> None:
    """Writes records, figures with six significant digits; the file is whole at any time."""
    text = "".join(json.dumps(rounded(record)) + "\n" for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text)
    os.replace(fresh, file)


def rounded(value: Any) -> Any:
    """`value` with every float in it at six significant digits; whole numbers stay as they are."""
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def measured(records: Iterable[Record]) -> list[Record]:
    """The records without those of machine and links."""
    return [r for r in records if r["bench"] not in (MACHINE, LINK)]


def select(records: Iterable[Record], **labels: Any) -> list[Record]:
    """The records that have these labels."""
    return [r for r in records if all(r.get(name) == value for name, value in labels.items())]


def one(records: Iterable[Record], **labels: Any) -> Record:
    """The record that has these labels.

    Raises:
        ValueError: there is none, or several.
    """
    found = select(records, **labels)
    if len(found) != 1:
        raise ValueError(f"{len(found)} records have {labels}, one is wanted")
    return found[0]
