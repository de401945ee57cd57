"""The papers' sizes: what we build has the parameters that the papers print."""

from __future__ import annotations

import pytest
import torch

from itarflow.flow import TARFlow
from itarflow.presets import (
    SIZES,
    T_MAX,
    T_MIN,
    TARFLOW,
    ModelConfig,
    itarflow_model,
    itarflow_starflow_model,
    latent_itarflow_model,
    starflow_model,
    starflow_text_model,
)

RESOLUTIONS = (64, 128, 256)


def on_meta(config: ModelConfig) -> TARFlow:
    """The flow without storage."""
    with torch.device("meta"):
        return config.build()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "printed", "resolution"), [("B", 770e6, 256), ("L", 1.2e9, 128), ("XL", 2.2e9, 64), ("XL", 2.2e9, 256)]
)
def test_itarflow_has_the_parameters_that_the_paper_prints(size, printed, resolution):
    assert count(on_meta(itarflow_model(size, resolution))) == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_smallest_itarflow_has_them_in_its_layers_alone(resolution):
    flow = on_meta(itarflow_model("S", resolution))
    layers = [layer for block in flow.blocks for layer in block.transformer.layers]
    assert len(layers) == 18
    assert sum(map(count, layers)) == pytest.approx(350e6, rel=0.015)
    assert count(flow) == pytest.approx(417e6, rel=0.01)
    assert "417M" in SIZES["S"].note


def test_sizes_carry_the_printed_figure():
    printed = {size: preset.paper_parameters for size, preset in SIZES.items()}
    assert printed == {"S": "350M", "B": "770M", "L": "1.2B", "XL": "2.2B"}


@pytest.mark.parametrize(("size", "resolution"), [("S", 64), ("B", 128), ("L", 256), ("XL", 64)])
def test_itarflow_has_1024_tokens_at_every_resolution(size, resolution):
    flow = on_meta(itarflow_model(size, resolution))
    assert flow.z_shape == (1024, 3 * (resolution // 32) ** 2)
    assert flow.image_shape == (3, resolution, resolution)
    assert flow.config.noise_conditioned


def test_latent_models_have_a_token_a_code_and_the_parameters_of_their_papers():
    itar, star = on_meta(latent_itarflow_model("B")), on_meta(starflow_model())
    for flow, printed in ((itar, 770e6), (star, 1.4e9)):
        assert flow.image_shape == (4, 32, 32)
        assert flow.z_shape == (1024, 4)
        assert count(flow) == pytest.approx(printed, rel=0.03)
    assert itar.config.noise_conditioned
    assert not star.config.noise_conditioned


def test_starflows_text_model_has_the_parameters_of_the_published_file():
    flow = on_meta(starflow_text_model())
    assert count(flow) == 3_858_281_544
    assert [block.proj_context is not None for block in flow.blocks] == [False] * 5 + [True]
    assert (flow.config.context_tokens, flow.config.context_dim, flow.config.num_classes) == (128, 2048, 0)


@pytest.mark.parametrize(("resolution", "side"), [(256, 32), (512, 64)])
def test_a_starflow_of_classes_is_its_text_model_with_the_label_for_a_caption(resolution, side):
    flow = on_meta(starflow_model(resolution=resolution))
    assert flow.image_shape == (4, side, side)
    assert flow.z_shape == (side**2, 4)
    block = flow.blocks[-1]
    assert block.proj_context.weight.shape == (2048, 1001)
    assert block.class_embedding is None
    assert block.position_embedding is None
    assert [len(block.transformer.layers) for block in flow.blocks] == [2, 2, 2, 2, 2, 18]
    assert [block.reverse for block in flow.blocks] == [True, False] * 3


def test_starflows_blocks_are_there_for_all_noise_levels_too():
    star, both = on_meta(starflow_model()), on_meta(itarflow_starflow_model())
    assert both.config.noise_conditioned
    per_block = sum(map(count, (block.noise_embedding for block in both.blocks)))
    assert count(both) == count(star) + per_block


@pytest.mark.parametrize(("asked", "message"), [
    ({"num_classes": 0}, "num_classes is 0.* >= 1"), ({"resolution": 100}, "resolution is 100.*multiple of 8"),
])  # fmt: skip
def test_a_starflow_that_can_not_be_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        starflow_model(**asked)


def test_the_deep_block_is_at_the_noise_side():
    flow = on_meta(itarflow_model("XL", 256))
    assert [len(block.transformer.layers) for block in flow.blocks] == [4, 4, 4, 24]


def test_noise_levels_grow_with_the_resolution_as_in_the_paper():
    assert T_MAX == {64: 0.3, 128: 0.5, 256: 0.7}
    assert T_MIN == 0.01


def test_a_model_without_classes_has_no_class_embedding():
    assert all(block.class_embedding is None for block in on_meta(itarflow_model("S", 64, num_classes=0)).blocks)


@pytest.mark.parametrize(
    ("name", "row", "size"),
    [
        ("imagenet64_bpd", "2-768-8-8-U", 460e6),
        ("imagenet64_uncond", "2-768-8-8-0.05", 460e6),
        ("imagenet64_cond", "2-1024-8-8-0.05", 823e6),
        ("imagenet128", "4-1024-8-8-0.15", 824e6),
        ("afhq256", "8-768-8-8-0.07", 463e6),
    ],
)
def test_tarflow_is_built_as_the_row_of_its_paper_says(name, row, size):
    ours = TARFLOW[name]
    noise = "U" if ours.noise_std is None else f"{ours.noise_std:g}"
    assert f"{ours.patch_size}-{ours.channels}-{ours.num_blocks}-{ours.num_layers}-{noise}" == row
    flow = on_meta(ours.model())
    assert [len(block.transformer.layers) for block in flow.blocks] == [8] * 8
    assert flow.z_shape == (1024, 3 * ours.patch_size**2)
    assert not flow.config.noise_conditioned
    assert flow.config.num_classes == ours.num_classes
    assert count(flow) == pytest.approx(size, rel=0.002)


def test_all_rows_are_tested():
    assert set(TARFLOW) == {"imagenet64_bpd", "imagenet64_uncond", "imagenet64_cond", "imagenet128", "afhq256"}
    assert set(SIZES) == {"S", "B", "L", "XL"}


def test_settings_per_block_reach_the_flow():
    config = ModelConfig(image_size=8, patch_size=(4, 2), channels=(64, 128), num_layers=(1, 2), shared_layers=0)
    flow = config.build(noise_range=(0.1, 0.3))
    assert flow.patch_sizes == (4, 2)
    assert [block.transformer.channels for block in flow.blocks] == [64, 128]
    assert tuple(flow.config.noise_range) == (0.1, 0.3)


@pytest.mark.parametrize("size", ["M", "s", ""])
def test_an_unknown_size_is_refused(size):
    with pytest.raises(ValueError, match=f"size is '{size}'.*S, B, L, XL"):
        itarflow_model(size, 64)


@pytest.mark.parametrize("resolution", [0, -32, 16, 100])
def test_a_resolution_that_32_does_not_divide_is_refused(resolution):
    with pytest.raises(ValueError, match=f"resolution is {resolution}.* 32"):
        itarflow_model("S", resolution)


def test_settings_that_do_not_fit_together_are_refused_on_building():
    with pytest.raises(ValueError, match=r"patch_size 3 .*image_size 8"):
        ModelConfig(image_size=8, patch_size=3, channels=64, num_layers=(1,)).build()
