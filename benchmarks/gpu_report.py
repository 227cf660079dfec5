"""The report of benchmarks/gpu.py: what its parts found, joined, and as tables."""

import importlib.metadata
import shutil
import subprocess
import time


def report(found: dict[str, list[dict]], problems: dict[str, str]) -> dict:
    """One object of all parts: facts, `jobs` with the times of both sides, `experts`, `problems`."""
    facts, jobs, memory = {}, {}, {}
    for part in (p for p in found if p != "experts"):
        for row in found[part]:
            if "job" in row:
                jobs.setdefault(row["job"], {}).update(row)
            memory |= row.get("memory", {})
            facts |= {key: value for key, value in row.items() if "job" not in row}
    for job in jobs.values():
        if "seconds" in job and "their_seconds" in job:
            job["ratio"] = job["their_seconds"] / job["seconds"]
    return facts | {"memory": memory, "jobs": list(jobs.values()), "experts": found["experts"], "problems": problems}


def markdown(result: dict) -> str:
    """The report as tables. A cell is empty if nothing was measured."""

    def cell(value: float | None, form: str, factor: float = 1.0) -> str:
        return "" if value is None else format(value * factor, form)

    lines = [
        f"{result['date']}, {result.get('device', 'no device')}, {result['versions']}, commit {result['commit']}: "
        f"{cell(result.get('flops'), '.0f', 1e-12)} TFLOP/s in a large matmul, "
        f"{cell(result.get('bandwidth'), '.0f', 1e-9)} GB/s in a large read; "
        f"{result.get('layers', 'no')} layers for inference, {result.get('training_layers', 'no')} for training",
        "",
        "| job | ms | predicted, ms | tokens/s | roofline fraction | transformers, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for job in result["jobs"]:
        rate = job["tokens"] / job["seconds"] if "seconds" in job else None
        cells = (
            job["job"], cell(job.get("seconds"), ".2f", 1e3), cell(job.get("predicted_seconds"), ".2f", 1e3),
            cell(rate, ",.0f"),
            cell(job.get("roofline_fraction"), ".2f"), cell(job.get("their_seconds"), ".2f", 1e3),
            cell(job.get("ratio"), ".2f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| memory of | planned, GiB | peak, GiB |", "| --- | --- | --- |"]
    for part, size in result["memory"].items():
        lines.append(f"| {part} | {cell(size['planned'], '.2f', 2**-30)} | {cell(size['peak'], '.2f', 2**-30)} |")
    lines += ["", "| experts, tokens | implementation | forward, ms | TFLOP/s | forward and backward, ms | TFLOP/s |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in result["experts"]:
        forward, both = row["forward_seconds"], row["forward_backward_seconds"]
        cells = (
            f"{row['tokens']:,}",
            row["implementation"] + (" (default)" if row["default"] else ""),
            f"{forward * 1e3:.3f}",
            f"{row['flops'] / forward / 1e12:.1f}",
            f"{both * 1e3:.3f}",
            f"{3 * row['flops'] / both / 1e12:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{part}: {problem}" for part, problem in result["problems"].items())]
    return "\n".join(lines).rstrip() + "\n"


def run_facts() -> dict[str, str]:
    """Date, commit, versions, and the GPU by its driver, which needs no process with jax."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    device, driver = (gpus.splitlines() or ["no GPU, none"])[0].split(", ")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")),
        "device": device,
        "driver": driver,
    }
