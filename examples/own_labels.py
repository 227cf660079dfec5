"""Fine-tune the shipped model on a labelled image set: images in folders named by their label.

python examples/own_labels.py [FOLDER]: turns FOLDER/LABEL/*.png into conversations, trains on nine of ten, and prints
the accuracy on the others. A FOLDER that does not exist is drawn: 1,600 synthetic images of four new patterns.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sphinx_jax import SHIPPED
from sphinx_jax.cli import common, train

QUESTION = "what pattern is in the image?"
PATTERNS = {
    "rows": lambda x, y: y % 2,
    "columns": lambda x, y: x % 2,
    "checks": lambda x, y: (x + y) % 2,
    "dots": lambda x, y: x * y % 2,
}


def draw(folder: Path, count: int = 400) -> None:
    """Two random colours in each pattern, coarse or fine, shifted at random."""
    random = np.random.default_rng(0)
    for label, pattern in PATTERNS.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            x, y = np.meshgrid(*map(np.arange, random.integers(60, 120, 2)))
            x, y = ((axis + random.integers(0, 40)) // random.integers(8, 14) for axis in (x, y))
            colours = random.integers(0, 256, (2, 3), np.uint8)
            Image.fromarray(colours[pattern(x, y)]).save(folder / label / f"{number}.png")


def describe(folder: Path) -> Path:
    """Writes a conversation about each image, and the data.yaml that names them."""
    records = []
    for image in sorted(folder.glob("*/*.png")):
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": image.parent.name}]
        records.append({"image": str(image), "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(records))
    meta = [{"path": str(folder / "conversations.json"), "type": "image_text"}]
    (folder / "data.yaml").write_text(json.dumps({"META": meta}))  # JSON is YAML too
    return folder / "data.yaml"


def main(folder: str = "patterns") -> int:
    if not Path(folder).exists():
        draw(Path(folder))
    argv = ["--init", str(SHIPPED), "--data", str(describe(Path(folder))), "--out", f"{folder}/run", "--steps", "480"]
    # Grouped by length, each batch would hold one label.
    argv += ["--no-group-by-length", "--max-length", "96", "--batch-size", "32", "--lr", "1e-3"]
    return common.run(train.main, argv)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
