"""The table of tasks: a row for each benchmark. To add one, add a row, and a reader if its format is new.

Patterns, prefixes and lengths of answers are those that SPHINX-MoE was evaluated with, as far as it was.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from sphinx_jax.errors import UserError
from sphinx_jax.evaluation import choice_readers, readers
from sphinx_jax.evaluation.data_folder import DataFolder
from sphinx_jax.evaluation.metrics.anls import Anls
from sphinx_jax.evaluation.metrics.exact import ExactMatch
from sphinx_jax.evaluation.metrics.grounding import BoxIou
from sphinx_jax.evaluation.metrics.letters import LetterAccuracy, SeedAccuracy
from sphinx_jax.evaluation.metrics.mmbench import ROTATIONS, MMBenchCircular
from sphinx_jax.evaluation.metrics.mme import Mme
from sphinx_jax.evaluation.metrics.mmmu import Mmmu
from sphinx_jax.evaluation.metrics.pope import Pope
from sphinx_jax.evaluation.metrics.relaxed import RelaxedAccuracy
from sphinx_jax.evaluation.metrics.vqa import EvalAIVqaAccuracy, VqaAccuracy
from sphinx_jax.evaluation.readers import Reader
from sphinx_jax.evaluation.records import Metric, Record

PLAIN = "{}"
SHORT_ANSWER = "{}\nAnswer the question using a single word or phrase."
VIZWIZ = (
    "{} When the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
GROUNDING = "Please provide the bounding box coordinate of the region this sentence describes: {}."

STOP = "###"
"""The original stops at these characters anywhere; the template's own end signal has a newline before them."""

SubmissionFormat = Literal["vqa", "vizwiz", "docvqa", "mmbench", "unified"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Files that hold a task together, and what reads them."""

    files: tuple[str, ...]
    """Names below --data; a folder is a name as well."""
    read: Reader


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark: where its questions are, how they are asked, how answers are scored."""

    name: str
    sources: tuple[Source, ...]
    """The first whose files exist is read."""
    metric: Metric | None
    """None: the answers are written out, and scored elsewhere."""
    pattern: str = SHORT_ANSWER
    """The question of the human turn; "{}" is the record's."""
    prefix: str = ""
    """How the answer begins; the model continues it."""
    max_new_tokens: int = 10
    image_folders: tuple[str, ...] = ()
    """Where images are whose names have no folder."""
    home: str = ""
    """Where the files come from."""
    submission: SubmissionFormat | None = None
    """The file that the benchmark's server takes."""
    scored_together: Callable[[Record], Hashable] | None = None
    """What records have in common that count as one; None: each counts alone."""

    def prompt(self, record: Record) -> str:
        """The text of the human turn."""
        return self.pattern.format(record.question)

    def source(self, data: DataFolder | None) -> tuple[Source, list[Path]] | None:
        """The source whose files exist, and these; None if there is none."""
        for source in self.sources:
            paths = [data.find(name) if data else None for name in source.files]
            found = [path for path in paths if path is not None]
            if len(found) == len(source.files):
                return source, found
        return None

    def records(self, data: DataFolder | None, keep_duplicates: bool = False) -> tuple[list[Record], int]:
        """The records, and how many duplicates were dropped: the original keeps the first record of an image, question
        and id. Raises UserError on missing or malformed files."""
        found = self.source(data)
        if found is None:
            raise UserError(f"{self.name}: {self.missing(data)}")
        source, paths = found
        records = source.read(paths)
        kept = records if keep_duplicates else _without_duplicates(records)
        return kept, len(records) - len(kept)

    def first(self, records: Sequence[Record], limit: int | None) -> list[Record]:
        """The first records, and all that are scored together with one of them, in their order."""
        if limit is None or self.scored_together is None:
            return list(records[:limit])
        kept = {self.scored_together(record) for record in records[:limit]}
        return [record for record in records if self.scored_together(record) in kept]

    def missing(self, data: DataFolder | None) -> str:
        """Which files are not there."""
        choices = " or ".join(" and ".join(source.files) for source in self.sources if source.files)
        where = f"under {data.root}" if data else "since no --data is given"
        return f"no {choices} {where}; {self.home}"


def _without_duplicates(records: Iterable[Record]) -> list[Record]:
    first: dict[tuple, Record] = {}
    for record in records:
        first.setdefault((record.image, record.question, record.question_id, record.extra.get("split")), record)
    return list(first.values())


_COCO = ("coco/val2014", "val2014", "coco/train2014", "train2014", "coco/test2015", "test2015", "coco/trainval2017")
_ORIGINAL = "the original program's, from LLaMA2-Accessory's accessory/eval_mm/annotations"


def _question_of_rotations(record: Record) -> int:
    return record.extra["index"] % ROTATIONS


def _image_of_subtask(record: Record) -> Hashable:
    return record.extra["subtask"], record.image


def _files(read: Reader, *names: str) -> Source:
    return Source(names, read)


_EASY_VQA = Task(
    "easy_vqa",
    (_files(readers.read_easy_vqa),),
    ExactMatch(),
    pattern=PLAIN,
    home="pip install 'sphinx-jax[demo]'",
)

_MME = Task(
    "mme",
    (
        _files(readers.read_unified_mme, "MME_benchmark.json"),
        _files(readers.read_mme, "MME_Benchmark_release_version"),
    ),
    Mme(),
    scored_together=_image_of_subtask,
    home="github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation",
)

_POPE = Task(
    "pope",
    (
        _files(readers.read_pope, *(f"coco_pope_{kind}.json" for kind in ("random", "popular", "adversarial"))),
        _files(readers.read_pope, *(f"coco/coco_pope_{kind}.json" for kind in ("random", "popular", "adversarial"))),
    ),
    Pope(),
    image_folders=_COCO,
    home="github.com/AoiDragon/POPE, output/coco; images: COCO val2014",
)

_VQA = (
    Task(
        "vqav2_val",
        (
            _files(readers.read_unified_vqa, "vqav2_val.json", "v2_mscoco_val2014_annotations.json"),
            _files(
                readers.read_vqa, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
            ),
        ),
        VqaAccuracy(),
        image_folders=_COCO,
        home="visualqa.org/download.html",
    ),
    Task(
        "vqav2_testdev",
        (_files(readers.read_vqa_questions, "v2_OpenEnded_mscoco_test-dev2015_questions.json"),),
        None,
        image_folders=_COCO,
        home="visualqa.org/download.html",
        submission="vqa",
    ),
    Task(
        "okvqa_val",
        (
            _files(readers.read_unified_vqa, "okvqa_val.json", "mscoco_val2014_annotations.json"),
            _files(readers.read_vqa, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
        ),
        VqaAccuracy(),
        image_folders=_COCO,
        home="okvqa.allenai.org/download.html",
    ),
    Task(
        "textvqa_val",
        (
            _files(readers.read_unified_vqa, "textvqa_val.json", "textvqa_val_annotations.json"),
            _files(readers.read_vqa, "textvqa_val_questions.json", "textvqa_val_annotations.json"),
            _files(readers.read_textvqa, "TextVQA_0.5.1_val.json"),
        ),
        EvalAIVqaAccuracy(),
        image_folders=("textvqa/train_images", "train_images"),
        home="textvqa.org/dataset",
    ),
    Task(
        "vizwiz_val",
        (
            _files(readers.read_unified_vqa, "vizwiz_val.json", "vizwiz_val_annotations.json"),
            _files(readers.read_vizwiz, "vizwiz/val.json"),
            _files(readers.read_vizwiz, "Annotations/val.json"),
        ),
        VqaAccuracy(),
        pattern=VIZWIZ,
        image_folders=("vizwiz/val", "vizwiz", "val"),
        home="vizwiz.org/tasks-and-datasets/vqa",
    ),
    Task(
        "vizwiz_test",
        (_files(readers.read_vizwiz, "vizwiz/test.json"), _files(readers.read_vizwiz, "Annotations/test.json")),
        None,
        pattern=VIZWIZ,
        image_folders=("vizwiz/test", "vizwiz", "test"),
        home="vizwiz.org/tasks-and-datasets/vqa",
        submission="vizwiz",
    ),
)

_TEXTS = (
    Task(
        "gqa_testdev",
        (
            _files(readers.read_unified, "gqa_testdev_balanced.json"),
            _files(readers.read_gqa, "testdev_balanced_questions.json"),
        ),
        ExactMatch(),
        image_folders=("gqa/images", "GQA/images", "images"),
        home="cs.stanford.edu/people/dorarad/gqa/download.html",
    ),
    Task(
        "vsr_val",
        (_files(readers.read_unified, "vsr_val.json"),),
        ExactMatch(),
        pattern=PLAIN,
        image_folders=_COCO,
        home=_ORIGINAL,
    ),
    Task(
        "ocrvqa_val",
        (_files(readers.read_unified, "ocrvqa_val.json"),),
        ExactMatch(),
        max_new_tokens=20,
        home=_ORIGINAL,
    ),
    Task("ai2diagram", (_files(readers.read_unified, "ai2diagram_test.json"),), ExactMatch(), home=_ORIGINAL),
    Task(
        "docvqa_val",
        (
            _files(readers.read_docvqa, "val_v1.0.json"),
            _files(readers.read_docvqa, "val/val_v1.0.json"),
            _files(readers.read_docvqa, "val_v1.0_withQT.json"),
        ),
        Anls(),
        max_new_tokens=32,
        image_folders=("docvqa/val", "docvqa", "val"),
        home="rrc.cvc.uab.es/?ch=17",
    ),
    Task(
        "docvqa_test",
        (_files(readers.read_docvqa, "test_v1.0.json"), _files(readers.read_docvqa, "test/test_v1.0.json")),
        None,
        max_new_tokens=32,
        image_folders=("docvqa/test", "docvqa", "test"),
        home="rrc.cvc.uab.es/?ch=17",
        submission="docvqa",
    ),
    Task(
        "chartqa_test",
        (
            _files(readers.read_unified_chartqa, "chartqa_test_human.json", "chartqa_test_augmented.json"),
            _files(readers.read_chartqa, "test_human.json", "test_augmented.json"),
            _files(readers.read_chartqa, "test/test_human.json", "test/test_augmented.json"),
        ),
        RelaxedAccuracy(),
        image_folders=("chartqa/test/png", "test/png", "png"),
        home="github.com/vis-nlp/ChartQA",
    ),
)

_LETTERS = (
    Task(
        "scienceqa_test",
        (_files(choice_readers.read_unified_choices, "scienceqa_test_img.json"),),
        LetterAccuracy(),
        pattern=PLAIN,
        prefix=" The answer is",
        home=_ORIGINAL,
    ),
    Task(
        "Qbench_dev",
        (_files(choice_readers.read_unified_choices, "Qbench_dev.json"),),
        LetterAccuracy(),
        pattern=PLAIN,
        home=_ORIGINAL,
    ),
    Task(
        "mmbench_dev",
        (
            _files(choice_readers.read_mmbench, "MMBench_DEV_EN.tsv"),
            _files(choice_readers.read_mmbench, "mmbench_dev_20230712.tsv"),
        ),
        MMBenchCircular(),
        pattern=PLAIN,
        scored_together=_question_of_rotations,
        home="github.com/open-compass/MMBench",
    ),
    Task(
        "mmbench_test",
        (
            _files(choice_readers.read_mmbench, "MMBench_TEST_EN.tsv"),
            _files(choice_readers.read_mmbench, "mmbench_test_20230712.tsv"),
        ),
        None,
        pattern=PLAIN,
        home="github.com/open-compass/MMBench",
        submission="mmbench",
    ),
    Task(
        "seed_image",
        (_files(choice_readers.read_seed_images, "SEED-Bench.json"),),
        SeedAccuracy(),
        pattern=PLAIN,
        image_folders=("SEED-Bench-image", "seed/SEED-Bench-image"),
        home="huggingface.co/datasets/AILab-CVC/SEED-Bench",
    ),
    Task(
        "seed",
        (_files(choice_readers.read_seed, "SEED-Bench.json", "SEED-Bench-video-image"),),
        SeedAccuracy(),
        pattern=PLAIN,
        image_folders=("SEED-Bench-image", "SEED-Bench-video-image", "seed/SEED-Bench-image"),
        home="huggingface.co/datasets/AILab-CVC/SEED-Bench, and a frame of each video in SEED-Bench-video-image",
    ),
    Task(
        "mmmu_val",
        (_files(choice_readers.read_unified_mmmu, "MMMU_val_single.json"),),
        Mmmu(),
        pattern=PLAIN,
        home=_ORIGINAL,
    ),
)

_BOXES = tuple(
    Task(
        name,
        (_files(readers.read_unified_grounding, f"{name}.json"),),
        BoxIou(),
        pattern=GROUNDING,
        max_new_tokens=30,
        image_folders=_COCO,
        home=_ORIGINAL,
    )
    for name in (
        *(f"{kind}_{split}" for kind in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")),
        "refcocog_val",
        "refcocog_test",
    )
)

_WRITTEN_OUT = tuple(
    Task(
        name,
        (_files(readers.read_unified, f"test_{name}.json"),),
        None,
        pattern=pattern,
        max_new_tokens=max_new_tokens,
        home="github.com/LukeForeverYoung/UReader",
        submission="unified",
    )
    for name, pattern, max_new_tokens in (
        ("DeepForm", PLAIN, 20),
        ("InfographicsVQA", SHORT_ANSWER, 25),
        ("KleisterCharity", PLAIN, 25),
        ("TabFact", SHORT_ANSWER, 10),
        ("VisualMRC", PLAIN, 35),
        ("WikiTableQuestions", SHORT_ANSWER, 20),
    )
)

TASKS: dict[str, Task] = {
    task.name: task for task in (_EASY_VQA, _MME, _POPE, *_VQA, *_TEXTS, *_LETTERS, *_BOXES, *_WRITTEN_OUT)
}


def choose(names: Sequence[str], data: DataFolder | None) -> list[Task]:
    """The tasks of these names; without names those whose files are below `data`, or easy-vqa if there is none.

    Raises UserError on an unknown name, or if there is nothing to evaluate.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"--tasks {unknown[0]}: no such task; choose from {', '.join(TASKS)}")
    if names:
        return [TASKS[name] for name in dict.fromkeys(names)]
    if data is None:
        return [_EASY_VQA]
    found = [task for task in TASKS.values() if task != _EASY_VQA and task.source(data)]
    if not found:
        raise UserError(f"--data {data.root}: holds the files of no task; --list shows which files are looked for")
    return found
