"""Two questions about one image, the second in the context of the first; answers are streamed.

python examples/two_turns.py CHECKPOINT IMAGE
"""

import sys

import sphinx_jax

QUESTIONS = ("what shape is present?", "what color is it?")


def main(checkpoint: str, image: str) -> None:
    model = sphinx_jax.load(checkpoint)
    chat = model.chat(image, max_new_tokens=64)
    for question in QUESTIONS:
        print(f"> {question}")
        # The image is encoded once, and the second turn prefills only its own tokens.
        for text in chat.stream(question):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
