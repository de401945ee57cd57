"""The notebooks run from top to bottom, and show what they say."""

import copy
import runpy
from pathlib import Path

import nbformat
import pytest
from conftest import randomise, tiny_vae
from nbclient import NotebookClient

from itarflow import DenoiseScheduler, ITARFlowPipeline
from itarflow.training.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits_pipeline(tmp_path_factory):
    """A pipeline of the digits recipe, trained for a few seconds."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "digits.py"))["recipe"]
    return train(recipe, tmp_path_factory.mktemp("digits") / "run", max_steps=60).run.pipeline


def run(name, monkeypatch, **places):
    """What a notebook prints, and how many pictures it shows, given folders by the names of variables."""
    for variable, place in places.items():
        monkeypatch.setenv(variable, str(place))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = ROOT / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return "".join(output.get("text", "") for output in outputs), len(pictures)


def test_every_notebook_is_run_here():
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == {
        "quickstart.ipynb",
        "latent.ipynb",
        "likelihood.ipynb",
        "noise_dilemma.ipynb",
    }


@pytest.mark.slow
def test_the_quickstart_tells_real_digits_from_shuffled_ones(digits_pipeline, monkeypatch):
    printed, pictures = run("quickstart.ipynb", monkeypatch, ITARFLOW_PIPELINE=digits_pipeline)
    assert pictures == 4
    assert float(printed.split("real beats shuffled in ")[1].split("%")[0]) > 90


@pytest.mark.slow
def test_the_notebook_of_likelihoods_shows_what_they_are_good_for_and_the_pitfall(digits_pipeline, monkeypatch):
    printed, pictures = run("likelihood.ipynb", monkeypatch, ITARFLOW_PIPELINE=digits_pipeline)
    assert pictures == 6

    def figures(title, row):  # of a table, from t = 0.02 to 0.5
        lines = [line.strip() for line in printed.partition(title)[2].splitlines()]
        line = next(line for line in lines if line.startswith(row))
        return [float(value) for value in line.removeprefix(row).split()]

    assert min(figures("AUROC, digits", "inverted")) > 0.9
    assert figures("mean nats/dim", "digits")[0] < figures("mean nats/dim", "upside down")[0]
    assert max(figures("AUROC, photographs", "flat")) < 0.5
    assert max(figures("AUROC, photographs", "blurred photographs")) < 0.5
    assert min(figures("against flat", "complexity")) > 0.95
    assert figures("against digits", "complexity")[-1] < figures("against digits", "-log p")[-1]


@pytest.mark.slow
def test_the_notebook_of_latent_space_goes_from_pixels_to_codes_and_back(make_flow, monkeypatch, tmp_path):
    vae = tiny_vae("AutoencoderTiny", in_channels=3, out_channels=3)
    tuned = copy.deepcopy(vae)
    randomise(tuned.decoder)
    pipeline = ITARFlowPipeline(make_flow(in_channels=4), DenoiseScheduler(t_max=0.5, t_min=0.1), vae=vae)
    for name, part in {"vae": vae, "tuned": tuned, "pipeline": pipeline}.items():
        part.save_pretrained(tmp_path / name)
    printed, pictures = run(
        "latent.ipynb",
        monkeypatch,
        ITARFLOW_VAE=tmp_path / "vae",
        ITARFLOW_DECODER=tmp_path / "tuned",
        ITARFLOW_PIPELINE=tmp_path / "pipeline",
    )
    assert pictures == 4
    assert "pixels (4, 3, 128, 128) -> codes (4, 4, 64, 64), 3 times fewer values" in printed
    lines = [line for line in printed.splitlines() if line.startswith("noise ")]
    figures = [float(line.split()[-2]) for line in lines]
    assert len(lines) == 6
    assert all(plain != tuned for plain, tuned in zip(figures[::2], figures[1::2], strict=True))


@pytest.mark.slow
def test_the_notebook_of_the_noise_dilemma_shows_what_was_measured(monkeypatch):
    printed, pictures = run("noise_dilemma.ipynb", monkeypatch, ITARFLOW_STUDY=ROOT / "docs" / "noise_dilemma")
    assert pictures == 2
    one, five = (float(printed.split("t = 0.3: ")[1].split(f" after {steps}")[0].split()[-1]) for steps in (1, 5))
    assert one > 10 * five
    table = {line.split()[0]: line.split()[1:8] for line in printed.splitlines() if line.startswith(("tar", "itar"))}
    # From worst by its own step to best by five of the iTARFlow, as the text says.
    own = {name: float(row[1]) for name, row in table.items() if name.startswith("tarflow-") and row[0] != "1,172"}
    assert max(own, key=own.get) == "tarflow-0.3"
