"""Images of answered questions, for the report: found again by their lines, made small, with boxes drawn on them."""

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from PIL import Image

from sphinx_jax.data.images import load_image
from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.data_folder import DataFolder
from sphinx_jax.evaluation.metrics.grounding import Box, read_box
from sphinx_jax.evaluation.records import Record
from sphinx_jax.evaluation.run import image_path
from sphinx_jax.evaluation.tasks import Task

_SIDE = 360
"""Pixels of an image in the report at most, along its longer side."""


_LOSSLESS_SIDE = 128
"""Pixels up to which an image is kept as it is: enlarged, it would show how JPEG stores it."""


class Images:
    """The images of an evaluation. Those that are cells of a table are read again with its records, once."""

    def __init__(self, data: DataFolder | None, records: Mapping[str, list[Record]] | None = None):
        self._data = data
        self._records = {name: {r.number: r for r in found} for name, found in (records or {}).items()}

    def load(self, task: Task, line: Mapping[str, Any]) -> Image.Image | None:
        """The image of a line; None if there is none, or it cannot be found any more."""
        if line["image"] is None:
            return None
        try:
            if task.name not in self._records and not line["image"].startswith("row "):
                return load_image(image_path(task, self._data, line["image"]))
            if task.name not in self._records:
                self._records[task.name] = {r.number: r for r in task.records(self._data, keep_duplicates=True)[0]}
            image = self._records[task.name][line["n"]].image
            return load_image(image if isinstance(image, bytes) else image_path(task, self._data, str(image)))
        except (UserError, KeyError):
            return None


def figure(image: Image.Image, line: Mapping[str, Any]) -> str:
    """The image as SVG, which needs no other file, with the true box and the answer's where the question has one."""
    width, height = image.size
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    kind = "png" if max(image.size) <= _LOSSLESS_SIDE else "jpeg"
    small.save(data, kind, quality=85)
    content = base64.b64encode(data.getvalue()).decode()
    boxes = "".join(f'<rect class="{whose}" {_rectangle(box)}/>' for whose, box in _boxes(line, width, height))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(str(line["image"]))}">'
        f'<image href="data:image/{kind};base64,{content}" width="{width}" height="{height}"/>{boxes}</svg>'
    )


def _boxes(line: Mapping[str, Any], width: int, height: int) -> list[tuple[str, Box]]:
    """The true box and the answer's, in pixels of the image; both are of a size that the line tells."""
    extra = line["extra"]
    if "box" not in extra:
        return []
    scale = width / extra["width"], height / extra["height"]
    x1, y1, x2, y2 = extra["box"]
    found: list[tuple[str, Box]] = [("truth", (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]))]
    answer = read_box(line.get("answer", ""))
    if answer is not None:
        side, left, above = max(width, height), max(0, height - width) // 2, max(0, width - height) // 2
        x1, y1, x2, y2 = (value * side for value in answer)
        found.append(("answer", (x1 - left, y1 - above, x2 - left, y2 - above)))
    return found


def _rectangle(box: Box) -> str:
    x1, y1, x2, y2 = box
    values = {"x": min(x1, x2), "y": min(y1, y2), "width": abs(x2 - x1), "height": abs(y2 - y1)}
    return " ".join(f'{name}="{value:.1f}"' for name, value in values.items())
