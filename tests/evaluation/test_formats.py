"""Made files of every format, from the files to the value; and what is said of files that are damaged."""

import json

import pytest

from sphinx_jax.errors import UserError
from sphinx_jax.evaluation.data_folder import DataFolder
from sphinx_jax.evaluation.tasks import TASKS
from tests.evaluation.made_files import FORMATS

every_format = pytest.mark.parametrize("name", FORMATS)

FULL = {"unified mme": 200.0, "mme folder": 400.0}
"""Points of MME; all else is per cent."""


def prompts(task, made):
    """What the model is asked -> the right answer."""
    return {task.pattern.format(question) + task.prefix: answer for question, answer in made.answers.items()}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["tasks"]


@every_format
def test_right_answers_have_the_best_value(name, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    task, made = TASKS[task_name], make(tmp_path / "data")
    right = prompts(task, made)
    model = fake(lambda prompt: right[prompt])
    code, out, err = run("--data", "data", "--tasks", task_name, "--out", "out")
    assert code == 0, err
    assert sorted(model.asked) == sorted(right) and len(right) == made.count
    entry = results_of(tmp_path / "out")[task_name]
    assert (entry["count"], entry["failed"], entry["unmatched"]) == (made.count, 0, 0)
    assert entry["value"] == (None if task.metric is None else FULL.get(name, 100.0)), entry
    assert task_name in out
    lines = [json.loads(line) for line in (tmp_path / "out" / f"{task_name}.jsonl").read_text().splitlines()]
    keys = {"n", "id", "image", "question", "prompt", "truth", "extra"}
    keys |= {"answer", "score", "matched", "tokens", "logprob", "finish"}
    assert all(set(line) == keys for line in lines)


@every_format
def test_other_answers_have_a_worse_one(name, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    make(tmp_path / "data")
    fake(lambda _: "qwerty")
    assert run("--data", "data", "--tasks", task_name, "--out", "out")[0] == 0
    entry = results_of(tmp_path / "out")[task_name]
    if TASKS[task_name].metric is not None:
        # POPE reads everything but a denial as yes.
        assert entry["value"] == (pytest.approx(66.6667, abs=1e-3) if name == "pope" else 0.0)
    if "options" in name or name in ("scienceqa", "qbench", "mmbench", "refcoco", "mme folder"):
        assert entry["unmatched"] == entry["count"]


SUBMISSIONS = {
    "vqav2 test": [{"question_id": i, "answer": f"person {i}"} for i in range(3)],
    "vizwiz test": [{"image": f"VizWiz_test_{i}.jpg", "answer": f"can {i}"} for i in range(3)],
    "docvqa test": [{"questionId": 50 + i, "answer": f"May {i}"} for i in range(3)],
}


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_submissions_of_test_splits(name, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    right = prompts(TASKS[task_name], make(tmp_path / "data"))
    fake(lambda prompt: right[prompt])
    assert run("--data", "data", "--tasks", task_name, "--out", "out")[0] == 0
    assert json.loads((tmp_path / "out" / f"{task_name}_submission.json").read_text()) == SUBMISSIONS[name]


def test_submission_of_mmbench(run, fake, tmp_path):
    FORMATS["mmbench test"][1](tmp_path / "data")
    fake(lambda prompt: "B. green" if "A. red" in prompt else "C")
    assert run("--data", "data", "--tasks", "mmbench_test", "--out", "out")[0] == 0
    rows = (tmp_path / "out" / "mmbench_test_submission.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["index", "question", "A", "B", "C", "prediction"]
    assert [(row.split("\t")[0], row.split("\t")[-1]) for row in rows[1:]] == [
        ("1", "B. green"),
        ("1000001", "C"),
        ("2", "C"),
    ]


def edited_json(change):
    def edit(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


def text(old, new):
    return lambda file: file.write_text(file.read_text().replace(old, new, 1))


def second(**fields):
    """Set fields of the second record of a list, or remove those that are None."""

    def change(content):
        rows = content if isinstance(content, list) else next(v for v in content.values() if isinstance(v, list))
        rows[1] = {key: value for key, value in (rows[1] | fields).items() if value is not None}

    return edited_json(change)


MALFORMED = [
    ("unified exact", "annotations/gqa_testdev_balanced.json", text("[", "{"), "is not JSON"),
    ("unified exact", "annotations/gqa_testdev_balanced.json", second(question=None), 'record 2: "question" must be'),
    ("unified exact", "annotations/gqa_testdev_balanced.json", second(image_path=7), 'record 2: "image_path" must be'),
    ("unified exact", "annotations/gqa_testdev_balanced.json", second(gt_answers=None), 'record 2: "gt_answers" must'),
    ("unified exact", "annotations/gqa_testdev_balanced.json", lambda f: f.write_text("[]"), "list of records"),
    ("unified exact", "annotations/gqa_testdev_balanced.json", lambda f: f.write_bytes(b'["\xff"]'), "not UTF-8"),
    (
        "unified exact",
        "annotations/gqa_testdev_balanced.json",
        lambda f: f.write_text("[1]"),
        "record 1: must be an ob",
    ),
    ("unified mme", "annotations/MME_benchmark.json", second(dataset_name=None), 'record 2: "dataset_name" must be'),
    (
        "mme folder",
        "MME_Benchmark_release_version/count/one.txt",
        text("\tNo", "\tmaybe"),
        "line 2: must be a question",
    ),
    ("mme folder", "MME_Benchmark_release_version/count/one.jpg", lambda f: f.unlink(), "has no image of the name one"),
    ("pope", "coco_pope_popular.json", text('"label": "yes"', '"label": "perhaps"'), 'line 2: "label" must be yes or'),
    ("pope", "coco_pope_popular.json", text('{"question_id": 2', '{"question_id" 2'), "line 2: is not JSON"),
    ("pope", "coco_pope_popular.json", lambda f: f.write_text("\n"), "holds no questions"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", second(image_id=[1]), 'record 2: "image_id" must be'),
    ("vqav2", "v2_mscoco_val2014_annotations.json", second(answers=[]), 'record 2: "answers" must be a list'),
    ("vqav2", "v2_mscoco_val2014_annotations.json", second(question_id=7), "no answers for the question_id 101"),
    ("unified vqa", "data/okvqa/mscoco_val2014_annotations.json", second(answers=None), 'record 2: "answers" must be'),
    ("textvqa", "TextVQA_0.5.1_val.json", second(image_id=None), 'record 2: "image_id" must be'),
    ("vizwiz", "vizwiz/val.json", second(image=3), 'record 2: "image" must be a text'),
    ("gqa", "testdev_balanced_questions.json", text('"imageId": "n1", ', ""), 'question 00: "imageId" must be'),
    ("docvqa", "val_v1.0.json", second(questionId=None), 'record 2: "questionId" must be'),
    ("chartqa", "test/test_augmented.json", second(label=None), 'record 2: "label" must be'),
    ("scienceqa", "annotations/scienceqa_test_img.json", second(gt_answers="F"), "record 2: the answer 'F' is none of"),
    ("mmmu", "annotations/MMMU_val_single.json", second(image_path="x.png"), 'record 2: "image_path" must end in'),
    ("mmbench", "MMBench_DEV_EN.tsv", text("\tB\tcolour", "\tD\tcolour"), 'row 2: "answer" must be one of A, B'),
    ("mmbench", "MMBench_DEV_EN.tsv", text("1000001", "x"), 'row 2: "index" must be a whole number'),
    ("mmbench", "MMBench_DEV_EN.tsv", text("perception\t1", "perception\t!"), 'row 2: "image" must be an image in b'),
    ("seed", "SEED-Bench.json", second(answer="E"), 'record 2: "answer" must be A, B, C or D'),
    ("seed", "SEED-Bench.json", second(question_type_id=5), 'record 2: "question_type_id" must be an id'),
    ("refcoco", "annotations/refcoco_testA.json", second(gt_answers=[1, 2, 3]), 'record 2: "gt_answers" must be a box'),
    ("refcoco", "annotations/refcoco_testA.json", second(question_id="x"), 'record 2: "question_id" must be the image'),
]


@pytest.mark.parametrize(("name", "file", "edit", "message"), MALFORMED)
def test_damaged_files_are_one_error_with_the_record(name, file, edit, message, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    make(tmp_path / "data")
    edit(tmp_path / "data" / file)
    model = fake(lambda _: "")
    code, _, err = run("--data", "data", "--tasks", task_name, "--out", "out")
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, err
    assert (tmp_path / "data" / file).stem in last
    assert model.asked == [] and not (tmp_path / "out").exists()


def test_images_are_found_in_every_layout(tmp_path):
    for name in ("a/b.png", "data/GQA/images/c.png", "val2014/d.png", "gqa/images/E.PNG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = DataFolder(tmp_path)
    assert data.image("a/b.png") == tmp_path / "a/b.png"
    assert data.image("./data/gqa/images/c.png") == tmp_path / "data/GQA/images/c.png"
    assert data.image("somewhere/d.png", ("val2014",)) == tmp_path / "val2014/d.png"
    assert data.image("data/GQA/images/e.png") == tmp_path / "gqa/images/E.PNG"
    assert data.image(str(tmp_path / "a" / "b.png")) == tmp_path / "a" / "b.png"
    for name in ("missing.png", "a", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="there is no such image under"):
            data.image(name, ("val2014",))
