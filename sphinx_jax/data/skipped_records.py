"""Records and images that cannot be used: skipped, counted and logged, up to a fraction of all."""

import json
import threading
from pathlib import Path

from sphinx_jax.errors import UserError


class BadRecord(UserError):
    """One record that cannot be used. A run skips it, because the others may be fine."""

    def __init__(self, where: str, message: str):
        super().__init__(message)
        self.where = where


class SkippedRecords:
    """The skipped records, each once, however many epochs meet it. Thread-safe."""

    def __init__(self, max_fraction: float):
        """At most `max_fraction` of all records (0 to 1) may be skipped."""
        self.total = 0
        """Number of records, good and bad; the reader of each file adds its own."""
        self._max_fraction = max_fraction
        self._reasons: dict[str, str] = {}
        self._file: Path | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, where: str, reason: str) -> None:
        """Skip the record at location `where`. Raises UserError if too many are skipped."""
        with self._lock:
            if where in self._reasons:
                return
            self._reasons[where] = reason
            if self._file:
                with self._file.open("a") as file:
                    file.write(_line(where, reason))
            count, first = len(self._reasons), next(iter(self._reasons.values()))
        if count > self._max_fraction * self.total:
            raise UserError(
                f"at least {count} of {self.total} records cannot be used, more than the fraction --max-skipped "
                f"{self._max_fraction:g}; fix them or raise it; the first is {first}"
            )

    def log_to(self, file: Path) -> None:
        """Append one JSON line per skipped record to `file` from now on. Records already in it count as skipped."""
        with self._lock:
            for line in file.read_text().splitlines() if file.exists() else []:
                earlier = json.loads(line)
                self._reasons.setdefault(earlier["where"], earlier["reason"])
            if self._reasons:
                partial = file.with_suffix(".partial")
                partial.write_text("".join(_line(*item) for item in self._reasons.items()))
                partial.replace(file)
            self._file = file


def _line(where: str, reason: str) -> str:
    return json.dumps({"where": where, "reason": reason}) + "\n"
