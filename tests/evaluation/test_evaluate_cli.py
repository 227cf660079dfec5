"""`evaluate.py` from its options to the files it leaves."""

import json


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_nothing_given_is_easy_vqa(run, nano, monkeypatch, tmp_path):
    monkeypatch.setattr("sphinx_jax.cli.model_options.sphinx_jax.load", lambda *_, **__: nano)
    code, out, _ = run("--limit", 30, "--max-num-seqs", 16)
    assert code == 0 and "easy_vqa  exact match  100.00 %" in out
    folder = tmp_path / "results" / "nano"
    lines = read_lines(folder / "easy_vqa.jsonl")
    assert {line["n"] for line in lines} == set(range(1, 31))
    assert all(line["answer"] == line["truth"][0] and line["finish"] == "stop" for line in lines)
    entry = json.loads((folder / "results.json").read_text())["tasks"]["easy_vqa"]
    assert {"metric", "value", "count", "unmatched", "failed", "parts", "original"} <= entry.keys()
    assert (entry["count"], entry["value"]) == (30, 100.0)
    assert "| easy_vqa | exact match | 100.00 % |" in (folder / "results.md").read_text()
