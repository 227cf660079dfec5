"""Which experts see images: the load of each layer's experts over a sample of an evaluation, read with its answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import sharding
from sphinx_jax.evaluation.lines import answers_file, read_lines
from sphinx_jax.evaluation.report_images import Images
from sphinx_jax.evaluation.tasks import Task
from sphinx_jax.inference.answers_file import write_whole
from sphinx_jax.inference.requests import PreparedImage
from sphinx_jax.sphinx import Sphinx

SAMPLE = 64
"""Questions of each task that are read."""

BATCH = 4

_FILE = "expert_load.json"

Text = tuple[list[int], PreparedImage | None]


def measure(model: Sphinx, tasks: Sequence[Task], out: Path, images: Images) -> None:
    """Count over a sample of the answers in `out` how many tokens each expert gets, and write the counts there.

    Of several processes the primary one has the answers; all call this. Raises UserError for a model in host memory.
    """
    texts = sharding.broadcast_from_primary(lambda: sample(model, tasks, out, images))
    total: Int[np.ndarray, "layers kinds experts"] | int = 0
    for with_images in (True, False):
        chosen = [text for text in texts if (text[1] is not None) == with_images]
        for first in range(0, len(chosen), BATCH):
            batch = chosen[first : first + BATCH]
            pixels = [image for _, image in batch if image is not None] if with_images else None
            total = total + model.engine.expert_load([tokens for tokens, _ in batch], pixels)
    if texts and sharding.is_primary_process():
        content = {"questions": len(texts), "layers": np.asarray(total).tolist()}
        write_whole(out / _FILE, json.dumps(content).encode())


def sample(model: Sphinx, tasks: Sequence[Task], out: Path, images: Images) -> list[Text]:
    """Prompt and answer of SAMPLE questions of each task, evenly spread over it, with their images."""
    texts = []
    for task in tasks:
        lines = [line for line in read_lines(answers_file(out, task)) if "answer" in line]
        for i in np.linspace(0, len(lines) - 1, min(SAMPLE, len(lines)), dtype=int):
            texts.append(_text(model, task, lines[i], images))
    return texts


def _text(model: Sphinx, task: Task, line: Mapping[str, Any], images: Images) -> Text:
    found = images.load(task, line)
    image = None if found is None else model.prepare_image(found)
    request = model.request(line["prompt"], image, prefix=task.prefix)
    return [*request.tokens, *model.tokenizer.encode_segment(line["answer"])], image


def read(out: Path) -> tuple[int, Float[np.ndarray, "layers kinds experts"]] | None:
    """Questions, and each expert's fraction of the assignments of image and text tokens; None if not measured."""
    if not (out / _FILE).is_file():
        return None
    content = json.loads((out / _FILE).read_bytes())
    counts = np.asarray(content["layers"], float)
    return content["questions"], counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
