"""One HTML page of an evaluation, without scripts and outside parts: values, experts' load, answers worth reading."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sphinx_jax.evaluation import expert_load
from sphinx_jax.evaluation.lines import answers_file, read_lines
from sphinx_jax.evaluation.report_images import Images, figure
from sphinx_jax.evaluation.report_page import PAGE
from sphinx_jax.evaluation.results import tasks_in
from sphinx_jax.evaluation.tables import COLUMNS, Result, cells
from sphinx_jax.evaluation.tasks import Task
from sphinx_jax.inference.answers_file import write_whole
from sphinx_jax.inference.expert_load import KINDS

REPORT = "report.html"

_SHOWN = 8
"""Answers of each list."""


def write_report(out: Path, results: Mapping[str, Result], run: Mapping[str, Any], images: Images) -> None:
    """Write report.html for the answers in `out`."""
    sections = [_header(run), _results(results), _expert_load(out)]
    for task in tasks_in(out):
        sections.append(_task(task, read_lines(answers_file(out, task)), images))
    page = PAGE.replace("{body}", "\n".join(sections))
    write_whole(out / REPORT, page.encode("utf-8", "backslashreplace"))


def _header(run: Mapping[str, Any]) -> str:
    settings = run.get("settings", {})
    facts = {
        "checkpoint": run.get("checkpoint"),
        "dtype": settings.get("dtype"),
        "quantize": settings.get("quantize"),
        "temperature": settings.get("temperature"),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in run.get("mesh", {}).items() if size > 1) or "one device",
        "device": run.get("device"),
        "jax": run.get("versions", {}).get("jax"),
    }
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<header><h1>Evaluation</h1><dl>{rows}</dl></header>"


def _results(results: Mapping[str, Result]) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(
        f"<tr{' class=error' if result.error else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(name, result))
        + "</tr>"
        for name, result in results.items()
    )
    note = (
        "<p>Unmatched answers could not be read, failed questions could not be asked: both count as wrong. "
        "<em>Original</em> is the value by the original program's own scorer.</p>"
    )
    return f'<section><h2>Results</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>{note}</section>'


# Experts


def _expert_load(out: Path) -> str:
    measured = expert_load.read(out)
    if measured is None:
        return ""
    questions, load = measured
    num_experts, shown = load.shape[-1], [i for i in range(len(KINDS)) if load[:, i].any()]
    maps = "".join(f"<figure><figcaption>{KINDS[i]} tokens</figcaption>{_heat_map(load[:, i])}</figure>" for i in shown)
    if len(shown) == 2:
        difference = load[:, 0] - load[:, 1]
        caption = "image minus text, percentage points"
        maps += f"<figure><figcaption>{caption}</figcaption>{_heat_map(difference, signed=True)}</figure>"
    return (
        "<section><h2>Expert load</h2><p>Which experts see images: the per cent of a layer's token-to-expert "
        f"assignments that go to each expert, over {questions} questions read with their answers. A uniform load is "
        f'{100 / num_experts:.1f} %.</p><div class="maps">{maps}</div></section>'
    )


def _heat_map(values: Float[np.ndarray, "layers experts"], signed: bool = False) -> str:
    """A table, a row a layer: darker is more; of signed values, one colour for each sign."""
    strongest = max(float(np.abs(values).max()), 1e-9)
    head = "".join(f"<th>{expert}</th>" for expert in range(values.shape[1]))
    rows = []
    for layer, row in enumerate(values):
        texts = [f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}" for value in row]
        columns = "".join(
            f'<td class="{"less" if value < 0 else "more"}{" strong" if abs(value) > 0.55 * strongest else ""}" '
            f'style="--s:{abs(value) / strongest:.3f}">{text}</td>'
            for value, text in zip(row, texts, strict=True)
        )
        rows.append(f"<tr><th>{layer}</th>{columns}</tr>")
    return f'<div class="wide"><table class="heat"><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></div>'


# Answers


def _task(task: Task, lines: Sequence[Mapping[str, Any]], images: Images) -> str:
    answered = [line for line in lines if "answer" in line]
    wrong = sorted((line for line in answered if line["score"] == 0), key=lambda line: -line["logprob"])
    hard = sorted(answered, key=lambda line: line["logprob"])
    lists = (
        ("Wrongest", "wrong answers that the model was surest of", wrong),
        ("Hardest", "answers that it was least sure of", hard),
    )
    body = "".join(
        f"<h3>{name}</h3><p>{meaning[0].upper()}{meaning[1:]}; {len(chosen):,} in all.</p>"
        f'<div class="cards">{"".join(_card(task, line, images) for line in chosen[:_SHOWN])}</div>'
        for name, meaning, chosen in lists
        if chosen
    )
    failed = [line for line in lines if "error" in line]
    if failed:
        errors = "".join(f"<li>{escape(line['error'])}</li>" for line in failed[:_SHOWN])
        body += f"<h3>Failed</h3><p>{len(failed):,} questions could not be asked.</p><ul>{errors}</ul>"
    return f"<section><h2>{escape(task.name)}</h2>{body}</section>"


def _card(task: Task, line: Mapping[str, Any], images: Images) -> str:
    image = images.load(task, line)
    drawn = figure(image, line) if image else '<div class="none">no image</div>' if line["image"] is None else _GONE
    truths = list(dict.fromkeys(line["truth"]))
    shown = " / ".join(truths[:4]) + (" / ..." if len(truths) > 4 else "")
    facts = (("answer", line["answer"]), ("read as", line["matched"]), ("truth", shown))
    rows = "".join(
        f'<div class="{name.replace(" ", "-")}"><dt>{name}</dt><dd>{escape(str(value))}</dd></div>'
        for name, value in facts
        if value is not None and not (name == "read as" and value == line["answer"])
    )
    probability = f"p {math.exp(min(line['logprob'], 0)):.3f}"
    score = "-" if line["score"] is None else f"{line['score']:.2f}"
    kind = "right" if line["score"] else "wrong"
    return (
        f'<article class="{kind}">{drawn}<p class="question">{escape(line["question"])}</p><dl>{rows}</dl>'
        f"<footer>score {score}, {probability}, n {line['n']}</footer></article>"
    )


_GONE = '<div class="none">the image is not there any more</div>'
