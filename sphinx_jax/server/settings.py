"""What an operator decides about a server, apart from the model."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    model_names: tuple[str, ...]
    """Names that requests may use for the model; the first is the one that answers bear."""
    temperature: float = 0.0
    top_p: float = 0.95
    """Used where a request names none."""
    queue: int | None = None
    """Requests that may wait for a batch slot; None: four for each slot."""
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    """Host headers that are served; None: any."""
    public_metrics: bool = False
    max_body_bytes: int = 32 << 20
    image_root: Path | None = None
    """Folder of images that requests may name by file: URLs."""
    drain_seconds: float = 30.0
    """How long requests that run may go on after SIGTERM."""
    adapters: tuple[str, ...] = ()
    """Names of the adapters, each a model of its own to those who ask."""

    @property
    def served_names(self) -> tuple[str, ...]:
        """What requests may name as their model."""
        return self.model_names + self.adapters
