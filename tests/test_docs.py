"""What README, CONTRIBUTING, CHANGELOG and docs/ promise: links, commands with their options, Python, versions."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from accelerate.commands.launch import launch_command_parser

import itarflow
from itarflow import DenoiseScheduler, ITARFlowPipeline, TARFlow
from itarflow.commands import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """The code within lines."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands() -> Iterator[tuple[str, ...]]:
    """The words of each command that starts something of ours; one with a PLACEHOLDER can't be checked."""
    for page in (*PAGES, *(ROOT / "recipes").glob("*.py")):
        docstring = page.suffix == ".py"
        code = [ast.get_docstring(ast.parse(page.read_text())) or ""] if docstring else blocks(page, "bash")
        lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
        for command in itertools.chain.from_iterable(
            line.split("&&") for line in (*lines, *(() if docstring else spans(page)))
        ):
            if re.match(r"\s*(itarflow \w|accelerate launch .|sbatch|python \S+\.py)", command):
                words = shlex.split(command, comments=True)
                if not any(word.isupper() for word in words):
                    yield tuple(words)


COMMANDS = sorted(set(commands()))


class Parsed(BaseException):
    """A command line that has been understood; nothing is run."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where they have read their words, by Parsed or, after --help, by SystemExit(0)."""

    parse = tyro.cli

    def stop(form: Any, **kwargs: Any) -> None:
        parse(functools.wraps(form)(lambda **_: None) if inspect.isfunction(form) else form, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    monkeypatch.chdir(ROOT)


def script(path: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(path).is_file()
    if words or path.startswith("recipes/"):  # benchmarks without options may have none to read, and begin
        monkeypatch.syspath_prepend(str(Path(path).parent))
        monkeypatch.setattr(sys, "argv", [path, *words])
        runpy.run_path(path, run_name="__main__")
    raise Parsed


def start(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if program == "itarflow":
        cli.main(words)
    elif program == "python":
        script(words[0], words[1:], monkeypatch)
    elif program == "sbatch":
        _, _, path, _, recipe, *options = words
        assert Path(path).is_file()
        script(recipe, options, monkeypatch)
    else:
        launch = launch_command_parser().parse_args(words[1:])
        assert launch.config_file is None or Path(launch.config_file).is_file()
        if launch.module:
            start(launch.training_script, launch.training_script_args, monkeypatch)
        script(launch.training_script, launch.training_script_args, monkeypatch)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.usefixtures("understood")
def test_a_command_exists_with_its_options(words, monkeypatch):
    program, *rest = words
    if rest[-1] == "..." or (program == "itarflow" and len(rest) == 1):
        rest = [*(word for word in rest if word != "..."), "--help"]
    with pytest.raises((Parsed, SystemExit)) as stop:
        start(program, rest, monkeypatch)
    assert stop.type is Parsed or stop.value.code == 0


def test_commands_are_found():
    assert {words[0] for words in COMMANDS} == {"accelerate", "itarflow", "python", "sbatch"}
    assert len(COMMANDS) > 50


def test_every_command_is_told_of():
    told = {words[1] for words in COMMANDS if words[0] == "itarflow"}
    assert {"train", "sample", "evaluate", "bpd", "convert", "prepare", "profile"} <= told


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{link} in {page.name}"
            assert not anchor or anchor in slugs(target), f"{link} in {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """`flow/noise.py` is any file whose path ends so."""
    files = [str(path) for folder in ("itarflow", "tests", "recipes", "benchmarks", "docs", "vae", "experiments")
             for path in (ROOT / folder).rglob("*")]  # fmt: skip
    for span in spans(page):
        if re.fullmatch(r"[\w./-]+\.(py|yaml|sh|ipynb)", span):
            assert any(file.endswith(f"/{span.removeprefix('../')}") for file in files), f"{span} in {page.name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_extras_that_are_installed_exist():
    named = {
        extra
        for page in PAGES
        for group in re.findall(r'pip install -e "\.\[([\w,]+)\]"', page.read_text())
        for extra in group.split(",")
    }
    assert named == PYPROJECT["project"]["optional-dependencies"].keys()


SNIPPETS = [(page.name, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=[name for name, _ in SNIPPETS])
def test_python_runs(code, monkeypatch, tmp_path):
    """As far as it needs nothing but the digits' pipeline; of the rest what it imports must exist."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
    if re.search(r"push_to_hub|runs/(?!digits/)", code):
        return
    monkeypatch.chdir(tmp_path)
    size = {"image_size": 8, "in_channels": 1, "patch_size": 4, "channels": 64, "num_layers": (1, 1)}
    flow = TARFlow(**size, num_classes=10, noise_conditioned=True, noise_range=(0.1, 0.5))
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.1, num_denoise_steps=2))
    pipe.save_pretrained("runs/digits/pipeline")
    exec(compile(code, "snippet", "exec"), {})


def test_there_is_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == itarflow.__version__
    assert f"## [{itarflow.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_with_the_oldest_and_the_newest_that_are_supported():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = jobs["check"]["strategy"]["matrix"]
    (torch,) = (name for name in PYPROJECT["project"]["dependencies"] if name.startswith("torch>="))
    newest = re.search(r"TORCH_VERSION:-([\d.]+)", (ROOT / ".ci" / "run").read_text())[1]
    assert matrix["torch"] == [f"{torch.removeprefix('torch>=')}.0", newest]
    pythons = re.findall(r"Python :: (3\.\d+)", " ".join(PYPROJECT["project"]["classifiers"]))
    assert matrix["python"] == [PYPROJECT["project"]["requires-python"].removeprefix(">="), pythons[-1]]
