"""Interrupted, resumed, mixed up, scored again: what a folder of answers may and may not become."""

import dataclasses
import itertools
import json
import random

import pytest

from sphinx_jax.data.conversation import Conversation
from sphinx_jax.evaluation import readers
from sphinx_jax.evaluation.lines import answers_file, record_of
from sphinx_jax.evaluation.metrics.exact import ExactMatch
from sphinx_jax.evaluation.records import Record
from sphinx_jax.evaluation.results import result_of
from sphinx_jax.evaluation.tasks import TASKS, Source, Task
from tests.evaluation.made_files import FORMATS, simple, write_image, write_json

COUNT = 12


@pytest.fixture
def many(tmp_path):
    """A task of 12 questions about 6 images: what it asks, and the right answers."""
    simple("gqa_testdev_balanced.json", tuple(f"thing {i}" for i in range(COUNT)))(tmp_path / "data")
    task = TASKS["gqa_testdev"]
    return {task.prompt(record): record.truths[0] for record in task.records(_data(tmp_path))[0]}


def _data(tmp_path):
    from sphinx_jax.evaluation.data_folder import DataFolder

    return DataFolder(tmp_path / "data")


GQA = ("--data", "data", "--tasks", "gqa_testdev", "--out", "out")


def lines_of(tmp_path, name="gqa_testdev"):
    return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]


def entry_of(tmp_path, name="gqa_testdev"):
    return json.loads((tmp_path / "out" / "results.json").read_text())["tasks"][name]


def test_what_ended_before_an_interruption_stays_and_is_not_asked_again(run, fake, many, tmp_path):
    whole = fake(many.get)
    assert run(*GQA)[0] == 0
    expected = lines_of(tmp_path)
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    first = fake(many.get, stop_after=5)
    assert run(*GQA)[0] == 130 and len(lines_of(tmp_path)) == 5
    assert not (tmp_path / "out" / "results.json").exists()
    # A kill leaves half a line.
    with (tmp_path / "out" / "gqa_testdev.jsonl").open("a") as file:
        file.write('{"n": 3, "answer": "thi')
    second = fake(many.get)
    code, out, err = run(*GQA)
    assert code == 0 and "7 questions answered" in err and "5 answered before" in err and "100.00 %" in out
    assert sorted(first.asked + second.asked) == sorted(whole.asked)
    assert sorted(lines_of(tmp_path), key=lambda x: x["n"]) == sorted(expected, key=lambda x: x["n"])
    third = fake(many.get)
    assert run(*GQA)[0] == 0 and third.asked == []


def test_questions_about_one_image_stand_together(run, fake, many, tmp_path):
    rows = json.loads((tmp_path / "data/annotations/gqa_testdev_balanced.json").read_text())
    random.Random(0).shuffle(rows)
    write_json(tmp_path / "data/annotations/gqa_testdev_balanced.json", rows)
    model = fake(many.get)
    assert run(*GQA)[0] == 0
    image_of = {TASKS["gqa_testdev"].pattern.format(row["question"]): row["image_path"] for row in rows}
    changes = sum(image_of[a] != image_of[b] for a, b in itertools.pairwise(model.received))
    assert len(model.received) == COUNT and changes == COUNT // 2 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("checkpoint", "checkpoint_digest fake, not other"),
        ("decoding", "seed 0, not 1"),
        ("prompt", "the question with n 1 was another one"),
        ("prefix", "answer prefix , not  The answer is"),
        ("length", "max_new_tokens 10, not 3"),
        ("question", "the question with n 1 was another one"),
    ],
)
def test_answers_of_another_kind_are_refused_and_stay(change, message, run, fake, many, monkeypatch, tmp_path):
    fake(many.get)
    assert run(*GQA)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    task = TASKS["gqa_testdev"]
    changed = {
        "prompt": {"pattern": "{}\nBe brief."},
        "prefix": {"prefix": " The answer is"},
        "length": {"max_new_tokens": 3},
    }
    if change in changed:
        monkeypatch.setitem(TASKS, task.name, dataclasses.replace(task, **changed[change]))
    if change == "question":
        file = tmp_path / "data/annotations/gqa_testdev_balanced.json"
        file.write_text(file.read_text().replace("what is 0?", "what is it?"))
    model = fake(many.get, checkpoint="other" if change == "checkpoint" else "fake")
    code, _, err = run(*GQA, *(["--original-decoding"] if change == "decoding" else []))
    assert code == 2 and message in err.splitlines()[-1] and "--out out" in err.splitlines()[-1]
    assert model.asked == [] and before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_a_limit_is_raised_later(run, fake, many, tmp_path):
    fake(many.get)
    assert run(*GQA, "--limit", 4)[0] == 0 and entry_of(tmp_path)["count"] == 4
    second = fake(many.get)
    assert run(*GQA)[0] == 0 and len(second.asked) == COUNT - 4 and entry_of(tmp_path)["count"] == COUNT
    third = fake(many.get)
    assert run(*GQA, "--limit", 2)[0] == 0 and third.asked == [] and entry_of(tmp_path)["count"] == COUNT


@pytest.mark.parametrize("name", ["mme folder", "mmbench"])
def test_a_limit_keeps_together_what_is_scored_together(name, run, fake, tmp_path):
    """The first record's question is one of several: both of an image, or all rotations of its options."""
    task, make = FORMATS[name]
    made = make(tmp_path / "data")
    asked = fake(lambda prompt: "").asked
    assert run("--tasks", task, "--data", "data", "--out", "out", "--limit", 1)[0] == 0
    records = TASKS[task].records(_data(tmp_path))[0]
    first = records[0]
    together = (
        [record for record in records if record.extra["index"] % 1_000_000 == first.extra["index"]]
        if name == "mmbench"
        else [record for record in records if record.image == first.image]
    )
    assert 1 < len(asked) == len(together) < made.count


def test_few_failed_images_are_wrong_and_many_are_an_error(run, fake, tmp_path):
    rows, data = [], tmp_path / "data"
    for i in range(200):
        image = f"images/{i}.png"
        write_image(data / image)
        rows.append({"image_path": image, "question": f"q{i}", "question_id": i, "gt_answers": "yes"})
    write_json(data / "gqa_testdev_balanced.json", rows)
    (data / "images/7.png").unlink()
    (data / "images/9.png").write_bytes((data / "images/9.png").read_bytes()[:40])
    fake(lambda _: "yes")
    assert run(*GQA)[0] == 0
    entry = entry_of(tmp_path)
    assert (entry["value"], entry["failed"], entry["count"], entry["unmatched"]) == (99.0, 2, 200, 0)
    errors = {line["n"]: line["error"] for line in lines_of(tmp_path) if "error" in line}
    assert "images/7.png: there is no such image" in errors[8] and "or damaged" in errors[10]
    # One more is above one per cent; those that failed are tried again each time.
    (data / "images/11.png").unlink()
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    code, out, _ = run(*GQA)
    entry = entry_of(tmp_path)
    assert code == 1 and entry["value"] is None and "3 of 200 questions could not be asked" in entry["error"]
    assert "could not be asked" in out
    for number in (7, 9, 11):
        write_image(data / f"images/{number}.png")
    again = fake(lambda _: "yes")
    assert run(*GQA)[0] == 0 and len(again.asked) == 3 and entry_of(tmp_path)["value"] == 100.0


def test_images_cut_short_are_accepted_on_demand(run, fake, monkeypatch, tmp_path):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    simple("gqa_testdev_balanced.json", ("yes",))(tmp_path / "data")
    image = tmp_path / "data/data/made/images/0.png"
    write_image(image, size=(300, 300))
    image.write_bytes(image.read_bytes()[:-40])
    fake(lambda _: "yes")
    assert run(*GQA)[0] == 1 and entry_of(tmp_path)["failed"] == 1
    assert run(*GQA, "--lenient-images")[0] == 0 and entry_of(tmp_path)["value"] == 100.0


def test_duplicates_are_left_out_like_the_originals(run, fake, tmp_path):
    simple("gqa_testdev_balanced.json", ("yes", "no"))(tmp_path / "data")
    file = tmp_path / "data/annotations/gqa_testdev_balanced.json"
    rows = json.loads(file.read_text())
    write_json(file, [rows[0], rows[1], rows[0] | {"gt_answers": "other"}])
    fake(lambda _: "yes")
    code, _, err = run(*GQA)
    assert code == 0 and "1 duplicates left out" in err and entry_of(tmp_path)["count"] == 2
    code, _, err = run(*GQA, "--keep-duplicates")
    assert code == 0 and "left out" not in err
    assert entry_of(tmp_path)["count"] == 3 and entry_of(tmp_path)["value"] == pytest.approx(33.3333)


def test_answers_are_scored_again_without_a_model(run, fake, many, monkeypatch, tmp_path):
    fake(lambda prompt: many[prompt].upper())
    assert run(*GQA)[0] == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", None)
    code, out, _ = run("--score", "out")
    assert code == 0 and "100.00 %" in out and (tmp_path / "out" / "results.json").read_bytes() == before

    class Strict(ExactMatch):
        name = "strict match"

        def score(self, answer, record):
            return super().score(answer, record)._replace(value=float(answer in record.truths))

    changed = dataclasses.replace(TASKS["gqa_testdev"], metric=Strict())
    monkeypatch.setitem(TASKS, "gqa_testdev", changed)
    code, out, _ = run("--score", "out")
    assert code == 0 and "strict match" in out and entry_of(tmp_path)["value"] == 0.0
    assert {line["score"] for line in lines_of(tmp_path)} == {0.0}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"]["answered"] == COUNT
    assert run("--score", "data")[2].splitlines()[-1].startswith("error: data: holds no answers")


def test_scoring_what_was_interrupted_says_so(run, fake, many, tmp_path):
    fake(many.get, stop_after=5)
    assert run(*GQA)[0] == 130
    code, out, _ = run("--score", "out")
    assert code == 0 and f"5 of {COUNT}" in out and entry_of(tmp_path)["missing"] == COUNT - 5


@pytest.mark.parametrize("name", ["unified mme", "pope", "vqav2", "mmbench", "refcoco", "seed", "mmmu", "docvqa"])
def test_lines_in_any_order_have_the_same_value_and_the_records(name, run, fake, tmp_path):
    task_name, make = FORMATS[name]
    make(tmp_path / "data")
    random_answers = random.Random(3)
    fake(lambda _: random_answers.choice(["yes", "no", "A", "B", "May 1", "thing 1", "[0.1,0.25,0.6,0.75]"]))
    assert run("--data", "data", "--tasks", task_name, "--out", "out")[0] == 0
    task, lines = TASKS[task_name], lines_of(tmp_path, task_name)
    expected = result_of(task, lines, len(lines))
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        assert result_of(task, lines, len(lines)) == expected
    rebuilt = {line["n"]: json.dumps(dataclasses.asdict(record_of(line)), sort_keys=True) for line in lines}
    for record in task.records(_data(tmp_path))[0]:
        if not isinstance(record.image, bytes):
            assert rebuilt[record.number] == json.dumps(dataclasses.asdict(record), sort_keys=True)


def test_a_task_is_added_by_a_row_and_a_reader(run, fake, monkeypatch, tmp_path):
    def read_riddles(files):
        riddles = [line.split("|") for line in files[0].read_text().splitlines()]
        return [Record(n, None, question, (answer,)) for n, (question, answer) in enumerate(riddles, start=1)]

    riddles = Task("riddles", (Source(("riddles.txt",), read_riddles),), ExactMatch(), pattern="Riddle: {}")
    monkeypatch.setitem(TASKS, "riddles", riddles)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "riddles.txt").write_text("What has keys?|a piano\nWhat has a bed?|a river\n")
    assert "+ riddles" in run("--list", "--data", "data")[1]
    model = fake({"Riddle: What has keys?": "A piano.", "Riddle: What has a bed?": "a garden"}.get)
    assert run("--data", "data", "--out", "out")[0] == 0
    assert len(model.asked) == 2 and entry_of(tmp_path, "riddles")["value"] == 50.0


def test_an_answers_prefix_is_in_the_prompt(nano, tmp_path):
    """ScienceQA: the tokens are those of the whole text."""
    task = TASKS["scienceqa_test"]
    made = FORMATS["scienceqa"][1](tmp_path)
    question = next(iter(made.answers))
    text = Conversation.from_pairs([(question, None)]).prompt() + " The answer is"
    tokens = nano.request(question, prefix=task.prefix).tokens
    assert tokens == nano.tokenizer.encode(text, bos=True, eos=False)


def test_list_says_what_is_there_and_what_is_missing(run, monkeypatch, tmp_path):
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", None)
    FORMATS["pope"][1](tmp_path / "data")
    code, out, _ = run("--list", "--data", "data")
    rows = dict(line[2:].split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and set(rows) == set(TASKS)
    assert "+ pope" in out and "coco_pope_random.json" in rows["pope"]
    assert "- mme " in out and "no MME_benchmark.json or MME_Benchmark_release_version under data" in rows["mme"]
    assert "+ easy_vqa" in out
    assert "since no --data is given" in run("--list")[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tasks", "mem"), "--tasks mem: no such task; choose from easy_vqa, mme"),
        (("--tasks", "mme"), "mme: no MME_benchmark.json"),
        (("--data", "nowhere"), "--data nowhere: is not a folder"),
        (("--data", "."), "--data .: holds the files of no task"),
        (("--limit", "0"), "--limit must be 1 or more"),
        (("--max-num-seqs", "0"), "--max-num-seqs must be 1 or more"),
        (("--original-decoding", "--temperature", "1"), "exclude each other"),
        (("--report", "--offload"), "leave one out"),
        (("--temperature", "-1"), "temperature must be 0"),
        (("--score", ".", "--data", "."), "--score takes the folder"),
        (("--score", "."), "holds no answers"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(argv, message, run, monkeypatch):
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", None)
    code, _, err = run(*argv)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


def test_a_test_split_has_no_truths(tmp_path):
    """Its answers are written out."""
    FORMATS["vqav2 test"][1](tmp_path)
    file = tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    assert all(record.truths == () for record in readers.read_vqa_questions([file]))
    assert answers_file(tmp_path, TASKS["vqav2_testdev"]).name == "vqav2_testdev.jsonl"
