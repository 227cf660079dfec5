"""Answer held-out questions of easy-vqa through a batch file, and print the accuracy.

    python examples/evaluate_easy_vqa.py CHECKPOINT [COUNT]

Writes questions.jsonl and answers.jsonl in the current directory; run again, it resumes.
"""

import itertools
import json
import sys
from pathlib import Path

import sphinx_jax
from sphinx_jax.data import easy_vqa

QUESTIONS, ANSWERS = Path("questions.jsonl"), Path("answers.jsonl")


def main(checkpoint: str, count: str = "500") -> None:
    records = easy_vqa.load("test")
    pairs = list(itertools.islice(records.pairs(), int(count)))
    with QUESTIONS.open("w") as file:
        for number, (record, question) in enumerate(pairs):
            image = str(easy_vqa.image_file("test", records.ids[record]))
            file.write(json.dumps({"id": number, "image": image, "prompt": question.text}) + "\n")

    model = sphinx_jax.load(checkpoint)
    for progress in model.answer_file(QUESTIONS, ANSWERS, max_new_tokens=64):
        print(f"{progress.skipped + progress.answered} of {progress.total} answered", end="\r")
    print()

    lines = map(json.loads, ANSWERS.read_text().splitlines())
    answers = {line["id"]: line["answer"] for line in lines}
    accuracies = easy_vqa.accuracy([question for _, question in pairs], [answers[i] for i in range(len(pairs))])
    for kind, accuracy in accuracies.items():
        print(f"{kind}: {accuracy:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
