"""The notebooks run from top to bottom."""

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from itarflow.training import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits_pipeline(tmp_path_factory):
    """A pipeline of the digits recipe, trained for a few seconds."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "digits.py"))["recipe"]
    return train(recipe, tmp_path_factory.mktemp("digits") / "run", max_steps=60).run.pipeline


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs_and_shows_what_it_says(path, digits_pipeline, monkeypatch):
    monkeypatch.setenv("ITARFLOW_PIPELINE", str(digits_pipeline))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 4
    share = float(printed.split("real beats shuffled in ")[1].split("%")[0])
    assert share > 90
