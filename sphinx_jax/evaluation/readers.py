"""Records from the files of benchmarks whose answers are texts, yes or no, or boxes.

A reader takes the files of a task, all of which exist, and returns its records. It raises UserError on what it cannot
read, with the file and the record. Formats: the original program's ("unified": a list of {"image_path", "question",
"question_id", "dataset_name", "gt_answers"}), and those of the benchmarks' own releases. Readers of questions with
options are in `choice_readers`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_jax.data import easy_vqa
from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.fields import Fields, objects, read_json, read_text
from sphinx_jax.evaluation.records import Record

Reader = Callable[[Sequence[Path]], list[Record]]

Extra = Callable[[Fields], Mapping[str, Any]]


def read_easy_vqa(files: Sequence[Path]) -> list[Record]:
    """The test set of easy-vqa, from its package."""
    test = easy_vqa.load("test")
    asked = [(str(easy_vqa.image_file("test", test.ids[i])), question) for i, question in test.pairs()]
    return [
        Record(number, image, question.text, (question.answer,))
        for number, (image, question) in enumerate(asked, start=1)
    ]


# The original program's format


def unified(file: Path, extra: Extra | None = None, first: int = 1) -> list[Record]:
    """The records of a file of the original program; `extra` makes their extras, `first` is the number of the first."""
    records = []
    for number, fields in enumerate(objects(read_json(file), str(file)), start=first):
        truth = fields.get("gt_answers", (str, int, float, list), "the true answer")
        truths = fields.answers("gt_answers") if isinstance(truth, list) else (fields.answer("gt_answers"),)
        record = Record(
            number,
            fields.text("image_path"),
            # Empty for some open questions of MMMU.
            fields.get("question", str, "a text"),
            truths,
            fields.id("question_id") if "question_id" in fields else None,
            extra(fields) if extra else {},
        )
        records.append(record)
    return records


def read_unified(files: Sequence[Path]) -> list[Record]:
    return unified(files[0])


def read_unified_mme(files: Sequence[Path]) -> list[Record]:
    """`dataset_name` is "MME_" and the subtask."""
    return unified(files[0], lambda fields: {"subtask": fields.text("dataset_name").removeprefix("MME_")})


def read_unified_chartqa(files: Sequence[Path]) -> list[Record]:
    """The human questions, and then the augmented ones."""
    human, augmented = files
    records = unified(human, lambda _: {"split": "human"})
    return records + unified(augmented, lambda _: {"split": "augmented"}, first=len(records) + 1)


def read_unified_grounding(files: Sequence[Path]) -> list[Record]:
    """`question_id` holds the image's size, "height480_width640", and the answer is a box in pixels."""

    def extra(fields: Fields) -> dict[str, Any]:
        size = re.fullmatch(r"height(\d+)_width(\d+)", str(fields.id("question_id")))
        box = fields.get("gt_answers", list, "a box of four numbers")
        if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise fields.wrong("gt_answers", "a box of four numbers")
        if size is None:
            raise fields.wrong("question_id", "the image's size, as in height480_width640")
        return {"box": tuple(map(float, box)), "width": int(size[2]), "height": int(size[1])}

    records = unified(files[0], extra)
    return [dataclasses.replace(record, truths=(json.dumps(record.extra["box"]),)) for record in records]


# VQA: ten answers a question


def read_unified_vqa(files: Sequence[Path]) -> list[Record]:
    """Questions and images of the original program's file, the ten answers of the official annotations."""
    questions, annotations = files
    return _with_annotations(unified(questions), annotations)


def read_vqa(files: Sequence[Path]) -> list[Record]:
    """Official questions and annotations (https://visualqa.org/download.html)."""
    questions, annotations = files
    return _with_annotations(read_vqa_questions([questions]), annotations)


def read_vqa_questions(files: Sequence[Path]) -> list[Record]:
    """Official questions without answers, as of a test split. Image ids are COCO's, or names of files."""
    top = Fields(read_json(files[0]), str(files[0]))
    records = []
    for number, fields in enumerate(top.objects("questions"), start=1):
        image = fields.id("image_id")
        if isinstance(image, int):
            image = f"COCO_{top.text('data_subtype')}_{image:012d}.jpg"
        name = image if Path(image).suffix else f"{image}.jpg"
        records.append(Record(number, name, fields.text("question"), (), fields.id("question_id")))
    return records


def _with_annotations(records: list[Record], file: Path) -> list[Record]:
    """The records with the answers that the file has for their question ids."""
    annotations: dict[str | int, tuple[tuple[str, ...], dict[str, str]]] = {}
    for fields in Fields(read_json(file), str(file)).objects("annotations"):
        kinds = {name: fields.text(name) for name in ("answer_type", "question_type") if name in fields}
        annotations[fields.id("question_id")] = fields.answers("answers"), kinds
    found = []
    for record in records:
        if record.question_id not in annotations:
            raise UserError(
                f"{file}: has no answers for the question_id {record.question_id!r} of record {record.number}; give "
                "questions and annotations of one split"
            )
        truths, kinds = annotations[record.question_id]
        found.append(dataclasses.replace(record, truths=truths, extra=kinds))
    return found


def read_textvqa(files: Sequence[Path]) -> list[Record]:
    """TextVQA's own file (https://textvqa.org/dataset), such as TextVQA_0.5.1_val.json."""
    return [
        Record(
            number,
            f"{fields.text('image_id')}.jpg",
            fields.text("question"),
            fields.answers("answers"),
            fields.id("question_id"),
        )
        for number, fields in enumerate(Fields(read_json(files[0]), str(files[0])).objects("data"), start=1)
    ]


def read_vizwiz(files: Sequence[Path]) -> list[Record]:
    """VizWiz's own file (https://vizwiz.org/tasks-and-datasets/vqa); a test split has no answers. The image is the id,
    as in its submissions."""
    records = []
    for number, fields in enumerate(objects(read_json(files[0]), str(files[0])), start=1):
        truths = fields.answers("answers") if "answers" in fields else ()
        kinds = {"answer_type": fields.text("answer_type")} if "answer_type" in fields else {}
        image = fields.text("image")
        records.append(Record(number, image, fields.text("question"), truths, image, kinds))
    return records


# Others


def read_gqa(files: Sequence[Path]) -> list[Record]:
    """GQA's own file (https://cs.stanford.edu/people/dorarad/gqa), an object of questions by their id."""
    questions = Fields(read_json(files[0]), str(files[0]))
    records = []
    for number, (name, value) in enumerate(questions.items(), start=1):
        fields = Fields(value, f"{files[0]}: question {name}")
        image = f"{fields.id('imageId')}.jpg"
        records.append(Record(number, image, fields.text("question"), (fields.answer("answer"),), name))
    return records


def read_chartqa(files: Sequence[Path]) -> list[Record]:
    """ChartQA's own files, test_human.json and test_augmented.json (https://github.com/vis-nlp/ChartQA)."""
    records = []
    for file, split in zip(files, ("human", "augmented"), strict=True):
        for fields in objects(read_json(file), str(file)):
            image, truths = fields.text("imgname"), (fields.answer("label"),)
            records.append(
                Record(len(records) + 1, image, fields.text("query"), truths, extra={"split": split}),
            )
    return records


def read_docvqa(files: Sequence[Path]) -> list[Record]:
    """DocVQA's own file (https://rrc.cvc.uab.es/?ch=17), such as val_v1.0.json; a test split has no answers."""
    records = []
    for number, fields in enumerate(Fields(read_json(files[0]), str(files[0])).objects("data"), start=1):
        truths = fields.answers("answers") if "answers" in fields else ()
        image, question = fields.text("image"), fields.text("question")
        records.append(Record(number, image, question, truths, fields.id("questionId")))
    return records


def read_pope(files: Sequence[Path]) -> list[Record]:
    """POPE's files of JSON lines (https://github.com/AoiDragon/POPE): random, popular, adversarial."""
    records = []
    for file, split in zip(files, ("random", "popular", "adversarial"), strict=True):
        before = len(records)
        for line, text in enumerate(read_text(file).splitlines(), start=1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}: line {line}: is not JSON ({error}); get the file again") from error
            fields = Fields(value, f"{file}: line {line}")
            label = fields.text("label").lower()
            if label not in ("yes", "no"):
                raise fields.wrong("label", "yes or no")
            name, question = fields.text("image"), fields.text("text")
            number, question_id = len(records) + 1, fields.id("question_id")
            records.append(Record(number, name, question, (label,), question_id, {"split": split}))
        if len(records) == before:
            raise UserError(f"{file}: holds no questions; get the file again")
    return records


def read_mme(files: Sequence[Path]) -> list[Record]:
    """MME's release: a folder a subtask, with a .txt of "question<TAB>answer" lines for each image.

    Both are in one folder, or in its folders `images` and `questions_answers_YN`.
    """
    records = []
    for folder in sorted(path for path in files[0].iterdir() if path.is_dir()):
        divided = (folder / "questions_answers_YN").is_dir()
        images = {path.stem: path for path in _files(folder / "images" if divided else folder) if path.suffix != ".txt"}
        texts = _files(folder / "questions_answers_YN" if divided else folder)
        for file in (path for path in texts if path.suffix == ".txt"):
            if file.stem not in images:
                raise UserError(f"{file}: has no image of the name {file.stem} next to it; unpack the release again")
            for line, text in enumerate(read_text(file).splitlines(), start=1):
                if not text.strip():
                    continue
                question, _, answer = (part.strip() for part in text.rpartition("\t"))
                if not question or answer.lower() not in ("yes", "no"):
                    raise UserError(f"{file}: line {line}: must be a question, a tab, and Yes or No, got {text!r:.80}")
                image = str(images[file.stem].relative_to(files[0].parent))
                records.append(
                    Record(len(records) + 1, image, question, (answer,), file.stem, {"subtask": folder.name})
                )
    if not records:
        raise UserError(f"{files[0]}: holds no folders with questions; unpack MME's release there")
    return records


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
