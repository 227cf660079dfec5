"""Say what is on pictures.

python examples/caption.py CHECKPOINT PICTURE [PICTURE ...]
"""

import sys

import sphinx_jax

QUESTION = "Describe the image briefly."


def main(checkpoint: str, *pictures: str) -> None:
    model = sphinx_jax.load(checkpoint)
    # One batch: every picture with the same question, whatever their sizes.
    captions = model.generate([QUESTION] * len(pictures), pictures, max_new_tokens=64)
    for picture, caption in zip(pictures, captions, strict=True):
        print(f"{picture}: {caption}")


if __name__ == "__main__":
    main(*sys.argv[1:])
