"""The pipeline: what its images depend on, what a call may change, and how it is stored and shared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCard
from torch import Tensor

from itarflow import DenoiseScheduler, FlowDenoiser, Guidance, ITARFlowPipeline, TARFlow, denoise
from itarflow.denoisers.ode import noise_levels
from itarflow.runtime import hub as runtime_hub
from itarflow.runtime.seeds import image_generators

NAMES = ["cat", "dog", "bird"]
TRAINING = {
    "name": "pets",
    "data": "someone/pets",
    "metrics": {"held-out nll": -1.5},
    "recipe": {"train": {"epochs": 3}},
}
WEIGHTS = Path("flow/diffusion_pytorch_model.safetensors")
MakeFlow = Callable[..., TARFlow]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_pipe(flow: TARFlow, **changes: Any) -> ITARFlowPipeline:
    scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=3)
    names = NAMES if flow.config.num_classes == 3 else None
    arguments = {"guidance": {"weight": 1.0}, "class_names": names, "training": TRAINING} | changes
    pipe = ITARFlowPipeline(flow, arguments.pop("scheduler", scheduler), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(make_flow: MakeFlow) -> ITARFlowPipeline:
    """Three classes, colour, trained on noise levels 0.02 to 0.6, sampled at 0.5."""
    return make_pipe(make_flow(in_channels=3, noise_range=(0.02, 0.6)))


@pytest.fixture
def classless(make_flow: MakeFlow) -> ITARFlowPipeline:
    return make_pipe(make_flow(in_channels=3, num_classes=0))


@pytest.fixture
def folder(pipe: ITARFlowPipeline, tmp_path: Path) -> Path:
    """The pipeline on disk."""
    pipe.save_pretrained(tmp_path / "pets")
    return tmp_path / "pets"


@pytest.fixture
def never_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a flow is inverted."""

    def inverse(*args: object, **kwargs: object) -> None:
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(TARFlow, "inverse", inverse)


def images_of(pipe: ITARFlowPipeline, class_labels: Any = ("cat", 1, "bird"), seed: int = 0, **kwargs: Any) -> Tensor:
    """Images in [0, 1], from a generator of that seed."""
    arguments = {"generator": seeded(seed), "output_type": "pt"} | kwargs
    return pipe(class_labels, **arguments).images


def assert_same(images: Tensor, expected: Tensor) -> None:
    """Up to float rounding, which differs with the size of a batch."""
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def differ(images: Tensor, others: Tensor) -> bool:
    return bool((images - others).abs().max() > 1e-3)


# -- what an image depends on -----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_images_to_the_last_bit(pipe):
    assert torch.equal(images_of(pipe), images_of(pipe))
    assert differ(images_of(pipe), images_of(pipe, seed=1))


def test_the_images_of_a_call_differ(pipe):
    first, second = images_of(pipe, "cat", num_images=2)
    assert differ(first, second)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_do_not_depend_on_the_batch_size(pipe, batch_size):
    assert_same(images_of(pipe, batch_size=batch_size), images_of(pipe))


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_images_do_not_depend_on_how_many_are_made(pipe, method):
    many = images_of(pipe, "dog", num_images=5, method=method)
    assert_same(images_of(pipe, "dog", num_images=2, method=method), many[:2])


def test_images_do_not_depend_on_how_many_are_denoised_at_a_time(pipe):
    assert_same(images_of(pipe, denoise_batch_size=1), images_of(pipe))


def test_with_one_generator_an_image_each_depends_on_its_own_alone(pipe):
    together = images_of(pipe, "cat", num_images=3, generator=[seeded(5), seeded(6), seeded(7)])
    for image, seed in zip(together, (5, 6, 7), strict=True):
        assert_same(image, images_of(pipe, "cat", generator=[seeded(seed)])[0])


def test_weights_can_be_read_by_whom_the_rest_can_be(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_a_list_of_generators_makes_the_images_of_one(pipe):
    (alone,) = images_of(pipe, "cat", generator=[seeded(5)])
    assert_same(images_of(pipe, "cat", num_images=3, generator=seeded(5))[0], alone)
    assert_same(images_of(pipe, "cat", num_images=2, generator=[seeded(6), seeded(5)])[1], alone)


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_the_default_dtype_changes_no_image(pipe, folder, method):
    expected = images_of(pipe, method=method)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(images_of(pipe, method=method).float(), expected)
        assert_same(images_of(ITARFlowPipeline.from_pretrained(folder), method=method).float(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ({"num_inference_steps": 2}, {"num_denoise_steps": 2}),
        ({"guidance_scale": 3.0}, {"guidance_weight": 2.0}),
        ({"num_images_per_prompt": 2}, {"class_labels": ["cat", "cat", 1, 1, "bird", "bird"]}),
        ({"num_inference_steps": None, "callback_on_step_end": None}, {}),
    ],
    ids=lambda values: " ".join(values),
)
def test_diffusers_words_are_understood(pipe, words, ours):
    assert torch.equal(images_of(pipe, **words), images_of(pipe, **ours))


def test_without_a_dict_the_images_come_in_a_tuple(pipe):
    (images,) = pipe(0, generator=seeded(), return_dict=False, output_type="pt")
    assert torch.equal(images, images_of(pipe, 0))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"guidance_scale": 0.5}, ValueError, r"guidance_scale is 0\.5; expected a number >= 1"),
        ({"guidance_scale": 2, "guidance_weight": 1}, ValueError, "guidance_scale and guidance_weight are the same"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": 2, "num_images": 2}, ValueError, "give one of them"),
        ({"callback_on_step_end": print}, ValueError, r"not called here.* itarflow\.denoise with a callback"),
        ({"generator": 0}, ValueError, r"generator is 0; expected a torch\.Generator"),
        ({"num_denoise_step": 3}, TypeError, "is 'num_denoise_steps' meant?"),
        ({"strength": 0.5}, TypeError, "'strength' is no argument of this pipeline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("never_generates")
def test_other_words_are_refused_with_a_hint(pipe, words, error, message):
    with pytest.raises(error, match=message):
        pipe(0, **words)


def test_a_pipeline_prints_itself_in_a_few_lines(pipe, recwarn):
    assert pipe.class_names == NAMES
    text = repr(pipe)
    assert len(text.splitlines()) == 5
    assert "3 (cat, dog, bird)" in text
    assert not recwarn.list


def test_an_offloaded_flow_is_moved_before_it_is_used(pipe):
    assert pipe.model_cpu_offload_seq == "text_encoder->flow->vae"
    expected, moved = images_of(pipe), []

    class Hook:
        def pre_forward(self, module: torch.nn.Module) -> None:
            moved.append(module)

    pipe.flow._hf_hook = Hook()
    assert torch.equal(images_of(pipe, batch_size=2), images_of(pipe, batch_size=2))
    assert moved == [pipe.flow] * 4
    assert_same(images_of(pipe), expected)


def test_without_a_generator_the_global_seed_decides(pipe):
    torch.manual_seed(3)
    images = images_of(pipe, generator=None)
    assert differ(images, images_of(pipe, generator=None))
    torch.manual_seed(3)
    assert torch.equal(images, images_of(pipe, generator=None))


def test_with_a_generator_the_global_random_numbers_are_left_alone(pipe):
    state = torch.get_rng_state()
    images_of(pipe, method="sde")
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_leaves_the_flow_trainable_and_without_gradients(pipe):
    images_of(pipe)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.flow.parameters())


# -- labels and counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ["dog", "cat"],
        ("dog", 0),
        torch.tensor([1, 0]),
        np.array([1, 0]),
        np.array(["dog", "cat"]),
        [torch.tensor(1), np.int64(0)],
    ],
    ids=repr,
)
def test_labels_are_numbers_or_names_in_any_container(pipe, labels):
    assert torch.equal(images_of(pipe, labels), images_of(pipe, [1, 0]))


@pytest.mark.parametrize("label", ["dog", 1, torch.tensor(1), np.int64(1)], ids=repr)
def test_a_single_label_needs_no_list(pipe, label):
    assert torch.equal(images_of(pipe, label), images_of(pipe, [1]))


def test_labels_change_the_image(pipe):
    assert differ(images_of(pipe, ["cat"]), images_of(pipe, ["dog"]))


def test_none_among_labels_is_the_unlabelled_model(pipe):
    assert_same(images_of(pipe, ["cat", None])[1], images_of(pipe, None, num_images=2)[1])


def test_one_label_serves_all_images(pipe):
    assert torch.equal(images_of(pipe, "dog", num_images=3), images_of(pipe, ["dog"] * 3))


def test_a_flow_without_classes_needs_no_labels(classless):
    assert images_of(classless, None, num_images=2).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (3, r"class label 3 is out of range; expected 0 \.\. 2"),
        ([0, -1], r"class label -1 is out of range"),
        ("fish", r"class label 'fish' is not known; names of this checkpoint: cat, dog, bird"),
        (1.5, r"class label 1\.5 is neither a number nor a name; expected 0 \.\. 2"),
        (torch.tensor([0.0, 1.0]), r"class label 0\.0 is neither a number nor a name"),
        ([0, np.float64(1)], r"class label np\.float64\(1\.0\) is neither"),
        ([], "class_labels is empty"),
    ],
)
@pytest.mark.usefixtures("never_generates")
def test_a_label_that_does_not_exist_is_refused(pipe, labels, words):
    with pytest.raises(ValueError, match=words):
        pipe(labels)


@pytest.mark.usefixtures("never_generates")
def test_a_label_is_refused_by_a_flow_without_classes(classless):
    with pytest.raises(ValueError, match="class label 0 was given, but this flow has no classes"):
        classless(0)


@pytest.mark.usefixtures("never_generates")
def test_a_name_is_refused_by_a_checkpoint_without_names(make_flow):
    with pytest.raises(ValueError, match="'cat' is not known; names of this checkpoint: none"):
        make_pipe(make_flow(in_channels=3), class_names=None)("cat")


# -- output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_have_the_mode_of_the_channels(make_flow, channels, mode):
    (picture,) = make_pipe(make_flow(in_channels=channels))("cat", generator=seeded()).images
    assert (picture.mode, picture.size) == (mode, (4, 4))


def test_output_types_show_the_same_images(pipe):
    tensors, arrays = images_of(pipe), images_of(pipe, output_type="np")
    pictures = np.stack([np.asarray(picture) for picture in images_of(pipe, output_type="pil")])
    assert tensors.min() >= 0
    assert tensors.max() <= 1
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert np.abs(pictures / 255 - arrays).max() <= 0.5 / 255 + 1e-6


def test_pixels_span_minus_one_to_one(pipe):
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    images = images_of(pipe, [0] * 4, denoiser=lambda x, y, t: torch.ones_like(x) * values[:, None, None, None])
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.tensor([0.0, 0.0, 0.5, 1.0]))


def test_images_that_are_not_finite_are_named(pipe, caplog):
    broken = images_of(
        pipe, [0, 1, 2], denoiser=lambda x, y, t: torch.where(y[:, None, None, None] == 1, torch.nan, 0)
    )
    assert "Images [1] contain NaN or infinite values" in caplog.text
    assert broken[[0, 2]].isfinite().all()


def test_finite_images_give_no_warning(pipe, caplog):
    images_of(pipe)
    assert caplog.text == ""


# -- defaults and what a call changes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "other"),
    [
        ({"guidance_weight": 1.0}, {"guidance_weight": 0.0}),
        ({"guidance": Guidance(weight=1.0)}, {"guidance": Guidance(weight=1.0, rule="log_scale")}),
        ({"num_denoise_steps": 3}, {"num_denoise_steps": 1}),
        ({"method": "euler"}, {"method": "heun"}),
        ({"t_max": 0.5}, {"t_max": 0.6}),
        ({"t_min": 0.05}, {"t_min": 0.2}),
        ({"clip": False}, {"clip": True}),
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_a_call_leaves_out_comes_from_the_checkpoint(pipe, stored, other):
    assert torch.equal(images_of(pipe), images_of(pipe, **stored))
    assert differ(images_of(pipe), images_of(pipe, **other))


def test_a_call_does_not_change_the_defaults(pipe):
    before = images_of(pipe)
    images_of(pipe, guidance_weight=3.0, num_denoise_steps=1, t_max=0.3, method="sde", clip=True)
    assert torch.equal(images_of(pipe), before)


def test_guidance_weight_overrides_the_weight_of_guidance(pipe):
    weaker, given = Guidance(weight=0.5, rule="log_scale"), Guidance(weight=2.0, rule="log_scale")
    assert torch.equal(images_of(pipe, guidance=weaker, guidance_weight=2.0), images_of(pipe, guidance=given))


def test_guided_blocks_survive_being_stored_as_a_list(make_flow, tmp_path):
    make_pipe(make_flow(in_channels=3), guidance={"weight": 1.0, "blocks": (1,)}).save_pretrained(tmp_path)
    assert ITARFlowPipeline.from_pretrained(tmp_path).default_guidance == Guidance(weight=1.0, blocks=(1,))


def test_default_guidance_plays_no_part_where_there_are_no_labels(pipe):
    assert torch.equal(images_of(pipe, None), images_of(pipe, None, guidance_weight=0.0))


def test_temperature_guides_without_labels(classless):
    tempered = Guidance(weight=1.0, temperature=2.0)
    assert differ(images_of(classless, None, guidance=tempered), images_of(classless, None))


def by_hand(pipe: ITARFlowPipeline, denoiser: Any, labels: Tensor, **changes: Any) -> Tensor:
    """Noise -> inverse of the flow -> denoising, without the pipeline."""
    generators = image_generators(seeded(), len(labels))
    z = pipe.flow.sample_prior(len(labels), generators)
    noisy = pipe.flow.inverse(z, labels, 0.5, guidance=Guidance(weight=1.0))
    arguments = {"t_max": 0.5, "t_min": 0.05, "num_denoise_steps": 3} | changes
    return (denoise(denoiser, noisy, labels, DenoiseScheduler(**arguments)).clamp(-1, 1) + 1) / 2


def test_a_sample_is_the_inverse_of_the_flow_and_then_its_own_denoising(pipe):
    labels = torch.tensor([0, 1, 2])
    assert_same(images_of(pipe), by_hand(pipe, FlowDenoiser(pipe.flow), labels))


def test_it_may_denoise_in_lower_precision(pipe):
    labels = torch.tensor([0, 1, 2])
    images = images_of(pipe, denoise_dtype=torch.bfloat16)
    assert_same(images, by_hand(pipe, FlowDenoiser(pipe.flow, dtype=torch.bfloat16), labels))
    assert not torch.equal(images, images_of(pipe))
    assert pipe.flow.dtype == torch.float32


def test_method_none_gives_the_noisy_images(pipe):
    labels = torch.tensor([0, 1, 2])
    assert_same(images_of(pipe, method="skip"), by_hand(pipe, None, labels, method="skip"))


def test_another_flow_may_denoise(pipe, make_flow):
    labels, other = torch.tensor([0, 1, 2]), FlowDenoiser(make_flow(in_channels=3, fresh=True))
    images = images_of(pipe, denoiser=other)
    assert_same(images, by_hand(pipe, other, labels))
    assert differ(images, images_of(pipe))


def test_any_function_may_denoise_and_is_told_labels_and_noise_level(pipe):
    seen = []

    def black(noisy: Tensor, labels: Tensor, noise_level: Tensor) -> Tensor:
        seen.append((labels.tolist(), noise_level.tolist()))
        return -torch.ones_like(noisy)

    assert images_of(pipe, ["dog", "cat"], denoiser=black).max() == 0
    assert [labels for labels, _ in seen] == [[1, 0]] * 3
    np.testing.assert_allclose([levels for _, levels in seen], [[0.5] * 2, [0.275] * 2, [0.05] * 2], rtol=1e-6)


def test_a_tarflow_of_one_noise_level_denoises_in_one_step(make_flow):
    scheduler = DenoiseScheduler(t_max=0.1, t_min=0.1, num_denoise_steps=1)
    flow = make_flow(in_channels=3, noise_conditioned=False, noise_range=(0.1, 0.1))
    pipe = make_pipe(flow, scheduler=scheduler, guidance=None)
    noisy, clean = images_of(pipe, method="skip"), images_of(pipe)
    inside = (noisy > 0.05) & (noisy < 0.95) & (clean > 0) & (clean < 1)
    score = FlowDenoiser(flow).score(2 * noisy - 1, torch.tensor([0, 1, 2]), 0.1)
    assert differ(noisy, clean)
    assert inside.any()
    whole = inside.flatten(1).all(dim=1)
    torch.testing.assert_close((2 * noisy - 1 + 0.01 * score)[whole], (2 * clean - 1)[whole], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "multistep", "predictor-corrector", "sde", "skip"])
@pytest.mark.parametrize("batch_size", [2, None])
def test_the_progress_bar_reaches_its_total(pipe, method, batch_size):
    class Bar:
        total, done = 0, 0

        def update(self, count: int) -> None:
            self.done += count

    bar = Bar()

    @contextmanager
    def progress_bar(total: int):
        bar.total = total
        yield bar

    pipe.progress_bar = progress_bar
    images_of(pipe, num_denoise_steps=4, method=method, batch_size=batch_size)
    assert bar.done == bar.total >= pipe.flow.num_solved_tokens


@pytest.mark.parametrize("place", ["inverse", "denoising"])
def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_images(pipe, monkeypatch, place):
    expected = images_of(pipe, method="sde", batch_size=1)
    tried = []

    def full_beyond_one(original):
        def attempt(first, second, *rest, **named):
            images = second if place == "inverse" else first
            tried.append(len(images))
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(first, second, *rest, **named)

        return attempt

    if place == "inverse":
        monkeypatch.setattr(TARFlow, "inverse", full_beyond_one(TARFlow.inverse))
    else:
        other = FlowDenoiser(pipe.flow)
        pipe = make_pipe(pipe.flow)
    arguments = {} if place == "inverse" else {"denoiser": full_beyond_one(other)}
    with pytest.warns(UserWarning, match="making 3 images at a time does not fit the memory; going on with 1"):
        images = images_of(pipe, method="sde", **arguments)
    torch.testing.assert_close(images, expected)
    assert tried[0] == 3
    assert set(tried[1:]) == {1}


def test_spacing_is_taken_from_the_scheduler_unless_given(make_flow):
    def pipe_with(**settings):
        return make_pipe(make_flow(in_channels=3), scheduler=DenoiseScheduler(t_max=0.5, t_min=0.05, **settings))

    def levels(pipe, **arguments):
        seen = []

        def black(noisy: Tensor, labels: Tensor, noise_level: Tensor) -> Tensor:
            seen.append(noise_level[0].item())
            return -torch.ones_like(noisy)

        images_of(pipe, denoiser=black, num_denoise_steps=4, method="euler", **arguments)
        return pytest.approx(seen)

    even, quadratic = (noise_levels(0.5, 0.05, 4, spacing)[:-1] for spacing in ("even", "quadratic"))
    assert even == levels(pipe_with())
    assert quadratic == levels(pipe_with(spacing="quadratic"))
    assert quadratic == levels(pipe_with(), spacing="quadratic")
    assert even == levels(pipe_with(spacing="quadratic"), spacing="even")


def test_bfloat16_weights_give_finite_images(pipe):
    pipe.to(torch.bfloat16)
    assert pipe.flow.dtype == torch.bfloat16
    images = images_of(pipe)
    assert images.isfinite().all()
    assert images.std() > 0.05
    assert images_of(pipe, output_type="pil")[0].mode == "RGB"


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"t_max": 0.9}, r"t_max: .*0\.9.* outside \[0\.02, 0\.6\]"),
        ({"t_min": 0.001}, r"t_min: .*0\.001.* outside \[0\.02, 0\.6\]"),
        ({"t_min": 0.001, "method": "heun"}, r"t_min: .*0\.001.* outside"),
        ({"t_max": 0.04}, r"t_min=0\.05, t_max=0\.04; expected 0 < t_min < t_max"),
        ({"num_denoise_steps": 0}, "num_denoise_steps is 0; expected"),
        ({"num_denoise_steps": -1}, "num_denoise_steps is -1; expected"),
        ({"method": "dpm"}, "method is 'dpm'; expected one of euler"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; expected 'pil', 'np', 'pt' or 'codes'"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 3, "class_labels": [0, 1]}, "num_images is 3 for 2 class_labels"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"denoise_batch_size": 0}, "denoise_batch_size is 0"),
        ({"denoise_dtype": torch.float16}, r"dtype is torch\.float16.*bfloat16"),
        ({"denoise_dtype": torch.bfloat16, "denoiser": lambda *_: None}, r"a denoiser was given.*dtype=\.\.\."),
        ({"guidance_weight": -1.0}, r"weight is -1\.0; expected a finite number >= 0"),
        ({"guidance_weight": 2.0, "class_labels": None}, r"guidance_weight is 2\.0, but there are no labels"),
        ({"generator": [seeded(0), seeded(1)]}, "2 generators were given for 1 images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("never_generates")
def test_a_call_that_makes_no_sense_is_refused_before_any_work(pipe, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe(**{"class_labels": 0} | arguments)


@pytest.mark.usefixtures("never_generates")
def test_a_denoising_flow_of_a_narrower_range_is_refused_before_any_work(pipe, make_flow):
    narrow = FlowDenoiser(make_flow(in_channels=3, noise_range=(0.02, 0.3)))
    with pytest.raises(ValueError, match=r"t_max: .*0\.5.* outside \[0\.02, 0\.3\]"):
        pipe(0, denoiser=narrow)


def test_a_level_that_one_step_never_visits_is_not_refused(pipe):
    assert images_of(pipe, num_denoise_steps=1, t_min=0.001).shape == (3, 3, 4, 4)


def test_names_must_match_the_classes(make_flow):
    with pytest.raises(ValueError, match="class_names has 2 names for a flow with 3 classes"):
        make_pipe(make_flow(), class_names=["cat", "dog"])


def test_impossible_default_guidance_is_refused(make_flow):
    with pytest.raises(ValueError, match="weight is '2'"):
        make_pipe(make_flow(), guidance={"weight": "2"})


# -- on disk ----------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_is_the_same_pipeline(pipe, folder):
    loaded = ITARFlowPipeline.from_pretrained(folder)
    assert torch.equal(images_of(loaded), images_of(pipe))
    assert loaded.config.training == TRAINING
    assert loaded.config.class_names == NAMES
    assert loaded.default_guidance == pipe.default_guidance
    assert dict(loaded.flow.config)["noise_range"] == [0.02, 0.6]


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_images(pipe, folder, tmp_path):
    program = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from itarflow import ITARFlowPipeline\n"
        "pipe = ITARFlowPipeline.from_pretrained(sys.argv[1])\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "images = pipe(['cat', 1, 'bird'], generator=generator, output_type='pt').images\n"
        "torch.save(images, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "images.pt"), images_of(pipe))


def test_weights_are_stored_as_safetensors_alone(folder):
    assert (folder / WEIGHTS).is_file()
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".py", ".md"}


def test_storing_pickles_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        pipe.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_saving_does_not_upload(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"call pipe\.push_to_hub"):
        pipe.save_pretrained(tmp_path / "new", push_to_hub=True)


def test_files_do_not_tell_where_the_pipeline_was_loaded_from(folder, tmp_path):
    ITARFlowPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"_name_or_path" not in content, path
            assert str(folder).encode() not in content, path


def test_half_precision_can_be_asked_for_on_loading(folder):
    assert ITARFlowPipeline.from_pretrained(folder, dtype=torch.bfloat16).flow.dtype == torch.bfloat16


def test_sharded_weights_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list((tmp_path / "flow").glob("*.safetensors"))) > 1
    assert torch.equal(images_of(ITARFlowPipeline.from_pretrained(tmp_path)), images_of(pipe))


def test_our_loader_runs_no_code_from_the_folder(pipe, folder):
    for path in folder.rglob("*.py"):
        path.write_text("raise AssertionError('code of a checkpoint was run')\n")
    assert torch.equal(images_of(ITARFlowPipeline.from_pretrained(folder)), images_of(pipe))


def test_diffusers_loads_the_folder_only_if_its_code_is_trusted(pipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is ITARFlowPipeline
    assert torch.equal(images_of(loaded), images_of(pipe))


# -- folders that can't be loaded -------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickle_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))


def lose_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def of_another_kind(folder: Path) -> None:
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def damaged_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def foreign_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "flow" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def wider(folder: Path) -> None:
    edit_config(folder, channels=12)


def deeper(folder: Path) -> None:
    edit_config(folder, num_layers=[1, 3])


def shallower(folder: Path) -> None:
    edit_config(folder, num_layers=[1, 1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "SHA-256 is another, so it is damaged.* Copy or download the folder again"),
        (empty_weights, "SHA-256 is another, so it is damaged.* Copy or download the folder again"),
        (lose_weights, r"diffusion_pytorch_model\.safetensors.* copy or download the folder again"),
        (lose_scheduler, r"scheduler_config\.json.* copy or download the folder again"),
        (pickle_weights, r"are a pickle \(diffusion_pytorch_model\.bin\), which could run code and is never read"),
        (lose_everything, r"holds no pipeline: model_index\.json is missing.* `itarflow convert`"),
        (of_another_kind, r"another kind \(DDPMPipeline\); expected an ITARFlowPipeline"),
        (damaged_index, r"model_index\.json is damaged: Expecting property name.* copy or make it again"),
        (foreign_index, r"model_index\.json is damaged: Expected `object`, got `array`"),
        (wider, r"blocks\.\S+ has shape \(8, 12\); expected \(12, 12\)"),
        (deeper, r"do not fit its config\.json: 12 tensors are missing or too many, such as blocks\.1\."),
        (shallower, r"do not fit its config\.json: 12 tensors are missing or too many, such as blocks\.1\."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused_with_advice(folder, damage, words):
    damage(folder)
    with pytest.raises(OSError, match=f"(?s){words}") as refusal:
        ITARFlowPipeline.from_pretrained(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "nothing", "too/many/parts"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name, monkeypatch):
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(runtime_hub, "snapshot_download", download)
    with pytest.raises(OSError, match=r"neither a folder here nor a Hub id .* runs/NAME/pipeline"):
        ITARFlowPipeline.from_pretrained(name)


def test_a_hub_id_out_of_reach_is_named(monkeypatch):
    def download(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(runtime_hub, "snapshot_download", download)
    with pytest.raises(OSError, match=r"'runs/pets' is not a folder here, and .* no network\nCheck the spelling"):
        ITARFlowPipeline.from_pretrained("runs/pets")


# -- the Hub ----------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_without_code_or_pickles(pipe, folder, monkeypatch):
    asked = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(runtime_hub, "snapshot_download", download)
    loaded = ITARFlowPipeline.from_pretrained("someone/pets", revision="v1", token="secret")
    assert torch.equal(images_of(loaded), images_of(pipe))
    patterns = asked.pop("allow_patterns")
    assert asked == {"repo_id": "someone/pets", "revision": "v1", "token": "secret"}
    assert set(patterns) == {"*.json", "*.safetensors", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that keeps what is uploaded in a folder, and what it was asked."""
    asked: dict[str, Any] = {"folder": tmp_path / "hub"}

    class Repo:
        repo_id = "someone/pets"

    def create_repo(repo_id: str, **options: Any) -> Repo:
        asked["create"] = {"repo_id": repo_id, **options}
        return Repo()

    def upload_folder(*, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, asked["folder"])
        asked["upload"] = options
        return "https://hub/someone/pets/commit/1"

    monkeypatch.setattr(runtime_hub, "create_repo", create_repo)
    monkeypatch.setattr(runtime_hub, "upload_folder", upload_folder)
    return asked


def test_what_is_uploaded_loads_again_with_its_training_record(pipe, folder, hub):
    address = ITARFlowPipeline.from_pretrained(folder).push_to_hub("pets", private=True, token="secret")
    assert address == "https://hub/someone/pets/commit/1"
    assert hub["create"] == {"repo_id": "pets", "private": True, "token": "secret", "exist_ok": True}
    assert hub["upload"]["repo_id"] == "someone/pets"
    assert hub["upload"]["token"] == "secret"
    uploaded = ITARFlowPipeline.from_pretrained(hub["folder"])
    assert torch.equal(images_of(uploaded), images_of(pipe))
    assert uploaded.config.training == TRAINING


def test_what_is_uploaded_has_a_card_with_metadata_and_the_training_record(pipe, hub):
    pipe.push_to_hub("pets")
    card = ModelCard.load(hub["folder"] / "README.md")
    assert card.data.library_name == "itarflow"
    assert card.data.datasets == ["someone/pets"]
    assert "iTARFlow" in card.data.tags
    assert "| train.epochs | 3 |" in card.text
    assert "| held-out nll | -1.5 |" in card.text
    assert 'from_pretrained("someone/pets")' in card.text  # the whole id, which "pets" is not


def test_a_card_keeps_its_license_picture_and_place_when_a_figure_is_noted(pipe, hub):
    pipe.push_to_hub("pets", license="mit", picture=pipe(0).images[0])
    pipe.record(hub["folder"], "evaluations", lambda _: {"raw": "FID 3"})
    pipe.save_pretrained(hub["folder"])
    card = ModelCard.load(hub["folder"] / "README.md")
    assert card.data.license == "mit"
    assert "| raw | 3 |" in card.text
    assert "![Samples](samples.png)" in card.text
    assert 'from_pretrained("someone/pets")' in card.text


def test_an_upload_can_be_a_pull_request_with_a_message(pipe, hub):
    pipe.push_to_hub("pets", commit_message="Longer training", create_pr=True)
    assert (hub["upload"]["commit_message"], hub["upload"]["create_pr"]) == ("Longer training", True)


def test_an_upload_that_fails_says_what_to_do(pipe, hub, monkeypatch):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(runtime_hub, "create_repo", unreachable)
    with pytest.raises(OSError, match=r"could not be uploaded to 'pets': Name or service(.|\n)*hf auth login"):
        pipe.push_to_hub("pets")


def test_a_generated_card_follows_what_is_recorded_and_a_written_one_stays(make_flow, tmp_path):
    # Settings come back from the disk in another order than they were given in.
    training = {"name": "b", "recipe": {"train": {"epochs": 1, "batch_size": 2}, "data": {"path": "x"}}, "metrics": {}}
    pipe = ITARFlowPipeline(make_flow(), DenoiseScheduler(t_max=0.5, t_min=0.1), {"weight": 1.0}, training=training)
    pipe.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    loaded = ITARFlowPipeline.from_pretrained(tmp_path)
    assert loaded.record(tmp_path, "evaluations", lambda known: {**(known or {}), "raw": "FID 3"})
    assert "| raw | 3 |" in card.read_text()
    card.write_text(card.read_text().replace("# b", "# b, which is mine"))
    assert not ITARFlowPipeline.from_pretrained(tmp_path).record(tmp_path, "evaluations", lambda _: {"raw": "FID 4"})
    assert "| raw | 3 |" in card.read_text()
    assert ITARFlowPipeline.from_pretrained(tmp_path).config.evaluations == {"raw": "FID 4"}
