"""Made files of every format, 3 to 12 records each, and the answers that a good model would give.

Nothing in them is of a benchmark: the texts are invented, and the images are plain colours.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

COLOURS = ("red", "green", "blue", "white")


class Made(NamedTuple):
    """A task whose files were made: its truths by question as it is asked, and how its value should come out."""

    answers: dict[str, str]
    count: int


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_image(file: Path, colour: str = "red", size: tuple[int, int] = (12, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def encoded(colour: str) -> str:
    data = io.BytesIO()
    Image.new("RGB", (6, 6), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def unified(data: Path, file: str, records: list[tuple[Any, str, Any]], name: str = "made") -> None:
    """A file of the original program: (question id, question, answer) of each record, two about each image."""
    rows = []
    for i, (question_id, question, truth) in enumerate(records):
        image = f"data/{name}/images/{i // 2}.png"
        write_image(data / image, COLOURS[i // 2 % 4])
        rows.append(
            {
                "image_path": f"./{image}",
                "question": question,
                "question_id": question_id,
                "dataset_name": name,
                "gt_answers": truth,
            }
        )
    write_json(data / "annotations" / file, rows)


def simple(file: str, truths: tuple[str, ...] = ("yes", "a box", "7")) -> Callable[[Path], Made]:
    """A maker of a task in the original program's format whose answers are texts."""

    def make(data: Path) -> Made:
        questions = [f"{file}: what is {i}?" for i in range(len(truths))]
        unified(data, file, [(-1, q, t) for q, t in zip(questions, truths, strict=True)])
        return Made(dict(zip(questions, truths, strict=True)), len(truths))

    return make


def mme(data: Path) -> Made:
    rows = [(i, f"Is it {i}? Please answer yes or no.", "Yes" if i % 2 else "No") for i in range(4)]
    unified(data, "MME_benchmark.json", rows, "MME_count")
    return Made({question: truth for _, question, truth in rows}, 4)


def mme_folder(data: Path) -> Made:
    answers = {}
    root = data / "MME_Benchmark_release_version"
    for subtask, texts in (("count", root / "count"), ("posters", root / "posters" / "questions_answers_YN")):
        images = texts if subtask == "count" else root / subtask / "images"
        for name in ("one", "two"):
            write_image(images / f"{name}.jpg")
            pairs = [(f"Is {name} a {subtask}? Please answer yes or no.", "Yes"), (f"Is {name} not {subtask}?", "No")]
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{name}.txt").write_text("".join(f"{q}\t{a}\n" for q, a in pairs))
            answers |= dict(pairs)
    return Made(answers, 8)


def pope(data: Path) -> Made:
    answers, first = {}, 0
    for kind in ("random", "popular", "adversarial"):
        rows = []
        for i in range(4):
            name, first = f"COCO_val2014_{i // 2:012d}.jpg", first + 1
            write_image(data / "coco" / "val2014" / name)
            question, label = f"Is there a {kind} {i} in the image?", "yes" if i % 2 else "no"
            rows.append({"question_id": i + 1, "image": name, "text": question, "label": label})
            answers[question] = label
        (data / f"coco_pope_{kind}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Made(answers, 12)


def vqa_files(data: Path, questions: str | None, annotations: str, image_ids: list[Any]) -> dict[str, str]:
    """Official questions (if they are wanted) and annotations; the answer of each question."""
    rows, truths, answers = [], [], {}
    for i, image_id in enumerate(image_ids):
        text = f"{annotations}: which {i}?"
        rows.append({"image_id": image_id, "question": text, "question_id": 100 + i})
        ten = [{"answer": f"thing {i}", "answer_id": j} for j in range(9)] + [{"answer": "other", "answer_id": 9}]
        truths.append({"question_id": 100 + i, "answers": ten, "answer_type": "other", "question_type": "which"})
        answers[text] = f"thing {i}"
    if questions:
        write_json(data / questions, {"data_subtype": "val2014", "questions": rows})
    write_json(data / annotations, {"annotations": truths})
    return answers


def vqa(questions: str, annotations: str) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        for i in (1, 2):
            write_image(data / "coco" / "val2014" / f"COCO_val2014_{i:012d}.jpg")
        return Made(vqa_files(data, questions, annotations, [1, 1, 2]), 3)

    return make


def unified_vqa(data: Path) -> Made:
    answers = vqa_files(data, None, "data/okvqa/mscoco_val2014_annotations.json", [1, 1, 2])
    unified(data, "okvqa_val.json", [(100 + i, q, "ignored") for i, q in enumerate(answers)])
    return Made(answers, 3)


def vqa_test(data: Path) -> Made:
    rows = [{"image_id": 7, "question": f"Who is {i}?", "question_id": i} for i in range(3)]
    write_image(data / "test2015" / f"COCO_test2015_{7:012d}.jpg")
    content = {"data_subtype": "test2015", "questions": rows}
    write_json(data / "v2_OpenEnded_mscoco_test-dev2015_questions.json", content)
    return Made({row["question"]: f"person {row['question_id']}" for row in rows}, 3)


def textvqa(data: Path) -> Made:
    rows = [
        {"question": f"What does it say, {i}?", "image_id": "abc", "question_id": i, "answers": [f"text {i}"] * 10}
        for i in range(3)
    ]
    write_image(data / "train_images" / "abc.jpg")
    write_json(data / "TextVQA_0.5.1_val.json", {"data": rows})
    return Made({row["question"]: row["answers"][0] for row in rows}, 3)


def vizwiz(split: str) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        rows = []
        for i in range(3):
            write_image(data / "vizwiz" / split / f"VizWiz_{split}_{i}.jpg")
            row = {"image": f"VizWiz_{split}_{i}.jpg", "question": f"What {split} is this {i}? "}
            answers = [{"answer": f"can {i}", "answer_confidence": "yes"}] * 10
            rows.append(row | ({"answers": answers, "answer_type": "other"} if split == "val" else {}))
        write_json(data / "vizwiz" / f"{split}.json", rows)
        return Made({row["question"]: f"can {i}" for i, row in enumerate(rows)}, 3)

    return make


def gqa(data: Path) -> Made:
    rows = {f"0{i}": {"imageId": "n1", "question": f"Is it {i}?", "answer": "no"} for i in range(3)}
    write_image(data / "gqa" / "images" / "n1.jpg")
    write_json(data / "testdev_balanced_questions.json", rows)
    return Made({row["question"]: "no" for row in rows.values()}, 3)


def docvqa(file: str, answered: bool = True) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        rows = []
        for i in range(3):
            write_image(data / file.split("_")[0] / "documents" / f"{i}.png")
            row = {"questionId": 50 + i, "question": f"{file}: date {i}?", "image": f"documents/{i}.png"}
            rows.append(row | ({"answers": [f"May {i}", f"{i} May"]} if answered else {}))
        write_json(data / file, {"data": rows})
        return Made({row["question"]: f"May {i}" for i, row in enumerate(rows)}, 3)

    return make


def unified_chartqa(data: Path) -> Made:
    first = simple("chartqa_test_human.json", ("12", "blue"))(data)
    second = simple("chartqa_test_augmented.json", ("40", "5%"))(data)
    return Made(first.answers | second.answers, 4)


def chartqa(data: Path) -> Made:
    answers = {}
    for file in ("test_human.json", "test_augmented.json"):
        rows = [{"imgname": "chart.png", "query": f"{file}: {i}?", "label": str(i + 3)} for i in range(3)]
        write_json(data / "test" / file, rows)
        answers |= {row["query"]: row["label"] for row in rows}
    write_image(data / "test" / "png" / "chart.png")
    return Made(answers, 6)


def choice(number: int, suffix: str = "") -> str:
    return f"Question:\nWhich one, {number}?\nChoices:\nA. one\nB. two\nC. three{suffix}"


def unified_choices(file: str, name: str = "made") -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        rows = [("id", choice(i), "ABC"[i]) for i in range(3)]
        unified(data, file, rows, name)
        return Made({question: letter for _, question, letter in rows}, 3)

    return make


def mmmu(data: Path) -> Made:
    rows: list[tuple[Any, str, Any]] = [("Music", choice(i), "ABC"[i]) for i in range(2)]
    rows += [("Music", "How many?", "['4', 'four']")]
    unified(data, "MMMU_val_single.json", rows, "MMMU")
    content = json.loads((data / "annotations" / "MMMU_val_single.json").read_text())
    for i, row in enumerate(content):
        row["image_path"] = f"data/MMMU/images/validation_Art_Theory_{i}.png"
        write_image(data / row["image_path"])
    write_json(data / "annotations" / "MMMU_val_single.json", content)
    return Made({rows[0][1]: "A", rows[1][1]: "B", "How many?": "four"}, 3)


def mmbench(file: str, answered: bool = True) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        columns = ["index", "question", "hint", "A", "B", "C", "answer", "category", "l2-category", "image"]
        rows = [
            ["1", "Which colour?", "Look.", "red", "green", "", "A", "colour", "perception", encoded("red")],
            ["1000001", "Which colour?", "Look.", "green", "red", "", "B", "colour", "perception", "1"],
            ["2", "Which size?", "", "big", "small", "none", "C", "size", "perception", encoded("blue")],
        ]
        used = [i for i, name in enumerate(columns) if answered or name != "answer"]
        table = [columns, *rows]
        data.mkdir(parents=True, exist_ok=True)
        (data / file).write_text("".join("\t".join(row[i] for i in used) + "\n" for row in table))
        asked = [
            "Context:\nLook.\nQuestion:\nWhich colour?\nChoices:\nA. red\nB. green\n",
            "Context:\nLook.\nQuestion:\nWhich colour?\nChoices:\nA. green\nB. red\n",
            "Question:\nWhich size?\nChoices:\nA. big\nB. small\nC. none\n",
        ]
        ask = 'Answer with the option"s letter from the given choices directly.'
        return Made({f"{text}{ask}": row[6] for text, row in zip(asked, rows, strict=True)}, 3)

    return make


def seed(with_video: bool) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        rows, answers = [], {}
        for i, kind in enumerate(("image", "image", "image", "video")):
            options = {f"choice_{letter}": f"{letter} {i}" for letter in "abcd"}
            identity = {"data_id": f"seen_{i}", "data_type": kind, "question_id": str(200 + i), "question_type_id": 1}
            rows.append(options | identity | {"question": f"What is seen, {i}?", "answer": "ABCD"[i]})
            listed = "".join(f"{letter}. {letter.lower()} {i}\n" for letter in "ABCD")
            ask = 'Answer with the option"s letter from the given choices directly.'
            if kind == "image" or with_video:
                answers[f"Question:\nWhat is seen, {i}?\nChoices:\n{listed}{ask}"] = "ABCD"[i]
            name = f"SEED-Bench-image/seen_{i}" if kind == "image" else f"SEED-Bench-video-image/{200 + i}.png"
            if kind == "image" or with_video:
                (data / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), COLOURS[i]).save(data / name, "PNG")
        write_json(data / "SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": rows})
        return Made(answers, len(answers))

    return make


def refcoco(name: str) -> Callable[[Path], Made]:
    def make(data: Path) -> Made:
        rows, answers = [], {}
        for i in range(3):
            # 40 x 20 pixels in a square of 40: 10 pixels of padding above them.
            image = f"data/coco/train2014/{i}.jpg"
            write_image(data / image, size=(40, 20))
            question = f"{name} thing {i}"
            identity = {"image_path": image, "question_id": "height20_width40", "dataset_name": name}
            rows.append(identity | {"question": question, "gt_answers": [4.0 * i, 0, 4.0 * i + 20, 20]})
            answers[question] = f"[{0.1 * i:.3f},0.250,{0.1 * i + 0.5:.3f},0.750]"
        write_json(data / "annotations" / f"{name}.json", rows)
        return Made(answers, 3)

    return make


FORMATS: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "unified exact": ("gqa_testdev", simple("gqa_testdev_balanced.json")),
    "vsr": ("vsr_val", simple("vsr_val.json", ("true", "false", "true"))),
    "ocrvqa": ("ocrvqa_val", simple("ocrvqa_val.json")),
    "ai2d": ("ai2diagram", simple("ai2diagram_test.json")),
    "unified mme": ("mme", mme),
    "mme folder": ("mme", mme_folder),
    "pope": ("pope", pope),
    "vqav2": (
        "vqav2_val",
        vqa("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    ),
    "okvqa": ("okvqa_val", vqa("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")),
    "unified vqa": ("okvqa_val", unified_vqa),
    "vqav2 test": ("vqav2_testdev", vqa_test),
    "textvqa": ("textvqa_val", textvqa),
    "vizwiz": ("vizwiz_val", vizwiz("val")),
    "vizwiz test": ("vizwiz_test", vizwiz("test")),
    "gqa": ("gqa_testdev", gqa),
    "docvqa": ("docvqa_val", docvqa("val_v1.0.json")),
    "docvqa test": ("docvqa_test", docvqa("test_v1.0.json", answered=False)),
    "unified chartqa": ("chartqa_test", unified_chartqa),
    "chartqa": ("chartqa_test", chartqa),
    "scienceqa": ("scienceqa_test", unified_choices("scienceqa_test_img.json")),
    "qbench": ("Qbench_dev", unified_choices("Qbench_dev.json")),
    "mmbench": ("mmbench_dev", mmbench("MMBench_DEV_EN.tsv")),
    "mmbench test": ("mmbench_test", mmbench("MMBench_TEST_EN.tsv", answered=False)),
    "seed images": ("seed_image", seed(with_video=False)),
    "seed": ("seed", seed(with_video=True)),
    "mmmu": ("mmmu_val", mmmu),
    "refcoco": ("refcoco_testA", refcoco("refcoco_testA")),
    "ureader": ("TabFact", simple("test_TabFact.json")),
}
"""Name of a format -> the task that it belongs to, and what makes its files in a folder."""
