"""Records and pictures that cannot be used: passed over, counted and named, up to a share of all."""

import json
import threading
from pathlib import Path

from sphinx_jax.errors import UserError


class BadRecord(UserError):
    """One record that cannot be used, where the others may be: a run passes over it."""

    def __init__(self, where: str, message: str):
        super().__init__(message)
        self.where = where


class SkippedRecords:
    """What was passed over, each record once, however often an epoch comes to it. Threads may share one."""

    def __init__(self, max_share: float):
        """`max_share` of all records (0 to 1) may be passed over."""
        self.total = 0
        """How many records there are, good and bad; whoever reads them counts them here."""
        self._max_share = max_share
        self._reasons: dict[str, str] = {}
        self._file: Path | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, where: str, reason: str) -> None:
        """Pass over the record that stands at `where`. Raises UserError where that makes too many."""
        with self._lock:
            if where in self._reasons:
                return
            self._reasons[where] = reason
            if self._file:
                with self._file.open("a") as file:
                    file.write(_line(where, reason))
            count, first = len(self._reasons), next(iter(self._reasons.values()))
        if count > self._max_share * self.total:
            raise UserError(
                f"at least {count} of {self.total} records cannot be used, more than the share of --max-skipped "
                f"{self._max_share:g}; mend them or raise it; the first is {first}"
            )

    def keep_in(self, file: Path) -> None:
        """Write one JSON line a record to `file` from now on, and take up what an earlier process wrote there."""
        with self._lock:
            for line in file.read_text().splitlines() if file.exists() else []:
                earlier = json.loads(line)
                self._reasons.setdefault(earlier["where"], earlier["reason"])
            if self._reasons:
                whole = file.with_suffix(".partial")
                whole.write_text("".join(_line(*item) for item in self._reasons.items()))
                whole.replace(file)
            self._file = file


def _line(where: str, reason: str) -> str:
    return json.dumps({"where": where, "reason": reason}) + "\n"
