"""Answer held-out questions of easy-vqa through a file, and count the right ones.

    python examples/score_vqa.py CHECKPOINT [HOW_MANY]

Writes questions.jsonl and answers.jsonl in the current directory; started again, it goes on where it was.
"""

import itertools
import json
import sys
from pathlib import Path

import sphinx_jax
from sphinx_jax.data import easy_vqa

QUESTIONS, ANSWERS = Path("questions.jsonl"), Path("answers.jsonl")


def main(checkpoint: str, how_many: str = "500") -> None:
    records = easy_vqa.load("test")
    asked = list(itertools.islice(records.pairs(), int(how_many)))
    with QUESTIONS.open("w") as file:
        for number, (record, question) in enumerate(asked):
            image = str(easy_vqa.image_file("test", records.ids[record]))
            file.write(json.dumps({"id": number, "image": image, "prompt": question.text}) + "\n")

    model = sphinx_jax.load(checkpoint)
    for progress in model.answer_file(QUESTIONS, ANSWERS, max_new_tokens=64):
        done = progress.skipped + progress.answered
    print(f"{done} of {progress.total} answered")

    lines = map(json.loads, ANSWERS.read_text().splitlines())
    answers = {line["id"]: line["answer"] for line in lines}
    scores = easy_vqa.score([question for _, question in asked], [answers[i] for i in range(len(asked))])
    for kind, share in scores.items():
        print(f"{kind}: {share:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
