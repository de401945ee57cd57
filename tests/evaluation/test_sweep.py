"""`itarflow sweep` from end to end, with a tiny flow and a stand-in for the network that makes features."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import Run, save_checkpoint, terminal, write_photos
from PIL import Image
from tiny_extractor import TinyExtractor
from torch import Tensor

from itarflow import ITARFlowPipeline, TARFlow
from itarflow.commands.sweep import table_of
from itarflow.evaluation import scoring as evaluating
from itarflow.evaluation import sweep_plots as curves
from itarflow.evaluation.metrics.scores import Figure, Scores
from itarflow.evaluation.samples import generate as generating
from itarflow.evaluation.samples.files import open_samples
from itarflow.evaluation.sweep import Setting, best_settings, grid_of
from itarflow.evaluation.sweep_plots import draw_curves
from itarflow.runtime.pictures import blank_figure

GRID = ("--guidance-weights", 2, 0, "--t-max", 0.3, 0.5, "--num-denoise-steps", 1, 3)


@pytest.fixture
def extractor() -> TinyExtractor:
    return TinyExtractor()


@pytest.fixture
def itarflow(
    extractor: TinyExtractor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """itarflow("sweep", "--raw"): what is printed; 6 samples of tmp_path/pipeline against tmp_path/photos."""
    return terminal(extractor, monkeypatch, capsys, tmp_path)


@pytest.fixture
def uncurved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves sweep.png out, which takes longer than all the rest."""
    monkeypatch.setattr("itarflow.commands.sweep.draw_curves", lambda *_: None)


def cells(folder: str = "sweep") -> list[dict[str, Any]]:
    return json.loads(Path(folder, "sweep.json").read_text())["cells"]


def times(folder: str, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob(pattern)}


@pytest.mark.slow
def test_a_grid_is_made_with_one_inverse_for_each_weight_and_level(
    itarflow: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse, inverted = TARFlow.inverse, list[tuple[float, float]]()

    def counted(flow: TARFlow, z: Tensor, labels: Any, level: float, *, guidance: Any, **options: Any) -> Tensor:
        inverted.append((guidance.weight, level))
        return inverse(flow, z, labels, level, guidance=guidance, **options)

    monkeypatch.setattr(TARFlow, "inverse", counted)
    printed = itarflow("sweep", *GRID, "--raw")
    assert "12 settings of 6 images: 24 images are generated, 72 denoised and scored, by 96 evaluations" in printed
    assert sorted(inverted) == sorted(list(itertools.product((0.0, 2.0), (0.3, 0.5))) * 2)  # files of 4 and 2 images
    settings = [(cell["t_max"], cell["guidance_weight"], cell["num_denoise_steps"]) for cell in cells()]
    assert settings == list(itertools.product((0.3, 0.5), (0, 2), (0, 1, 3)))
    with Path("sweep/sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["kernel_distance_std"]) for line in lines] == [
        cell["figures"]["kernel_distance"]["std"] for cell in cells()
    ]
    for line, cell in zip(lines, cells(), strict=True):
        assert int(line["samples"]) == 6
        for name in ("guidance_weight", "t_max", "num_denoise_steps"):
            assert float(line[name]) == cell[name]
        for name, figure in cell["figures"].items():
            assert float(line[name]) == figure["value"]
    with Image.open("sweep/sweep_samples.png") as picture:
        assert picture.width == 12 * 98 - 2
    assert Path("sweep/sweep.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("uncurved")
def test_cells_are_what_an_evaluation_finds(itarflow: Run) -> None:
    itarflow("sweep", *GRID, "--raw")
    for index, (weight, level) in enumerate(itertools.product((0, 2), (0.3, 0.5))):
        out = Path(f"alone-{index}")
        itarflow("evaluate", "--guidance-weight", weight, "--t-max", level, "--output", out, "--no-record")
        alone = json.loads((out / "evaluation.json").read_text())["ways"]
        for way, steps in {"raw": 0, "self": 1, "iterative": 3}.items():
            (cell,) = (
                cell
                for cell in cells()
                if (cell["guidance_weight"], cell["t_max"], cell["num_denoise_steps"]) == (weight, level, steps)
            )
            assert cell["figures"] == alone[way]["figures"]
            folder = Path("sweep", Setting(level, weight, steps).generation, Setting(level, weight, steps).variant)
            assert torch.equal(open_samples(folder).read(0, 6), open_samples(out / way).read(0, 6))


@pytest.mark.slow
@pytest.mark.usefixtures("uncurved")
def test_what_was_stopped_goes_on_and_nothing_is_done_twice(
    itarflow: Run, extractor: TinyExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
        done = itertools.count()

        def call(*args: Any, **options: Any) -> Any:
            if next(done) == calls:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    itarflow("sweep", *GRID, "--output", "whole")
    of_data = 16
    assert extractor.seen == of_data + 8 * 6
    for module, name in ((generating, "write_shard"), (evaluating, "score_samples")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, stopping(getattr(module, name), 5))
            with pytest.raises(SystemExit):
                itarflow("sweep", *GRID)
    pictures, kept, extractor.seen = times("sweep", "*.safetensors"), times("sweep", "scores.json"), 0
    assert (len(pictures), len(kept)) == (8 * 2, 5)
    itarflow("sweep", *GRID)
    assert extractor.seen == 3 * 6
    assert times("sweep", "*.safetensors") == pictures
    assert {path: time for path, time in times("sweep", "scores.json").items() if path in kept} == kept
    assert cells() == cells("whole")
    itarflow("sweep", *GRID)
    assert extractor.seen == 3 * 6


@pytest.mark.slow
@pytest.mark.usefixtures("uncurved")
def test_values_are_added_to_what_is_there(itarflow: Run, extractor: TinyExtractor) -> None:
    few = ("--guidance-weights", 0, "--t-max", 0.3)
    itarflow("sweep", *few, "--num-denoise-steps", 1)
    before, extractor.seen = times("sweep", "*.safetensors"), 0
    itarflow("sweep", *GRID)
    assert extractor.seen == 7 * 6
    assert before.items() <= times("sweep", "*.safetensors").items()
    assert len(cells()) == 8
    itarflow("sweep", *few, "--num-denoise-steps", 1, 2, "--output", "other")
    assert cells("other")[0] == cells()[0]


@pytest.mark.usefixtures("uncurved")
def test_other_real_images_are_scored_anew(itarflow: Run, extractor: TinyExtractor) -> None:
    itarflow("sweep")
    first = cells()
    write_photos(Path("others"), count=9)
    itarflow("sweep", "--data", "others")
    assert cells()[0]["reference"] == "others, split train"
    assert cells()[0]["figures"] != first[0]["figures"]
    Path("sweep/guidance-1_t-0.5/steps-03/scores.json").write_text("{")
    extractor.seen = 0
    itarflow("sweep")
    assert extractor.seen == 6
    assert cells() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--t-max", 0.3, 0.7), "t_max: noise_level [0.7"),
        (("--t-max", 0.3, 0.05), "expected 0 < t_min < t_max"),
        (("--num-denoise-steps", 3, 0), "num_denoise_steps is 0; expected numbers of score evaluations >= 1"),
        (("--num-denoise-steps",), "num_denoise_steps has no values"),
        (("--method", "skip", "--num-denoise-steps", 2), "by the method 'skip' images are not denoised"),
        (("--picture-rows", 0), "--picture-rows is 0"),
    ],
)
def test_the_whole_grid_is_refused_before_any_work(
    itarflow: Run, extractor: TinyExtractor, capsys: Any, words: tuple[object, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        itarflow("sweep", *words)
    assert exit_.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split("Error: ")[1].split())
    assert not Path("sweep").exists()
    assert not extractor.seen


@pytest.mark.usefixtures("uncurved")
def test_a_folder_with_other_samples_stays_as_it_is(itarflow: Run, capsys: Any) -> None:
    itarflow("sweep", "--t-max", 0.5)
    before = times("sweep", "*")
    with pytest.raises(SystemExit):
        itarflow("sweep", *GRID, "--guidance-weights", 1, 2, "--seed", 1)
    assert "seed: 0 there, 1 now" in capsys.readouterr().err
    # Not even those folders are begun that hold nothing yet: they would be in the way of the command that goes on.
    assert {path: time for path, time in times("sweep", "*").items() if path.is_file()}.items() <= before.items()


def test_single_flows_know_one_step_and_skipping_ones_none(tmp_path: Path) -> None:
    def opened(name: str, **options: Any) -> ITARFlowPipeline:
        return ITARFlowPipeline.from_pretrained(save_checkpoint(tmp_path / name, **options))

    single = opened("single", noise_conditioned=False)
    assert grid_of(single, raw=True) == [Setting(0.5, 1.0, 0), Setting(0.5, 1.0, 1)]
    with pytest.raises(ValueError, match="num_denoise_steps is 3, but the checkpoint has one noise level alone"):
        grid_of(single, num_denoise_steps=[1, 3])
    assert len(grid_of(single, num_denoise_steps=[1, 3], other_denoiser=True)) == 2
    assert grid_of(opened("skipping", method="skip")) == [Setting(0.5, 1.0, 0)]
    assert grid_of(opened("unlabelled", num_classes=0), labelled=False) == [Setting(0.5, 0.0, 3)]
    # Without labels the checkpoint's own weight plays no part.
    assert grid_of(opened("labelled"), labelled=False) == [Setting(0.5, 0.0, 3)]
    with pytest.raises(ValueError, match="t_max has no values"):
        grid_of(single, t_max=[])


def test_folders_tell_all_settings_apart() -> None:
    assert Setting(0.3, 1.0, 5).generation == "guidance-1_t-0.3"
    assert Setting(0.1 + 0.2, 1.0, 5).generation != Setting(0.3, 1.0, 5).generation
    assert [Setting(0.3, 1, steps).variant for steps in (0, 1, 250)] == ["raw", "steps-01", "steps-250"]


# -- what people look at ----------------------------------------------------------------------------------------


def scores_of(
    weights: Sequence[float], levels: Sequence[float], steps: Sequence[int], value: Callable[[Setting], float]
) -> dict[Setting, Scores]:
    found = {}
    for level, weight, number in itertools.product(levels, weights, steps):
        cell = Setting(level, weight, number)
        figures = {"fid": Figure("FID", "", value(cell)), "recall": Figure("recall", "", value(cell) / 100)}
        found[cell] = Scores(figures, "tiny", 10, 0, "photos", 16, 16, ())
    return found


def test_the_best_is_the_nearest_or_the_highest_and_marked() -> None:
    scores = scores_of((0, 1, 2), (0.3,), (1, 5), lambda cell: 10 + cell.guidance_weight - cell.num_denoise_steps)
    assert best_settings(scores) == {"fid": Setting(0.3, 0, 5), "recall": Setting(0.3, 2, 1)}
    columns = {str(column.header): list(column.cells) for column in table_of(scores).columns}
    assert ["*" in str(text) for text in columns["FID"]] == [False, True, False, False, False, False]
    assert ["*" in str(text) for text in columns["recall"]] == [False, False, False, False, True, False]
    assert columns["steps"] == ["1", "5"] * 3


def test_figures_that_are_not_finite_are_never_best() -> None:
    scores = scores_of((0, 1), (0.3,), (1,), lambda cell: float("nan") if cell.guidance_weight == 0 else 5.0)
    assert best_settings(scores) == {"fid": Setting(0.3, 1, 1), "recall": Setting(0.3, 1, 1)}
    assert best_settings(scores_of((0,), (0.3,), (1,), lambda _: float("inf"))) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "rows", "lines"),
    [
        (((0, 1, 2), (0.1, 0.2), (1, 2, 5)), ["guidance weight", "t_max", "denoising steps"], [2, 3, 3]),
        (((0, 1), (0.2,), (0, 1, 2)), ["guidance weight", "denoising steps"], [3, 2]),
        (((1,), (0.1, 0.2, 0.3), (10,)), ["t_max"], [1]),
        (((1,), (0.1,), (10,)), ["guidance weight"], [1]),
    ],
)
def test_each_setting_with_several_values_has_a_row_of_panels(
    grid: tuple[Any, Any, Any], rows: list[str], lines: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def kept(*size: float) -> Any:
        drawn.append(blank_figure(*size))
        return drawn[-1]

    monkeypatch.setattr(curves, "blank_figure", kept)
    scores = scores_of(*grid, lambda cell: 100 * cell.t_max + cell.guidance_weight + 50 / (1 + cell.num_denoise_steps))
    draw_curves(scores, tmp_path / "sweep.png")
    first, second = drawn[0].axes[::2], drawn[0].axes[1::2]
    assert [panel.get_xlabel() for panel in first] == rows
    # The best by the first figure is on every one of its panels, as a star.
    assert [len(panel.get_lines()) - 1 for panel in first] == lines
    assert first[0].get_title() == "FID, lower is better"
    assert second[0].get_title() == "recall, higher is better"
    assert (tmp_path / "sweep.png").stat().st_size > 5_000
    best = min(one.figures["fid"].value for one in scores.values())
    assert all(panel.get_lines()[-1].get_ydata()[0] == best for panel in first)


@pytest.mark.slow
@pytest.mark.usefixtures("uncurved")
def test_wide_grids_of_images_go_on_below(itarflow: Run) -> None:
    itarflow("sweep", *GRID, "--raw", "--picture-rows", 2)
    wide = [Setting(level, weight, steps) for level in (0.3, 0.5) for weight in (0, 2) for steps in (0, 1, 3)]
    curves.draw_images(wide, Path("sweep"), Path("folded.png"), count=1, widest=98 * 4)
    with Image.open("folded.png") as folded, Image.open("sweep/sweep_samples.png") as flat:
        assert folded.width == 3 * 98 - 2  # the three ways of a setting stay together
        assert folded.height > 4 * 96
        assert flat.height - 2 * 96 < 96  # two rows and a title


@pytest.mark.usefixtures("uncurved")
def test_temperatures_and_methods_are_swept_over(itarflow: Run) -> None:
    words = ("--guidance-weights", 1, 2, "--guidance-temperatures", 0.8, 1.2, "--method", "heun", "euler")
    printed = itarflow("sweep", *words, "--num-denoise-steps", 1, 3, "--guidance-rule", "gaussian")
    found = [(one["guidance_weight"], one["temperature"], one["num_denoise_steps"], one["method"]) for one in cells()]
    assert found == list(itertools.product((1, 2), (0.8, 1.2), (1, 3), ("heun", "euler")))
    assert {"tau", "method"} <= set(printed.replace("│", " ").replace("┃", " ").split())
    manifest = json.loads(Path("sweep", "guidance-2_tau-0.8_t-0.5", "samples.json").read_text())
    assert (manifest["guidance"]["temperature"], manifest["guidance"]["rule"]) == (0.8, "gaussian")
    assert manifest["cleaning"]["steps-03-heun"]["method"] == "heun"
    with Path("sweep", "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert (rows[0]["temperature"], rows[0]["method"]) == ("0.8", "heun")
    assert Image.open(Path("sweep", "sweep_samples.png")).width > 0


def test_curves_have_an_axis_for_each_setting_with_several_values(tmp_path: Path) -> None:
    settings = [
        Setting(0.5, weight, steps, tau, method)
        for weight, steps, tau, method in itertools.product((1.0, 2.0), (1, 4), (0.8, 1.2), ("euler", "heun"))
    ] + [Setting(0.5, 1.0, 0, 0.8)]
    scores = {
        one: Scores({"fid": Figure("FID", "", number + 1.0)}, "tiny", 10, 0, "photos", 16, 16, ())
        for number, one in enumerate(settings)
    }
    draw_curves(scores, tmp_path / "all.png")
    few = {one: value for one, value in scores.items() if one.temperature == 0.8 and one.method == "euler"}
    draw_curves(few, tmp_path / "few.png")
    heights = [Image.open(tmp_path / name).height for name in ("all.png", "few.png")]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.05)  # weight, temperature, steps, method; weight, steps
