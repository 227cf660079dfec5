"""Fine-tune the shipped model on a labelled image set: images in folders named by their label.

python examples/own_labels.py [FOLDER [OPTIONS]]: turns FOLDER/LABEL/*.png into conversations, trains on nine of ten,
and prints the accuracy on the others. OPTIONS are those of train.py: "--stage lora --lr 1e-2" trains adapters alone.
A FOLDER that does not exist is drawn: 1,200 images of six signs.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sphinx_jax import SHIPPED
from sphinx_jax.cli import common, train

QUESTION = "what does the sign say?"
SIGNS = {
    "stop": ("rectangle", "red"),
    "yield": ("triangle", "red"),
    "caution": ("triangle", "yellow"),
    "park": ("rectangle", "blue"),
    "turn": ("circle", "blue"),
    "go": ("circle", "lime"),
}


def draw(folder: Path, count: int = 200) -> None:
    """`count` images of each sign, of random size, anywhere on a bright background."""
    random = np.random.default_rng(0)
    for label, (shape, colour) in SIGNS.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (64, 64), tuple(random.integers(230, 256, 3).tolist()))
            size = random.integers(12, 32)
            left, top = random.integers(0, 64 - size, 2)
            right, bottom = left + size, top + size
            pen, box = ImageDraw.Draw(image), [left, top, right, bottom]
            if shape == "triangle":
                pen.polygon([(left, bottom), (right, bottom), (left + size // 2, top)], colour)
            elif shape == "circle":
                pen.ellipse(box, colour)
            else:
                pen.rectangle(box, colour)
            image.save(folder / label / f"{number}.png")


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


def main(folder: str = "signs", *options: str) -> int:
    if not Path(folder).exists():
        draw(Path(folder))
    argv = ["--init", str(SHIPPED), "--data", str(describe(Path(folder))), "--out", f"{folder}/run", "--steps", "100"]
    # Grouped by length, each batch would hold one label.
    argv += ["--no-group-by-length", "--max-length", "96", "--batch-size", "32", "--lr", "1e-3", *options]
    return common.run(train.main, argv)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
