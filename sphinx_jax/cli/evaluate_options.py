"""The options of `evaluate.py`, checked before a model is loaded."""

import dataclasses
from pathlib import Path

from sphinx_jax.cli.model_options import ModelOptions
from sphinx_jax.errors import UserError
from sphinx_jax.inference.sampling import SamplingParams

ORIGINAL_DECODING = SamplingParams(temperature=0.1, top_p=0.75, seed=1)
"""How the original program's evaluation samples."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    data: Path | None = None
    """Folder with the files of benchmarks and their images; docs/evaluation.md says what is looked for."""
    tasks: str | None = None
    """Names of tasks with commas between them. Default: all whose files are in --data; without --data, easy_vqa."""
    out: Path | None = None
    """Folder for answers, results.json and tables; an evaluation that was stopped continues there. Default:
    ./results/NAME, after the checkpoint."""
    limit: int | None = None
    """Ask only so many questions of each task, the first ones, and those that are scored together with one of them."""
    temperature: float = 0.0
    """Logits are divided by it before the softmax; 0 takes the most probable token."""
    original_decoding: bool = False
    """Sample as the original program's evaluation does: temperature 0.1, top-p 0.75, seed 1."""
    keep_duplicates: bool = False
    """Ask questions of the same image, text and id each time. The original keeps the first of them, as is done by
    default."""
    lenient_images: bool = False
    """Accept images that are cut short, as the original does. Otherwise their questions fail, and count as wrong."""
    report: bool = False
    """Write report.html besides: the table, the wrongest answers with their images, and the experts' load by layer."""
    list: bool = False
    """List the tasks, and which of their files are in --data; no model is loaded."""
    score: Path | None = None
    """Score the answers in a folder again, as after a metric has changed; no model is loaded."""

    @property
    def sampling(self) -> SamplingParams:
        """How answers are sampled; their length is the task's."""
        return ORIGINAL_DECODING if self.original_decoding else SamplingParams(temperature=self.temperature)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names in --tasks."""
        return tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip())

    def check(self) -> None:
        """Raises UserError on options that exclude each other or are out of range."""
        self.check_model_options()
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be 1 or more, got {self.limit}")
        if self.original_decoding and self.temperature:
            raise UserError("--temperature and --original-decoding exclude each other; give one of them")
        if self.report and self.offload and not self.score:
            raise UserError("--report counts the load of all experts, kept off the devices by --offload; leave one out")
        if self.score and (self.list or self.data or self.tasks or self.out):
            raise UserError("--score takes the folder of an evaluation and nothing else but --report")
        _ = self.sampling
