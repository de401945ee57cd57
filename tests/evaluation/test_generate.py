import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vae
from safetensors.torch import load_file, save_file

from itarflow.codec import PixelCodec, to_uint8
from itarflow.denoisers import DenoiseScheduler
from itarflow.evaluation.samples.denoising import VARIANTS, Denoising, variants_of
from itarflow.evaluation.samples.files import open_samples, shard_name, write_shard
from itarflow.evaluation.samples.generate import Generation, begin_generation, labels_by, save
from itarflow.flow import TARFlow
from itarflow.inverse import Guidance, sequential
from itarflow.pipeline import ITARFlowPipeline
from itarflow.runtime.errors import DataError
from itarflow.runtime.seeds import image_generators


def tiny(num_classes: int = 3) -> ITARFlowPipeline:
    torch.manual_seed(0)
    flow = TARFlow(4, 1, 2, 64, (1, 1), num_classes=num_classes, noise_range=(0.05, 0.5))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = ITARFlowPipeline(flow.eval(), DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=3), {"weight": 1.0})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generation(pipe: ITARFlowPipeline | None = None, count: int = 10, **options: Any) -> Generation:
    pipe = pipe or tiny()
    labels = labels_by("balanced", count, pipe.flow.config.num_classes)
    return Generation(
        **{"pipe": pipe, "variants": variants_of(pipe, pipe.schedule()), "labels": labels, "batch_size": 4, **options}
    )


def make(wanted: Generation, folder: Path, processes: int = 1) -> dict[str, torch.Tensor]:
    wanted.check()
    begin_generation(wanted, folder)
    for index in range(processes):
        save(wanted, folder, process_index=index, num_processes=processes)
    return {name: open_samples(folder / name).read(0, len(wanted.labels)) for name in wanted.variants}


def test_any_number_of_processes_writes_the_same_files(tmp_path: Path) -> None:
    make(generation(), tmp_path / "one")
    make(generation(), tmp_path / "three", processes=3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 1 + 3 * 3
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "three" / path).read_bytes()


def test_what_was_killed_goes_on_and_makes_only_what_is_missing(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill_after_two(_: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    wanted, calls = generation(), list[int]()
    assert begin_generation(wanted, tmp_path / "stopped") == 30
    with pytest.raises(Killed):
        save(wanted, tmp_path / "stopped", count=kill_after_two)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.safetensors")}
    assert begin_generation(wanted, tmp_path / "stopped") == 30 - 8
    counts = list[int]()
    save(wanted, tmp_path / "stopped", count=counts.append)
    assert sum(counts) == 22
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for name, images in make(wanted, tmp_path / "whole").items():
        assert torch.equal(open_samples(tmp_path / "stopped" / name).read(0, 10), images)


def test_image_i_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    few, many = make(generation(count=5), tmp_path / "few"), make(generation(count=10), tmp_path / "many")
    other = make(generation(count=5, batch_size=5), tmp_path / "other")
    for name in few:
        assert (few[name].int() - many[name][:5].int()).abs().max() <= 1
        assert (few[name].int() - other[name].int()).abs().max() <= 1
    assert not torch.equal(few["raw"], make(generation(count=5, seed=1), tmp_path / "seed")["raw"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 3}, "seed"), ({"guidance": Guidance(weight=2.0)}, "guidance"), ({"count": 11}, "num_samples")],
)
def test_a_folder_goes_on_only_with_what_began_it(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    begin_generation(generation(), tmp_path)
    with pytest.raises(DataError, match=named):
        begin_generation(generation(**changes), tmp_path)
    other = tiny()
    with torch.no_grad():
        next(other.flow.parameters()).add_(1)
    with pytest.raises(DataError, match="flow"):
        begin_generation(generation(other), tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        begin_generation(generation(), tmp_path)


def test_a_folder_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"a photograph")
    with pytest.raises(DataError, match=r"holds other things, of unknown origin, such as cat.jpg"):
        begin_generation(generation(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.jpg"]


def test_a_refusal_says_what_differs_and_no_checksums(tmp_path: Path) -> None:
    begin_generation(generation(), tmp_path)
    other = tiny()
    with torch.no_grad():
        next(other.flow.parameters()).add_(1)
    changed = generation(other, guidance=Guidance(weight=2.0, rule="gaussian"))
    with pytest.raises(DataError) as refusal:
        begin_generation(changed, tmp_path)
    message = str(refusal.value)
    for words in ("other flow; ", "guidance.weight: 1.0 there, 2.0 now", "guidance.rule: scale there, gaussian now"):
        assert words in message
    assert "self samples: other denoiser" in message
    assert re.search("[0-9a-f]{16}", message.replace(str(tmp_path), "")) is None


def _swapped(folder: Path) -> None:
    (folder / shard_name(4, 8)).write_bytes((folder / shard_name(0, 4)).read_bytes())


def _flipped(folder: Path) -> None:
    path = folder / shard_name(4, 8)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))


def _fewer(folder: Path) -> None:
    path = folder / shard_name(4, 8)
    some = {name: tensor[:3] for name, tensor in load_file(path).items()}
    write_shard(path, some["images"], some["labels"], some["broken"], "")


def _others(folder: Path) -> None:
    path = folder / shard_name(4, 8)
    tensors = load_file(path)
    write_shard(path, 255 - tensors["images"], tensors["labels"], tensors["broken"], "another seed's")


@pytest.mark.parametrize("spoil", [_swapped, _flipped, _fewer, _others])
def test_files_that_are_not_what_they_were_are_refused_and_made_again(tmp_path: Path, spoil: Any) -> None:
    wanted = generation()
    whole = make(wanted, tmp_path)["self"]
    spoil(tmp_path / "self")
    spoilt = (tmp_path / "self" / shard_name(4, 8)).read_bytes()
    with pytest.raises(DataError, match=r"00000004-00000008\.safetensors is not what its name says"):
        open_samples(tmp_path / "self")
    reports = list[str]()
    assert begin_generation(wanted, tmp_path, report=reports.append) == 4
    assert reports[0].startswith("1 files of samples are made again")
    assert (tmp_path / "self" / f".damaged-{shard_name(4, 8)}").read_bytes() == spoilt
    save(wanted, tmp_path)
    assert torch.equal(open_samples(tmp_path / "self").read(0, 10), whole)


def _as_of_version_0_1(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path)  # without metadata


def test_samples_of_version_0_1_are_gone_on_with(tmp_path: Path) -> None:
    wanted = generation()
    whole = make(wanted, tmp_path)
    _as_of_version_0_1(tmp_path)
    for name, images in whole.items():
        assert torch.equal(open_samples(tmp_path / name).read(0, 10), images)
    (tmp_path / "raw" / shard_name(8, 10)).unlink()
    reports = list[str]()
    assert begin_generation(wanted, tmp_path, report=reports.append) == 2
    assert len(reports) == 1
    assert reports[0].startswith("8 files of samples had no checksum")
    assert torch.equal(open_samples(tmp_path / "self").read(0, 10), whole["self"])
    _flipped(tmp_path / "self")  # is noticed from now on
    with pytest.raises(DataError, match="its checksum"):
        open_samples(tmp_path / "self")


@pytest.mark.parametrize(
    "change",
    [
        lambda one: {**one, "labels": one["labels"].flip(0)},
        lambda one: {**one, "labels": one["labels"].float()},
        lambda one: {**one, "broken": one["broken"].long()},
        lambda one: {**one, "images": one["images"].float()},
        lambda one: {**one, "images": one["images"][..., :3].contiguous()},
        lambda one: {name: tensor[:3] for name, tensor in one.items()},
        lambda one: {"images": one["images"]},
    ],
)
def test_files_without_a_checksum_that_do_not_fit_are_made_again(tmp_path: Path, change: Any) -> None:
    wanted = generation()
    whole = make(wanted, tmp_path)["self"]
    _as_of_version_0_1(tmp_path)
    path = tmp_path / "self" / shard_name(4, 8)
    save_file(change(load_file(path)), path)
    reports = list[str]()
    assert begin_generation(wanted, tmp_path, report=reports.append) == 4
    assert reports[0].startswith("1 files of samples are made again")
    save(wanted, tmp_path)
    assert torch.equal(open_samples(tmp_path / "self").read(0, 10), whole)


def test_what_can_not_be_read_just_now_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    make(generation(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("itarflow.evaluation.samples.files.safe_open", fails)
    with pytest.raises(OSError, match="Input/output error"):
        begin_generation(generation(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    wanted = generation()
    whole = make(wanted, tmp_path)["self"]
    pipe = tmp_path / "self" / shard_name(4, 8)
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="no regular file"):
        open_samples(tmp_path / "self")
    assert begin_generation(wanted, tmp_path) == 4
    save(wanted, tmp_path)
    assert torch.equal(open_samples(tmp_path / "self").read(0, 10), whole)


def test_a_link_in_place_of_a_variants_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "named").symlink_to("real")  # a folder that is named may be a link
    (tmp_path / "real").mkdir()
    make(generation(), tmp_path / "named")
    shutil.rmtree(tmp_path / "real" / "self")
    (tmp_path / "real" / "self").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"named/self is a link to another folder"):
        begin_generation(generation(), tmp_path / "named")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_files_more_or_fewer_than_asked_for_are_refused(tmp_path: Path) -> None:
    wanted = generation()
    make(wanted, tmp_path)
    last = tmp_path / "raw" / shard_name(8, 10)
    stray = tmp_path / "raw" / shard_name(10, 12)
    stray.write_bytes(last.read_bytes())
    with pytest.raises(DataError, match=r"00000010-00000012\.safetensors is not of these 10 images"):
        begin_generation(wanted, tmp_path)
    with pytest.raises(DataError, match="is not what its name says"):
        open_samples(tmp_path / "raw")
    stray.unlink()
    last.unlink()
    with pytest.raises(DataError, match=r"holds 8 images, but 10 by its samples.json"):
        open_samples(tmp_path / "raw")


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"num_samples": 10, "cleaning": []}', '{"cleaning": {}}', "[" * 10**5]
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    make(generation(), tmp_path)
    (tmp_path / "samples.json").write_text(content)
    for use in (lambda: begin_generation(generation(), tmp_path), lambda: open_samples(tmp_path / "raw")):
        with pytest.raises(DataError, match=r"samples.json is damaged"):
            use()


def test_the_last_file_is_inverted_as_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def planned(size: int, _dtype: torch.dtype | None = None) -> Any:
        asked.append(size)
        return sequential

    pipe = tiny()
    monkeypatch.setattr(pipe, "planned_solver", planned)
    make(generation(pipe, count=6), tmp_path)
    assert set(asked) == {4}


def test_images_that_are_not_finite_are_grey_and_counted(tmp_path: Path) -> None:
    def diverges(noisy: torch.Tensor, labels: torch.Tensor | None, noise_level: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(noisy))[:, None, None, None] == 1, torch.nan, noisy)

    pipe = tiny()
    bad = {"bad": Denoising("bad", PixelCodec(), diverges, pipe.schedule(num_denoise_steps=1))}
    images = make(generation(pipe, variants=bad), tmp_path)["bad"]
    assert open_samples(tmp_path / "bad").broken.tolist() == [1, 5, 9]
    assert (images[[1, 5, 9]] == 128).all()


def test_what_can_not_be_made_is_refused() -> None:
    pipe = tiny()
    for wrong, message in (
        (generation(pipe, count=0), "no images"),
        (generation(pipe, batch_size=0), "batch_size"),
        (generation(pipe, labels=torch.tensor([3])), "labels reach from 3 to 3"),
        (generation(pipe, labels=torch.tensor([-2])), "labels reach from -2"),
        (generation(pipe, t_max=0.9), "t_max"),
        (generation(pipe, t_max=0.4), "self denoises from t_max 0.5"),
        (generation(pipe, labels=torch.full((2,), -1), guidance=Guidance(weight=1.0)), "no labels to guide by"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.check()
    with pytest.raises(ValueError, match="labels is 'some'"):
        labels_by("some", 3, 3)  # type: ignore[arg-type]


def test_labels_are_balanced_or_random_and_grow_at_the_end() -> None:
    assert labels_by("balanced", 1000, 7).bincount().tolist() == [143] * 6 + [142]
    drawn = labels_by("random", 7000, 7, seed=2)
    assert torch.equal(drawn[:100], labels_by("random", 100, 7, seed=2))
    assert not torch.equal(drawn, labels_by("random", 7000, 7, seed=3))
    # Four standard deviations of a binomial count.
    assert (drawn.bincount(minlength=7) - 1000).abs().max() < 4 * (7000 / 7 * 6 / 7) ** 0.5
    assert labels_by("random", 3, 0).tolist() == [-1] * 3
    assert labels_by("none", 3, 7).tolist() == [-1] * 3


def test_unlabelled_flows_make_unlabelled_images(tmp_path: Path) -> None:
    made = make(generation(tiny(num_classes=0)), tmp_path)
    assert made["raw"].shape == (10, 1, 4, 4)
    assert json.loads((tmp_path / "samples.json").read_text())["guidance"]["weight"] == 1.0


def test_codes_are_decoded_and_the_vae_is_a_part_of_what_is_made(tmp_path: Path) -> None:
    def latent(seed: int) -> ITARFlowPipeline:
        vae = tiny_vae("AutoencoderTiny", seed=seed, in_channels=3, out_channels=3)
        torch.manual_seed(0)
        flow = TARFlow(4, vae.config.latent_channels, 2, 64, (1, 1), num_classes=3, noise_range=(0.05, 0.5))
        pipe = ITARFlowPipeline(flow.eval(), DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2), vae=vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipe = latent(seed=0)
    made = make(generation(pipe, count=5, variants=variants_of(pipe, pipe.schedule(), decode_size=2)), tmp_path)
    assert {name: tuple(images.shape) for name, images in made.items()} == dict.fromkeys(
        VARIANTS, (5, *pipe.picture_shape)
    )
    generators = image_generators(torch.Generator().manual_seed(0), 5)
    images = pipe(class_labels=[0, 1, 2, 0, 1], generator=generators, output_type="pt", batch_size=4).images
    assert (made["iterative"].int() - to_uint8(images * 2 - 1).int()).abs().max() <= 1
    other = latent(seed=1)
    with pytest.raises(DataError, match="decoder"):
        begin_generation(generation(other, count=5, variants=variants_of(other, other.schedule())), tmp_path)
