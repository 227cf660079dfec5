"""Two questions about one picture, the second understood from the first; answers appear as they come.

python examples/two_turns.py CHECKPOINT PICTURE
"""

import sys

import sphinx_jax

QUESTIONS = ("what shape is present?", "what color is it?")


def main(checkpoint: str, picture: str) -> None:
    model = sphinx_jax.load(checkpoint)
    chat = model.chat(picture, max_new_tokens=64)
    for question in QUESTIONS:
        print(f"> {question}")
        # The picture was encoded once, and the second turn reads only what the first has not.
        for piece in chat.stream(question):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
