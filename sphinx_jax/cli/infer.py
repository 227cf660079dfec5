"""Ask a model about pictures: one question, a chat, or a file of questions.

Examples:
  python infer.py                                       three held-out pictures, asked of the newest run
  python infer.py --image cat.jpg --prompt "What is this?"
  python infer.py --image cat.jpg                       chat about a picture
  python infer.py --chat                                chat without one
  python infer.py --batch questions.jsonl --out answers.jsonl
  python infer.py --checkpoint SPHINX-MoE --mesh.tensor 8 --image cat.jpg --prompt "What is this?"
  python infer.py --checkpoint SPHINX-MoE --quantize int4 --chat        weights in a quarter of the memory
  python infer.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2
  python infer.py --plan --gpu rtx3090 --num-gpus 8     would SPHINX-MoE-1k fit? needs no GPU and no weights

A line of questions.jsonl is {"id": 1, "image": "cat.jpg" or null, "prompt": "What is this?"}; answers.jsonl gets
{"id": 1, "answer": "A cat."} as answers end. Started again, it goes on where it was.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import sharding
import sphinx_jax
from sharding import is_primary_process
from sphinx_jax import Sphinx, UserError, checkpoints
from sphinx_jax.cli import common
from sphinx_jax.cli.infer_options import Options, check_files, check_options, choice
from sphinx_jax.cli.plan import plan_inference
from sphinx_jax.config import preset
from sphinx_jax.inference.chat import chat_in_pipe, chat_on_terminal

HELD_OUT = (0, 1, 4)
"""Pictures of easy-vqa's test set that are shown when nothing is asked."""


def main(argv: Sequence[str]) -> int:
    """Load, answer as the options say, and tell how long it took; returns the exit code."""
    start = time.perf_counter()
    options = common.parse(Options, argv, "infer.py", __doc__)
    check_options(options)
    if options.planning.plan:
        return plan(options)
    processes = sharding.start_processes(options.processes)
    if processes > 1:
        common.only_answers_on_stdout()
    common.keep_compiled_programs()
    if options.simulate_devices:
        sharding.simulate_devices(options.simulate_devices)
    sharding.broadcast_from_primary(lambda: check_files(options))
    own_mesh = options.mesh != sharding.MeshShape()
    mesh = sharding.make_mesh(**dataclasses.asdict(options.mesh)) if own_mesh else None
    checkpoint = options.checkpoint or sharding.broadcast_from_primary(default_checkpoint)
    nothing_asked = not (options.batch or options.image or options.chat or options.prompt is not None)
    if processes > 1 and not (nothing_asked or options.batch or options.prompt is not None):
        raise UserError(
            "a chat runs in one process; several answer one question (--prompt) or a file of them (--batch)"
        )
    held_out = sharding.broadcast_from_primary(read_held_out) if nothing_asked else []

    memory = {"max_model_len": options.max_model_len, "quantize": options.quantize, "offload": options.offload}
    asked = options.prompt is not None and processes == 1
    model = sphinx_jax.load(checkpoint, mesh, options.dtype, **memory, prepare=prepare(options) if asked else None)
    sharding.check_processes(model.mesh)
    say(f"{checkpoint} on {model.mesh.size} device{'s' * (model.mesh.size > 1)}")
    times = [f"loaded after {time.perf_counter() - start:.1f} s"]
    if options.batch:
        answer_batch(model, options)
    elif nothing_asked:
        show(model, held_out, options)
    elif options.prompt is not None:
        first_token = answer(model, options)
        times.append(f"first token after {first_token - start:.1f} s")
    else:
        chat(model, options)
    times += [f"compiling took {model.engine.compile_seconds:.1f} s", f"all {time.perf_counter() - start:.1f} s"]
    say(", ".join(times))
    return 0


def plan(options: Options) -> int:
    """Say whether it would fit on the cards that --gpu and --num-gpus name; 0 if it does, 1 if not."""
    opened = checkpoints.open(options.checkpoint) if options.checkpoint else None
    config = opened.config if opened else preset(options.preset or "sphinx-moe-1k")
    name = str(options.checkpoint or options.preset or "sphinx-moe-1k")
    dtype = options.dtype or (opened.dtype if opened else "bfloat16")
    max_num_seqs = options.max_num_seqs if options.batch else 1
    size = {
        "quantize": options.quantize,
        "offload": options.offload,
        "max_num_seqs": max_num_seqs,
        "max_model_len": options.max_model_len,
    }
    return plan_inference(options.planning, name, config, options.mesh, dtype=dtype, **size)


def default_checkpoint() -> Path:
    """The newest run under ./runs, or else the checkpoint that comes with the project."""
    runs = sorted(Path("runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime)
    if not runs and not sphinx_jax.SHIPPED.is_dir():
        raise UserError(f"no run under ./runs and nothing in {sphinx_jax.SHIPPED}: run train.py, or give --checkpoint")
    return runs[-1].parent if runs else sphinx_jax.SHIPPED


def read_held_out() -> list[tuple[Path, str, str]]:
    """Picture, question and true answer of a few pictures that no training saw."""
    from sphinx_jax.data import easy_vqa

    records = easy_vqa.load("test")
    chosen = [(records[i].id, records[i].questions[0]) for i in HELD_OUT]
    return [(easy_vqa.image_file("test", number), question.text, question.answer) for number, question in chosen]


def show(model: Sphinx, held_out: list[tuple[Path, str, str]], options: Options) -> None:
    """Ask what is known about held-out pictures, and print it beside the truth."""
    images, questions, truths = zip(*held_out, strict=True)
    pictures = sharding.broadcast_from_primary(lambda: [model.picture(image) for image in images])
    answers = model.generate(questions, pictures, **choice(options))
    if not is_primary_process():
        return
    for image, question, truth, said in zip(images, questions, truths, answers, strict=True):
        print(f"{image}\n  question: {question}\n  answer:   {said}\n  truth:    {truth}")


def prepare(options: Options) -> Callable[[Sphinx], None]:
    """Compiles what the question takes while the model is read."""
    chosen = {"max_new_tokens": options.max_new_tokens, "stop": options.stop}
    return lambda model: model.prepare(options.prompt, options.image is not None, **chosen)


def answer(model: Sphinx, options: Options) -> float:
    """Print the answer to one question as it comes; when its first piece came."""
    first = None
    picture = sharding.broadcast_from_primary(lambda: options.image and model.picture(options.image))
    for piece in model.stream(options.prompt, picture, **choice(options)):
        first = first or time.perf_counter()
        if is_primary_process():
            print(piece, end="", flush=True)
    if is_primary_process():
        print()
    return first or time.perf_counter()


def chat(model: Sphinx, options: Options) -> None:
    """A conversation on the terminal, or with whatever feeds standard input."""
    conversation = model.chat(options.image, **choice(options))
    if sys.stdin.isatty():
        chat_on_terminal(conversation, options.image, model.picture)
    else:
        chat_in_pipe(conversation)


def answer_batch(model: Sphinx, options: Options) -> None:
    """Answer a file of questions, with a progress bar."""
    chosen = choice(options) | {"max_num_seqs": options.max_num_seqs, "logprobs": options.logprobs}
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]:.0f} tokens/s"), TimeRemainingColumn()
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True, quiet=not is_primary_process())) as bar:
        task = bar.add_task("", total=None, speed=0.0)
        for done in model.answer_file(options.batch, options.out, **chosen):
            completed = done.skipped + done.answered + done.failed
            bar.update(task, total=done.total, completed=completed, speed=done.tokens / (time.perf_counter() - start))
    say(f"{done.answered} answered, {done.skipped} answered before, {done.failed} failed: {options.out}")


def say(text: str) -> None:
    """A remark beside the answers: dim, on standard error, of the first process."""
    Console(stderr=True, highlight=False, quiet=not is_primary_process()).print(
        text, style="dim", markup=False, soft_wrap=True
    )
