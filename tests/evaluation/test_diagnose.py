"""The diagnosis: planted failures are found at their rate, whole images are left alone, and files say which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import tyro
from image_files import damage
from natural_images import blurred, blurred_tokens, natural_images, with_background
from PIL import Image
from torch import Tensor

from itarflow.commands import cli
from itarflow.commands.diagnose import Diagnose, telling_names
from itarflow.data.dataset import Example, ImageDataset
from itarflow.evaluation.diagnosis.diagnose import FEW_IN_COMMON, Diagnosis, diagnose
from itarflow.evaluation.diagnosis.rates import KINDS, RealImages, rate
from itarflow.evaluation.metrics.extractors import INCEPTION, Features
from itarflow.evaluation.samples.files import ArraySamples, Samples, shard_name, write_shard


def as_samples(images: Tensor, broken: tuple[int, ...] = (), name: str = "given") -> ArraySamples:
    array = images.permute(0, 2, 3, 1).contiguous().numpy()
    return ArraySamples(name, array, None, torch.tensor(broken, dtype=torch.int64))


@pytest.fixture(scope="module")
def real() -> Samples:
    return as_samples(natural_images(2000), name="real")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves diagrams and contact sheets out, which take longer than all the rest."""
    for name in ("draw_detail", "_save_sheet"):
        monkeypatch.setattr(f"itarflow.evaluation.diagnosis.diagnose.{name}", lambda *_: None)


def planted(kind: str, where: slice) -> Tensor:
    """400 images, of which some fail."""
    images = natural_images(400, seed=1)
    part = images[where]
    failed = {"black": with_background(part, 3, 2), "flat": with_background(part, 140, 1), "blurred": blurred(part)}
    images[where] = failed[kind]
    return images


@pytest.mark.usefixtures("undrawn")
def test_planted_failures_are_found_at_their_rate(real, tmp_path):
    where = slice(60, 80)  # 5 %
    sets = {kind: as_samples(planted(kind, where)) for kind in ("black", "flat", "blurred")}
    diagnosis = diagnose(sets, real, output=tmp_path)
    numbers = json.loads((tmp_path / "failures.json").read_text())
    for kind in sets:
        found = diagnosis.samples[kind].failures
        assert 0.01 < found[kind].excess.low < 0.05 < found[kind].excess.high
        assert found["any"].rate.count >= found[kind].rate.count == len(numbers[kind][kind])
        assert set(range(60, 80)) <= set(numbers[kind][kind])


@pytest.mark.usefixtures("undrawn")
def test_images_of_which_a_half_is_blurred_are_found(real, tmp_path):
    images = natural_images(200, seed=8)
    images[:60, :, 16:] = blurred(images[:60])[:, :, 16:]
    found = diagnose({"a": as_samples(images)}, real, output=tmp_path).samples["a"].failures["blurred"]
    assert found.excess.low < 0.3 < found.excess.high
    numbers = json.loads((tmp_path / "failures.json").read_text())["a"]["blurred"]
    assert len({*range(60)} & set(numbers)) >= 57
    assert len(set(numbers) - {*range(60)}) <= 6


@pytest.mark.usefixtures("undrawn")
def test_whole_images_fail_at_about_the_nominal_rate(real, tmp_path):
    diagnosis = diagnose({"a": as_samples(natural_images(1000, seed=2))}, real, output=tmp_path, nominal_rate=0.05)
    findings = diagnosis.samples["a"]
    for kind in ("black", "flat", "blurred"):
        assert 0.02 < findings.failures[kind].rate.value < 0.09
        assert 0.02 < diagnosis.reference["failures"][kind].value < 0.09
        excess = findings.failures[kind].excess
        assert excess.low < 0 < excess.high
    assert findings.onset is None
    low, median, high = np.log2(findings.detail)
    assert np.abs(median).max() < 0.5
    np.testing.assert_allclose((low, high), np.log2(diagnosis.reference["detail"])[[0, 2]], atol=0.5)


@pytest.mark.usefixtures("undrawn")
def test_the_half_that_sets_a_threshold_is_not_the_one_that_is_judged(tmp_path):
    images = natural_images(800)
    images[::2] = with_background(images[::2], 3, 2)  # all that set thresholds, so that black is normal to them
    diagnosis = diagnose({"a": as_samples(images[:100])}, as_samples(images), output=tmp_path, nominal_rate=0.05)
    assert diagnosis.reference["failures"]["black"].total == 400
    assert diagnosis.reference["failures"]["black"].count == 0
    assert diagnosis.measures["black"]["threshold"] < 10


@pytest.mark.usefixtures("undrawn")
def test_where_blur_begins_is_found(real, tmp_path):
    late = as_samples(blurred_tokens(natural_images(100, seed=3), 4, range(40, 64)))
    found = diagnose({"late": late}, real, output=tmp_path, patch_size=4).samples["late"]
    assert found.onset is not None
    assert found.onset.order == "raster"
    assert abs(found.onset.token - 40) <= 1
    few = as_samples(blurred_tokens(natural_images(FEW_IN_COMMON - 1, seed=3), 4, range(40, 64)))
    assert diagnose({"few": few}, real, output=tmp_path, patch_size=4).samples["few"].onset is None
    median = np.array(found.detail)[1]
    assert median[48:].max() < 0.3 < 0.6 < median[:32].min()


@pytest.mark.usefixtures("undrawn")
def test_sets_are_compared_with_the_first(real, tmp_path):
    sets = {
        "whole": as_samples(natural_images(200, seed=4)),
        "black": as_samples(planted("black", slice(80))),
        "other": as_samples(natural_images(200, seed=5)),
    }
    differences = diagnose(sets, real, output=tmp_path).differences
    assert list(differences) == ["black", "other"]
    assert differences["black"]["collapsed"].value == pytest.approx(0.2, abs=0.03)
    assert differences["black"]["collapsed"].low > 0.1
    assert all(other.low < 0 < other.high for other in differences["other"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_broken_images_are_counted_on_their_own(real, tmp_path):
    images, broken = natural_images(200, seed=5), (0, 1, 2, 150)  # the first batch is broken from end to end
    images[list(broken)] = 128  # as `itarflow evaluate` stores them: flat and blurred
    diagnosis = diagnose({"a": as_samples(images, broken)}, real, output=tmp_path, batch_size=3)
    findings = diagnosis.samples["a"]
    assert findings.broken == rate(4, 200)
    assert findings.failures["any"].rate.total == 196
    numbers = json.loads((tmp_path / "failures.json").read_text())["a"]
    assert numbers["broken"] == list(broken)
    assert not {*broken} & set(numbers["any"])
    with pytest.raises(ValueError, match="all 2 images of given are broken"):
        diagnose({"a": as_samples(images[:2], (0, 1))}, real, output=tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_grey_images_and_other_batches(tmp_path):
    real = as_samples(natural_images(1000, 16, 1))
    given = {"a": as_samples(natural_images(150, 16, 1, seed=6))}
    reports = [
        diagnose(given, real, output=tmp_path, nominal_rate=0.02, batch_size=size).samples["a"] for size in (7, 200)
    ]
    assert reports[0].failures == reports[1].failures
    np.testing.assert_allclose(reports[0].detail, reports[1].detail, rtol=1e-4)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("there", "taken", "advice"),
    [(120, 120, "which is inexact"), (120, 60, "take all 120"), (220, 60, "take 200 or more")],
)
def test_more_real_images_are_asked_for_where_there_are_more(there, taken, advice, tmp_path):
    images = natural_images(there, 8)
    real = RealImages("real", cast(ImageDataset, [Example(image, -1, None) for image in images]), taken)
    (note,) = diagnose({"a": as_samples(images[:100])}, real, output=tmp_path, nominal_rate=0.1).notes
    assert note.endswith(advice)


def test_files(tmp_path):
    real = as_samples(natural_images(400, 8))
    sets = {"one": as_samples(natural_images(100, 8, seed=8)), "two": as_samples(blurred(natural_images(100, 8)))}
    output = tmp_path / "new" / "diagnosis"
    old = output / "one" / "blurred.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    diagnosis = diagnose(sets, real, output=output, nominal_rate=0.02, worst=10)
    (note,) = diagnosis.notes
    assert note.startswith("of 400 real images only 4 of the half")
    assert "take" not in note
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    numbers = json.loads((output / "failures.json").read_text())
    kinds = ("black", "flat", "blurred")
    sheets = {f"{name}/{kind}.png" for name in sets for kind in kinds if numbers[name][kind]}
    sheets |= {f"reference/{kind}.png" for kind in kinds}
    assert "one/blurred.png" not in sheets
    assert written == {"report.json", "failures.json", "detail.png", *sheets}
    report = json.loads((output / "report.json").read_text())
    assert set(report["samples"]["two"]["failures"]) == set(KINDS)
    assert report["samples"]["two"]["failures"]["blurred"]["rate"]["count"] == (
        diagnosis.samples["two"].failures["blurred"].rate.count
    )
    for name in written - {"report.json", "failures.json"}:
        with Image.open(output / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert len(numbers["two"]["blurred"]) > 10
    with Image.open(output / "two" / "blurred.png") as sheet:  # ten images, eight a row
        assert sheet.width > 8 * 96
        assert sheet.height > 2 * 96


class MeanAndSpread:
    """An extractor of two features."""

    identity = "0"

    def __init__(self, name: str = "mean-and-spread") -> None:
        self.name = name

    def __call__(self, images: Tensor) -> Features:
        values = images.float().flatten(1)
        return Features(torch.stack([values.mean(dim=1), values.std(dim=1)], dim=1))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_distance_without_failures_is_smaller_than_that_of_as_many(real, tmp_path):
    given: dict[str, Any] = {"a": as_samples(planted("black", slice(80)))}
    found = diagnose(given, real, output=tmp_path, extractor=MeanAndSpread()).samples["a"]
    apart = found.distances
    assert apart is not None
    assert apart.title == "Fréchet distance (mean-and-spread)"
    assert apart.images == 400
    assert apart.kept == 400 - found.failures["any"].rate.count
    assert apart.without < 0.3 * apart.as_many
    assert apart.as_many == pytest.approx(apart.distance, rel=0.3)
    as_planted = torch.cat([torch.from_numpy(real.array).permute(0, 3, 1, 2), torch.zeros(9, 3, 32, 32).byte()])
    with_broken = as_samples(as_planted, tuple(range(2000, 2009)))
    again = diagnose(given, with_broken, output=tmp_path, extractor=MeanAndSpread(INCEPTION), batch_size=9).samples[
        "a"
    ]
    assert again.distances is not None
    assert again.distances.title == "FID"
    assert again.distances.as_many == pytest.approx(apart.as_many, rel=1e-4)


@pytest.mark.usefixtures("undrawn")
def test_what_real_images_have_too_often_is_left_out(tmp_path):
    images = natural_images(400, 16, 1)
    images[::8] = with_background(images[::8], 0)
    real = as_samples(torch.cat([images, images]))
    diagnosis = diagnose({"a": as_samples(images[:99])}, real, output=tmp_path, nominal_rate=0.05)
    few, blind, _ = diagnosis.notes
    assert few.startswith("a has 99 images")
    assert blind.startswith("background brightness is 0 in more than 5 % of the real images")
    assert diagnosis.measures["black"]["threshold"] is None
    assert diagnosis.samples["a"].failures["black"].rate.count == 0


def refused(match: str, tmp_path: Path, *, given: Tensor, real: Tensor, **settings: Any) -> Diagnosis | None:
    with pytest.raises(ValueError, match=match):
        diagnose({"a": as_samples(given)}, as_samples(real), output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    return None


def test_what_can_not_be_diagnosed_is_refused(tmp_path):
    small, large = natural_images(200, 16), natural_images(2, 32)
    refused(r"shape \(C, H, W\) \(3, 32, 32\), the real ones \(3, 16, 16\)", tmp_path, given=large, real=small)
    refused("too few to tell a share of 0.001", tmp_path, given=small, real=small, nominal_rate=0.001)
    refused("nominal_rate is 0.7", tmp_path, given=small, real=small, nominal_rate=0.7)
    refused("patch size 5 does not divide the 16", tmp_path, given=small, real=small, patch_size=5)
    refused("worst is 0", tmp_path, given=small, real=small, worst=0)
    refused("a has no images", tmp_path, given=small[:0], real=small)
    refused("expected squares of 8 x 8", tmp_path, given=small[..., :4, :4], real=small[..., :4, :4])
    with pytest.raises(ValueError, match="the name 'reference' of samples"):
        diagnose({"reference": as_samples(small)}, as_samples(small), output=tmp_path)
    with pytest.raises(ValueError, match="no samples are named"):
        diagnose({}, as_samples(small), output=tmp_path)


@pytest.mark.slow
def test_the_command_shows_sets_side_by_side(tmp_path, capsys):
    folder = tmp_path / "data" / "train" / "pets"
    folder.mkdir(parents=True)
    for index, image in enumerate(natural_images(240, 8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03}.png")
    damage(folder / "017.png")
    np.savez(tmp_path / "without.npz", arr_0=natural_images(120, 8, seed=1).permute(0, 2, 3, 1).numpy())
    stored = tmp_path / "with" / "iterative"
    broken = torch.arange(120) == 7
    write_shard(stored / shard_name(0, 120), natural_images(120, 8, seed=2), torch.full((120,), -1), broken)
    paths = [str(tmp_path / "without.npz"), str(stored)]
    words = ["--reference", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--nominal-rate", "0.1"]
    cli.main(["diagnose", *paths, *words])
    printed = " ".join(capsys.readouterr().out.split())
    assert "black or flat" in printed
    assert "any of these" in printed
    assert "without.npz: no token was found from which on, or up to which, all images have blur in common." in printed
    assert "with-iterative less without.npz: black background " in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["samples"]) == ["without.npz", "with-iterative"]
    assert report["samples"]["with-iterative"]["broken"]["count"] == 1
    assert report["reference"]["images"] == 239
    (unreadable,) = report["reference"]["unreadable"]
    assert unreadable.startswith("train/pets/017.png: ")
    assert f"Unreadable real images, left out: 1, such as {unreadable}" in printed


def test_the_real_images_may_be_called_data():
    for option in ("--reference", "--data"):
        assert tyro.cli(Diagnose, args=["samples", option, "cifar10"]).reference == "cifar10"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/evaluation/iterative"], ["iterative"]),
        (["a/evaluation/iterative", "b/evaluation/iterative"], ["a", "b"]),
        (["a/b", "a/b/c"], ["b", "c"]),
        (["/x y/s.npz"], ["s.npz"]),
    ],
)
def test_names_tell_sets_apart(paths, names):
    assert telling_names([Path(path) for path in paths]) == names
    with pytest.raises(ValueError, match="is named twice"):
        telling_names([Path("a"), Path("b"), Path("a")])
