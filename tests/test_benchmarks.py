"""The runner of benchmarks/: every path gives figures, and the comparison with a peer finds what differs."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from image_files import write_classes
from rich.console import Console

from itarflow import ITARFlowPipeline, TARFlow
from itarflow.denoisers import DenoiseScheduler
from itarflow.flow.embedding import NULL_LABEL
from itarflow.pipeline.plan import place_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import floors
import measure
import ood
import peaks
import run
from costs import Peak
from paths import Sample, Score
from subject import Options, open_subject
from timing import Failure, Timing, Variant, timed_in_turns, working_memory

TINY = ("--width", "64", "--image-size", "8", "--patch-size", "4", "--layers", "1", "1", "--classes", "3")
QUICK = ("--batch-sizes", "2", "3", "--repeats", "2", "--device", "cpu", "--no-memory")
PEER = '''
"""The official model's signatures around one of our flows, whose samples are moved by OFFSET."""
import torch
from itarflow import Guidance, TARFlow
from itarflow.convert import our_weights

class Model(torch.nn.Module):
    def __init__(self, in_channels, img_size, patch_sizes, channels, num_blocks, layers_per_block, nvp=True,
                 num_classes=0, input_scale=1, attn_dropout=0, shared_backbone_layers=0):
        super().__init__()
        self.flow = TARFlow(img_size, in_channels, patch_sizes * (num_blocks if len(patch_sizes) == 1 else 1),
                            channels * (num_blocks if len(channels) == 1 else 1), layers_per_block, num_classes,
                            volume_preserving=not nvp, shared_layers=shared_backbone_layers, input_scale=input_scale)

    def load_state_dict(self, state):
        self.flow.load_state_dict(our_weights(state, self.flow))

    def forward(self, x, y=None, t=None):
        z, log_det = self.flow(x, y, t[:, 0])
        return z, [], log_det / z[0].numel(), []

    def get_loss(self, z, logdets, mid_vars, t):
        return ((0.5 * z.pow(2).mean(dim=[1, 2]) - logdets) * t).mean()

    def reverse(self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False,
                return_sequence=False, guide_flows=-1, t=None, lerp_style="tarflow"):
        blocks = None if guide_flows < 0 else guide_flows
        schedule = "linear" if annealed_guidance else "constant"
        guidance = Guidance(weight=guidance, rule="scale", schedule=schedule, blocks=blocks)
        return OFFSET + self.flow.inverse(x * self.flow.prior_variance.sqrt(), y, t[:, 0], guidance=guidance)
'''


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch):
    """Not measured, which takes a second."""
    known = {dtype: Peak("a device", dtype, 1e9, 1e9) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(measure, "measured_peaks", lambda device: known)
    monkeypatch.setattr(floors, "measured_peaks", lambda device: known)


def clone(folder: Path, offset: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "transformer_flow.py").write_text(PEER.replace("OFFSET", str(offset)))
    return folder


def records(path: str, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    run.main([path, *TINY, *QUICK, "--json", str(tmp_path / "out" / "figures.json"), *words])
    return json.loads((tmp_path / "out" / "figures.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("words", [("train",), ("train", "--dtype", "bf16"), ("inverse",), ("score",), ("sample",)])
def test_every_path_is_compared_with_a_peer_of_the_same_weights(words, tmp_path, capsys):
    found = records(words[0], tmp_path, *words[1:], "--peer", str(clone(tmp_path)))
    assert {record["batch_size"] for record in found} == {2, 3}
    assert {record["path"] for record in found} == {words[0]}
    ours, theirs = ([r for r in found if (r["variant"] == "peer") is peer] for peer in (False, True))
    assert ours
    assert theirs
    for record in ours:
        matching = {"case": record["case"], "batch_size": record["batch_size"]}
        (peer,) = (r for r in theirs if all(r[name] == value for name, value in matching.items()))
        assert record["times_as_fast"] == pytest.approx(peer["seconds"] / record["seconds"])
        assert record["reference"] == "peer"
        exact = record["dtype"] == "float32" and record["variant"] != "ours, fast"
        assert 0 <= record["largest_difference"] < (1e-5 if exact else 0.1)
        assert record["lower_quartile"] <= record["seconds"] <= record["upper_quartile"]
        assert record["times_floor"] == pytest.approx(record["seconds"] / record["floor_seconds"])
        assert record["command"].startswith(f"python benchmarks/run.py {words[0]} --width 64")
    assert all(record["reference"] is None and record["largest_difference"] is None for record in theirs)
    assert "x peer" in capsys.readouterr().out


@pytest.mark.slow
def test_everything_is_measured_in_one_call_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "timed_in_turns", lambda variants, _repeats, _warm, device, until: timed_in_turns(
        variants, 1, 0, device))  # fmt: skip
    words = ("--peer", str(clone(tmp_path)), "--out", str(tmp_path / "all"))
    run.main(["everything", *TINY, *QUICK, *words])
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "all").iterdir()}
    assert found.keys() == {"inverse", "score", "sample", "train"}
    assert {record["dtype"] for record in found["train"]} == {"bf16"}
    monkeypatch.setattr(Score, "cases", lambda *_: 1 / torch.zeros(1, device="abacus"))
    with pytest.raises(SystemExit):
        run.main(["everything", *TINY, *QUICK, *words[:2], "--out", str(tmp_path / "some")])
    assert {path.stem for path in (tmp_path / "some").iterdir()} == {"inverse", "sample", "train"}
    assert "of score not all could be measured" in capsys.readouterr().err


@pytest.mark.parametrize("guided", ["1", "all"])
def test_a_peer_is_guided_on_the_same_blocks(guided, tmp_path):
    words = ("--guided-blocks", guided, "--guidance-weight", "3", "--peer", str(clone(tmp_path)))
    assert records("inverse", tmp_path, *words)[0]["largest_difference"] < 1e-5


def test_largest_difference_is_that_of_the_images(tmp_path):
    found = records("inverse", tmp_path, "--peer", str(clone(tmp_path, offset=0.25)))
    assert found[0]["largest_difference"] == pytest.approx(0.25, abs=1e-5)


def test_without_a_peer_the_first_variant_is_the_reference(tmp_path):
    ours, checkpointed, *_ = records("train", tmp_path, "--classes", "0")
    assert ours["reference"] is None
    assert checkpointed["reference"] == "ours"
    assert checkpointed["largest_difference"] < 1e-5


@pytest.mark.slow
def test_denoising_is_measured_once_and_in_ten_steps_unless_told_otherwise(tmp_path):
    cases = [record["case"] for record in records("score", tmp_path, "--only", "ours")]
    assert cases == ["score", "10 scores"] * 2
    one, two, *_ = records("score", tmp_path, "--steps", "1", "2", "--slice-size", "1", "--only", "ours")
    assert two["floor_seconds"] == pytest.approx(2 * one["floor_seconds"])


class Inline:
    """In the place of a fresh process, which takes seconds: what it is given is pickled, too."""

    def __init__(self, _workers: int, _context: Any) -> None:
        self.given: tuple[Any, ...] = ()

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def submit(self, *given: Any) -> Inline:
        self.given = pickle.loads(pickle.dumps(given))
        return self

    def result(self) -> Any:
        return self.given[0](*self.given[1:])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_working_memory_is_measured_of_each_variant_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ProcessPoolExecutor", Inline)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # is set for the processes, and taken back here
    words = ("--memory", "--batch-sizes", "64", "--image-size", "48", "--steps", "1", "--repeats", "1")
    ours, theirs = records("score", tmp_path, *words, "--peer", str(clone(tmp_path)), "--only", "ours", "peer")
    assert ours["peak_bytes"] > 0  # how much, depends on what this process, which is not fresh, has given back
    if theirs["peak_bytes"]:
        assert ours["times_the_memory"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])


def test_what_is_measured_is_kept_if_a_later_case_fails(tmp_path, monkeypatch, capsys):
    real = measure.timed_in_turns

    def failing(variants: Any, *rest: Any) -> Any:
        monkeypatch.setattr(measure, "timed_in_turns", lambda *given: 1 / 0)
        return real(variants, *rest)

    monkeypatch.setattr(measure, "timed_in_turns", failing)
    with pytest.raises(ZeroDivisionError):
        records("inverse", tmp_path, "--only", "ours")
    assert len(json.loads((tmp_path / "out" / "figures.json").read_text())) == 1
    assert "over floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("inverse", "--peer", "nowhere"),
            "nowhere has no transformer_flow.py; expected a clone of apple/ml-itarflow",
        ),
        (("inverse", "nothing.py"), "nothing.py is neither a recipe file"),
        (("inverse", "--only", "theirs"), "--only names 'theirs'; expected some of: ours"),
        (("inverse", "--image-size", "9"), "does not divide"),
        (("inverse", "--repeats", "0"), "--repeats"),
        (("inverse", "--device", "abacus"), "--device abacus can't be used here"),
        (("everything", "--minutes", "0"), "--minutes is 0.0; expected a number > 0"),
    ],
)
def test_what_will_not_go_is_said(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main([words[0], *TINY, *QUICK, *words[1:]])
    assert stop.value.code
    assert message in capsys.readouterr().err


def test_peers_that_are_none_are_refused(tmp_path, capsys):
    (tmp_path / "transformer_flow.py").write_text("answer = 42\n")
    (tmp_path / "recipe.py").write_text(
        "from itarflow.data import DataConfig\nfrom itarflow.flow import NoiseConfig\n"
        "from itarflow.presets import ModelConfig\nfrom itarflow.training import Recipe\n"
        "recipe = Recipe(name='one-level', data=DataConfig(), noise=NoiseConfig(distribution='constant'),\n"
        "                model=ModelConfig(image_size=8, channels=64, num_layers=(1,), noise_conditioned=False))\n"
    )
    for words, message in (
        ((), "no class Model"),
        ((str(tmp_path / "recipe.py"),), "ml-itarflow only has models with noise_conditioned on"),
    ):
        with pytest.raises(SystemExit):
            run.main(["inverse", *words, *TINY, *QUICK, "--peer", str(tmp_path)])
        assert message in capsys.readouterr().err
        clone(tmp_path)
    run.main(["score", str(tmp_path / "recipe.py"), *QUICK, "--steps", "1"])
    with pytest.raises(SystemExit):
        run.main(["score", str(tmp_path / "recipe.py"), *QUICK, "--steps", "2"])
    assert "one noise level" in capsys.readouterr().err


# -- what is measured -------------------------------------------------------------------------------------------


def test_pipelines_keep_their_weights_and_noise_levels(tmp_path, make_flow):
    flow = make_flow(noise_range=(0.05, 0.4))
    ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.4, t_min=0.05)).save_pretrained(tmp_path / "pipeline")
    subject = open_subject(Options(model=tmp_path / "pipeline", device="cpu"))
    assert subject.levels == (0.05, 0.4)
    assert subject.plans == ()
    state = subject.flow.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in flow.state_dict().items())


@pytest.mark.slow
def test_a_pipelines_plan_is_one_more_variant(tmp_path, make_flow):
    flow = make_flow(noise_range=(0.05, 0.4), patch_size=1)
    solvers = [{"window": 4, "tolerance": 0.0, "guess": "z"}] * 2
    plan = {"solvers": solvers, "num_tokens": [16, 16], "batch_size": 8, **place_of(flow.device, flow.dtype)}
    ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.4, t_min=0.05), plans=[plan]).save_pretrained(tmp_path / "pipe")
    run.main(["inverse", str(tmp_path / "pipe"), *QUICK, "--json", str(tmp_path / "figures.json")])
    found = {r["variant"]: r["largest_difference"] for r in json.loads((tmp_path / "figures.json").read_text())}
    assert found["ours, planned"] < 1e-5


def test_fresh_flows_are_no_identity_and_their_samples_are_finite():
    subject = open_subject(Options(width=64, image_size=16, layers=(1, 2), device="cpu"))
    noise = subject.noise(2, 0)
    images = subject.flow.inverse(noise, subject.labels(2), subject.levels[1])
    z = subject.flow(images, torch.full((2,), NULL_LABEL), subject.levels[1]).z
    assert images.isfinite().all()
    assert (z - noise).abs().max() > 1e-3  # labels, and all else, make a difference
    assert isinstance(subject.flow, TARFlow)


def test_variants_run_in_turns_and_the_first_result_is_kept():
    order: list[str] = []

    def variant(name: str) -> Variant:
        def call() -> torch.Tensor:
            order.append(name)
            return torch.tensor(float(len(order)))

        return Variant(name, "float32", lambda: call, lambda peaks: 1.0)

    a, b = timed_in_turns([variant("a"), variant("b")], repeats=2, warm_up=1, device=torch.device("cpu"))
    assert "".join(order) == "ababab"
    assert (float(a.result), float(b.result)) == (1, 2)
    assert len(a.seconds) == len(b.seconds) == 2


def a_variant(name: str, prepare: Any) -> Variant:
    return Variant(name, "float32", prepare, lambda peaks: 1.0)


def test_a_variant_that_fails_takes_no_others_figures():
    def no_compiler() -> Any:
        raise KeyError("no C compiler")

    def broken() -> Any:
        def call() -> torch.Tensor:
            raise ValueError("at its first call\nand more")

        return call

    one = a_variant("one", lambda: lambda: torch.ones(1))
    found = timed_in_turns(
        [a_variant("a", no_compiler), one, a_variant("b", broken)], 2, 1, device=torch.device("cpu")
    )
    assert found[0] == Failure("KeyError: 'no C compiler'")
    assert isinstance(found[1], Timing)
    assert len(found[1].seconds) == 2
    assert found[2] == Failure("ValueError: at its first call")


def test_variants_that_do_not_fit_together_are_timed_one_after_another():
    living = WeakSet()

    class Model:
        def __init__(self) -> None:
            if living:
                raise torch.OutOfMemoryError("two models")
            living.add(self)

        def __call__(self) -> torch.Tensor:
            return torch.ones(1)

    huge = a_variant("huge", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("even alone")))
    found = timed_in_turns([a_variant("a", Model), a_variant("b", Model), huge], 3, 1, device=torch.device("cpu"))
    assert [len(one.seconds) for one in found[:2]] == [3, 3]
    assert found[2] == Failure("OutOfMemoryError: even alone")
    assert not living


def test_after_its_end_each_variant_is_timed_once():
    variants = [a_variant(name, lambda: lambda: torch.ones(1)) for name in "ab"]
    found = timed_in_turns(variants, 5, 1, device=torch.device("cpu"), until=0.0)
    assert [len(one.seconds) for one in found] == [1, 1]


def test_cases_without_time_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "print_table", lambda *_: None)
    bench = Score(width=64, image_size=8, layers=(1, 1), classes=3, device="cpu", memory=False, only=("ours",))
    with pytest.raises(ValueError, match="10 scores of 16 images: no time is left"):
        measure.measure(bench, "", Console(), until=0.0)


def test_sampling_in_bf16_is_measured_by_what_bf16_takes_at_least(make_flow):
    subject = open_subject(Options(width=64, image_size=8, layers=(1, 1), classes=3, device="cpu"))
    peaks = {
        torch.float32: Peak("a device", torch.float32, 1e3, 1e30),
        torch.bfloat16: Peak("a device", torch.bfloat16, 1e6, 1e30),
    }
    (case,) = Sample(dtype="bf16", steps=1, fast_steps=1).cases(subject, 2, None)
    ours, fast = case.variants
    assert ours.floor(peaks) > 10 * fast.floor(peaks)  # its scores are float32


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_working_memory_is_that_of_the_call_alone():
    size = 2**26

    def prepare() -> Any:
        given = torch.ones(size // 4)
        return lambda: (given + 1).sum() + len(torch.ones(size // 2))

    used = working_memory(Variant("big", "float32", prepare, lambda peaks: 1.0), torch.device("cpu"))
    assert used == pytest.approx(2 * size, rel=0.1)  # bytes: the sum is gone when the ones come


@pytest.mark.slow
def test_peaks_of_this_machine(monkeypatch):
    monkeypatch.setattr(peaks, "LONG_ENOUGH", 1e-4)
    found = peaks.measured_peaks(torch.device("cpu"))
    assert set(found) == {torch.float32, torch.bfloat16}
    assert all(1e8 < peak.bytes_per_second < 1e13 and 1e8 < peak.flops_per_second < 1e15 for peak in found.values())


@pytest.mark.slow
def test_floors_of_presets_are_told_as_markdown(monkeypatch, capsys):
    monkeypatch.setattr(floors, "PRESETS", {name: floors.PRESETS[name] for name in ("cifar10", "S, 64 px")})
    run.main(["costs", "--batch-sizes", "8", "256"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| S, 64 px")]
    assert len(rows) == 3
    inverse, score = rows[1], rows[2]
    assert float(inverse[5]) == pytest.approx(19.4, rel=0.01)  # H200, ms an image of 256
    assert float(score[5]) == pytest.approx(2.02, rel=0.01)
    assert all(len(row) == 8 for row in rows)


@pytest.mark.slow
def test_reading_images_is_measured(tmp_path):
    write_classes(tmp_path / "images", {"a": 6, "b": 6})
    words = ("--sizes", "8", "--images", "8", "--batch-size", "2", "--num-batches", "2", "--repeats", "1")
    run.main(["loader", "--data", str(tmp_path / "images"), *words, "--json", str(tmp_path / "loader.json")])
    found = json.loads((tmp_path / "loader.json").read_text())
    assert [record["variant"] for record in found] == ["JPEG files", "PNG in parquet", "PNG in parquet, streamed"]
    assert all(record["images_per_second"] > 0 and record["bytes_per_image"] > 0 for record in found)


def test_likelihoods_of_foreign_images_are_compared_by_every_rule(make_flow, tmp_path, capsys, monkeypatch):
    flow = make_flow(in_channels=1, num_classes=0, noise_range=(0.1, 0.5))
    ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.1)).save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(ood, "console", Console(width=120))  # of this test's standard output
    same = {"inside_split": "train", "outside_split": "train", "num_images": 40, "num_levels": 2}
    ood.main(ood.Options(str(tmp_path / "pipeline"), "digits", ("again=digits",), **same))
    printed = capsys.readouterr().out
    assert re.search(r"again\s+│ -log p\s+│ 0\.500\s+│ 0\.500", printed)
    assert re.search(r"flat\s+│ complexity\s+│ [01]\.\d+", printed)
    assert ood._areas(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([[3.0, 0.0]])) == [1.0, 0.0]
