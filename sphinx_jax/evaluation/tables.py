"""The result of a task, and results as tables: for results.json, for the terminal and in Markdown."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table

_MOST_PARTS = 4

COLUMNS = ("task", "metric", "value", "original", "questions", "unmatched", "failed", "parts")


@dataclasses.dataclass(frozen=True)
class Result:
    """The value of a task: in per cent, or in points as of MME."""

    metric: str | None
    unit: str
    value: float | None
    count: int
    """Questions that the value is over."""
    unmatched: int
    """Answers that could not be read, which are wrong."""
    failed: int
    """Questions that could not be asked, which are wrong too."""
    parts: dict[str, float]
    original: float | None
    """The value by the original program's own scorer, where it differs in its definition."""
    missing: int = 0
    """Questions that have not ended yet."""
    error: str | None = None
    """Why there is no value."""

    def as_json(self) -> dict[str, Any]:
        """The entry of results.json."""
        entry = dataclasses.asdict(self)
        return {key: value for key, value in entry.items() if key not in ("missing", "error") or value}


def cells(name: str, result: Result) -> tuple[str, ...]:
    """The cells of a task's row."""
    unanswered = f" of {result.count + result.missing:,}" if result.missing else ""
    return (
        name,
        result.metric or "written out",
        in_unit(result.value, result.unit),
        in_unit(result.original, result.unit),
        f"{result.count:,}{unanswered}",
        f"{result.unmatched:,}",
        f"{result.failed:,}",
        result.error or parts(result),
    )


def in_unit(value: float | None, unit: str) -> str:
    """A value with its unit; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.2f} %" if unit == "%" else f"{value:,.1f}"


def parts(result: Result) -> str:
    """The first parts of a value; results.json has all."""
    shown = [f"{name} {value:.2f}" for name, value in list(result.parts.items())[:_MOST_PARTS]]
    more = len(result.parts) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more > 0 else "")


def terminal_table(results: Mapping[str, Result]) -> Table:
    """The results as a table of rich."""
    table = Table(header_style="", box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("task", "metric", "parts") else "right")
    for name, result in results.items():
        table.add_row(*map(_escape, cells(name, result)), style="red" if result.error else "")
    return table


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def markdown_table(results: Mapping[str, Result]) -> str:
    """The results as a table in Markdown."""
    numeric = ["---" if column in ("task", "metric", "parts") else "---:" for column in COLUMNS]
    rows = [COLUMNS, numeric, *(cells(name, result) for name, result in results.items())]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n" for row in rows
    )
