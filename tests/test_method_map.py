"""The table of docs/method.md says the truth: each function states its equation, each file and test is there."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "method.md"


class Row(NamedTuple):
    """A line of the table."""

    formula: str
    captions: list[str]
    """Such as "(TARFlow, eq. 3)"."""
    function: str
    """Dotted path."""
    file: str
    """Relative to the page."""
    test: str
    """As pytest takes it."""


def rows():
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[2].startswith("["):
            _, equation, function, test = cells
            (formula,), captions = re.findall(r"`([^`]+)`", equation), re.findall(r"\(i?TARFlow, [^)]+\)", equation)
            yield Row(formula, captions, *re.fullmatch(r"\[`(.+)`\]\((.+)\)", function).groups(), test.strip("`"))


ROWS = list(rows())


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.function}: {row.test.partition('::')[2]}" for row in ROWS])
def test_a_function_states_its_equation_in_its_own_file(row):
    function = pkgutil.resolve_name(row.function)
    docstring = " ".join(function.__doc__.split())
    assert row.formula in docstring
    assert [caption for caption in row.captions if caption not in docstring] == []
    assert Path(inspect.getsourcefile(inspect.unwrap(function))) == (PAGE.parent / row.file).resolve()


@pytest.mark.parametrize("file", sorted({row.test.partition("::")[0] for row in ROWS}))
def test_every_test_of_an_equation_has_its_row(file):
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    named = {row.test.partition("::")[2] for row in ROWS if row.test.startswith(f"{file}::")}
    assert named == {name for name in functions if name.startswith("test_")}


def test_no_equation_is_left_out():
    captions = {caption for row in ROWS for caption in row.captions}
    assert captions >= {f"(TARFlow, eq. {number})" for number in range(1, 12)} | {"(iTARFlow, eq. 5)"}
