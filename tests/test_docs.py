"""README and docs: links lead somewhere, paths and options exist, commands parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from sphinx_jax.cli import common

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = ("train", "infer", "serve", "evaluate", "convert")

GENERATED = (".", "OUT", "adapters", "params", "site")
"""First folder of paths that a run, a checkpoint or a build creates."""

FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(rf"(?:python (?P<script>{'|'.join(COMMANDS)})\.py|sphinx-jax (?P<name>\w+))(?P<arguments>[^\n&]*)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and mkdocs give the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def documented_commands() -> list[tuple[str, str, str]]:
    """(page, command, its arguments) of each `train.py`, `infer.py` and `sphinx-jax` line in a code block."""
    found = []
    for page in PAGES:
        for block in FENCED.findall(page.read_text()):
            # What a shell fills in becomes a number, which any option takes; a command's output becomes nothing.
            plain = re.sub(r"\$\{[^}]*\}|\$\w+", "1", re.sub(r"\$\([^)]*\)", "", block.replace("\\\n", " ")))
            for match in COMMAND.finditer(plain):
                found.append((page_name(page), match["script"] or match["name"], match["arguments"]))
    return found


class Parsed(Exception):
    """Raised instead of running a command whose options parse."""


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_name(page)}: no {target}"
        assert not anchor or anchor in anchors(file), f"{page_name(page)}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_in_backticks_exist(page):
    """Those from the root of the repository; in docs also those from `sphinx_jax/`."""
    places = [ROOT, ROOT / "sphinx_jax"]
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", FENCED.sub("", page.read_text())):
        if path.split("/")[0] in GENERATED:
            continue
        assert any((place / path).exists() for place in places), f"{page_name(page)}: no {path}"


def test_code_refers_to_pages_that_exist():
    for tree in ("sphinx_jax", "sharding", "tests", "examples", "benchmarks", "docs"):
        for file in (ROOT / tree).rglob("*.py"):
            for page in re.findall(r"docs/[\w-]+\.md", file.read_text()):
                assert (ROOT / page).is_file(), f"{page_name(file)}: no {page}"


@pytest.mark.parametrize(("page", "name", "arguments"), documented_commands())
def test_documented_commands_parse(page, name, arguments, monkeypatch):
    parse = common.parse

    def parse_only(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(common, "parse", parse_only)
    # A quote that was opened before the command encloses it; it is not the command's.
    for quote in ('"', "'"):
        arguments = arguments if arguments.count(quote) % 2 == 0 else arguments.replace(quote, "")
    argv = shlex.split(arguments)
    with pytest.raises(Parsed):
        importlib.import_module(f"sphinx_jax.cli.{name}").main(argv)


def test_documented_options_exist(capsys):
    """Every option in backticks, except those of benchmarks and other programs, is in some `--help`."""
    helps = ""
    for name, *subcommand in (
        ["train"],
        ["infer"],
        ["serve"],
        ["evaluate"],
        ["convert", "convert"],
        ["convert", "inspect"],
    ):
        with pytest.raises(SystemExit):
            importlib.import_module(f"sphinx_jax.cli.{name}").main([*subcommand, "--help"])
        helps += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][\w.-]*", helps)) | {"--help"}
    foreign = {"--signal", "--gpus-per-node", "--gpus-per-task", "--ntasks-per-node", "--quiet", "--strict"}
    foreign |= {"--precision", "--checkpointing", "--batch_size", "--max_words"}  # of the original's training script
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][\w.-]*)", FENCED.sub("", page.read_text())):
            # `--mesh.*` stands for all options that begin so.
            exists = any(name.startswith(option) for name in known) if option.endswith(".") else option in known
            assert exists or option in foreign, f"{page_name(page)}: no option {option}"


def test_each_fault_of_several_hosts_names_its_tests():
    text = (ROOT / "docs" / "multi-host.md").read_text()
    rows = text[text.index("| event |") :].partition("\n\n")[0].splitlines()[2:]
    defined = {
        name
        for folder in ("sharding", "training", "server", "cluster")
        for file in (ROOT / "tests" / folder).glob("*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= defined, row
