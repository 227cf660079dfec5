"""Caption images.

python examples/caption.py CHECKPOINT IMAGE [IMAGE ...]
"""

import sys

import sphinx_jax

QUESTION = "Describe the image briefly."


def main(checkpoint: str, *images: str) -> None:
    model = sphinx_jax.load(checkpoint)
    # One batch: every image with the same question, whatever its size.
    captions = model.generate([QUESTION] * len(images), images, max_new_tokens=64)
    for image, caption in zip(images, captions, strict=True):
        print(f"{image}: {caption}")


if __name__ == "__main__":
    main(*sys.argv[1:])
