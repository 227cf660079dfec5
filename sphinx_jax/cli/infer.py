"""Ask a model about images: one question, a chat, or a file of questions.

Examples:
  python infer.py                                       three held-out images, asked of the newest run
  python infer.py --image cat.jpg --prompt "What is this?"
  python infer.py --image cat.jpg                       chat about an image
  python infer.py --chat                                chat without one
  python infer.py --batch questions.jsonl --out answers.jsonl
  python infer.py --checkpoint SPHINX-MoE --mesh.tensor 8 --image cat.jpg --prompt "What is this?"
  python infer.py --checkpoint SPHINX-MoE --quantize int4 --chat        weights in a third of the memory
  python infer.py --checkpoint SPHINX-MoE --adapters mine=runs/mine --adapter mine --chat    adapters on their base
  python infer.py --simulate-devices 8 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2
  python infer.py --plan --gpu rtx3090 --num-gpus 8     would SPHINX-MoE-1k fit? needs no GPU and no weights

A line of questions.jsonl is {"id": 1, "image": "cat.jpg" or null, "prompt": "What is this?"}; answers.jsonl gets
{"id": 1, "answer": "A cat."} as answers end. Started again, it goes on where it was. With --adapters a line may name
the one that answers it: "model": "mine".
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sharding
from sharding import is_primary_process
from sphinx_jax import Sphinx, UserError
from sphinx_jax.cli import common
from sphinx_jax.cli.infer_options import Options, check_files, check_options
from sphinx_jax.cli.model_options import load_model, plan, remark, start_process
from sphinx_jax.cli.progress import show_progress
from sphinx_jax.inference.chat import chat_in_pipe, chat_on_terminal

HELD_OUT = (0, 1, 4)
"""Images of easy-vqa's test set that are shown when nothing is asked."""


def main(argv: Sequence[str]) -> int:
    """Load, answer as the options say, and print how long it took; returns the exit code."""
    start = time.perf_counter()
    options = common.parse(Options, argv, "infer.py", __doc__ or "")
    check_options(options)
    if options.planning.plan:
        return plan(options, options.max_num_seqs if options.batch or options.max_num_seqs == "auto" else 1)
    processes = start_process(options)
    sharding.broadcast_from_primary(lambda: check_files(options))
    is_asked = bool(options.batch or options.image or options.chat or options.prompt is not None)
    if processes > 1 and is_asked and not options.batch and options.prompt is None:
        raise UserError(
            "a chat runs in one process; several answer one question (--prompt) or a file of them (--batch)"
        )
    held_out = sharding.broadcast_from_primary(read_held_out) if not is_asked else []

    compiles_ahead = options.prompt is not None and processes == 1
    model = load_model(
        options,
        adapters=options.named_adapters,
        refuse_forged_turns=options.refuse_forged_turns,
        compile_for=compile_for(options) if compiles_ahead else None,
    )
    times = [f"loaded after {time.perf_counter() - start:.1f} s"]
    code = 0
    if options.batch:
        code = answer_batch(model, options)
    elif not is_asked:
        show(model, held_out, options)
    elif options.prompt is not None:
        first_token = answer(model, options)
        times.append(f"first token after {first_token - start:.1f} s")
    else:
        chat(model, options)
    times += [f"compiling took {model.engine.compile_seconds:.1f} s", f"all {time.perf_counter() - start:.1f} s"]
    remark(", ".join(times))
    return code


def read_held_out() -> list[tuple[Path, str, str]]:
    """Image, question and true answer of a few images that no training saw."""
    from sphinx_jax.data import easy_vqa

    records = easy_vqa.load("test")
    chosen = [(records[i].id, records[i].questions[0]) for i in HELD_OUT]
    return [(easy_vqa.image_file("test", number), question.text, question.answer) for number, question in chosen]


def show(model: Sphinx, held_out: list[tuple[Path, str, str]], options: Options) -> None:
    """Ask what is known about held-out images, and print it next to the truth."""
    images, questions, truths = zip(*held_out, strict=True)
    prepared = sharding.broadcast_from_primary(lambda: [model.prepare_image(image) for image in images])
    answers = model.generate(questions, prepared, options.sampling, adapter=options.adapter)
    if not is_primary_process():
        return
    for image, question, truth, given in zip(images, questions, truths, answers, strict=True):
        print(f"{image}\n  question: {question}\n  answer:   {given}\n  truth:    {truth}")


def compile_for(options: Options) -> Callable[[Sphinx], None]:
    """Compiles what the question takes while the weights are read."""
    prompt, max_new_tokens = options.prompt, options.sampling.max_new_tokens
    assert prompt is not None
    return lambda model: model.compile_for(prompt, options.image is not None, max_new_tokens=max_new_tokens)


def answer(model: Sphinx, options: Options) -> float:
    """Print the answer to one question as it comes; when its first text came."""
    assert options.prompt is not None
    first = None
    image = sharding.broadcast_from_primary(lambda: options.image and model.prepare_image(options.image))
    for text in model.stream(options.prompt, image, options.sampling, adapter=options.adapter):
        first = first or time.perf_counter()
        if is_primary_process():
            print(text, end="", flush=True)
    if is_primary_process():
        print()
    return first or time.perf_counter()


def chat(model: Sphinx, options: Options) -> None:
    """A conversation on the terminal, or with whatever feeds standard input."""
    conversation = model.chat(options.image, options.sampling, adapter=options.adapter)
    if sys.stdin.isatty():
        chat_on_terminal(conversation, options.image, model.prepare_image)
    else:
        chat_in_pipe(conversation)


def answer_batch(model: Sphinx, options: Options) -> int:
    """Answer a file of questions, with a progress bar; the exit code is 1 if no line of it has an answer."""
    assert options.batch is not None and options.out is not None
    progress = model.answer_file(
        options.batch,
        options.out,
        options.sampling,
        max_num_seqs=options.max_num_seqs,
        logprobs=options.logprobs,
        prefix_bytes=options.prefix_bytes,
        adapter=options.adapter,
    )
    done = show_progress(progress)
    remark(f"{done.answered} answered, {done.skipped} answered before, {done.failed} failed: {options.out}")
    return 0 if done.answered or done.skipped else 1
