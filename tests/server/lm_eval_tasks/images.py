"""For lm-eval: the images of a question."""

from typing import Any

from PIL import Image


def images(question: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(question["image"])]
