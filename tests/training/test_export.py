"""Sample grids: the same pictures whichever process makes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import tiny_recipe

from itarflow.training import export
from itarflow.training.export import make_pipeline, sample_grid
from itarflow.training.recipe import open_data


@pytest.mark.parametrize("num_processes", [1, 2, 4, 16])
def test_processes_share_a_grid_whose_images_do_not_depend_on_their_number(tmp_path, monkeypatch, num_processes):
    recipe = tiny_recipe(num_images=10, batch_size=128)
    pipeline = make_pipeline(recipe.model.build(recipe.noise_range), recipe, tuple("0123456789"), None)
    sample_grid(pipeline, recipe, open_data(recipe, None), tmp_path / "one.png", accelerator(0, 1))

    made = []
    monkeypatch.setattr(export, "gather_object", lambda images: made.extend(images) or [*made])
    for index in reversed(range(num_processes)):  # the main process is the last to gather here
        sample_grid(
            pipeline, recipe, open_data(recipe, None), tmp_path / "shared.png", accelerator(index, num_processes)
        )
    assert [index for index, _ in made] == sorted([index for index, _ in made], key=lambda i: -(i % num_processes))
    one, shared = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "shared.png"))
    assert np.abs(one.astype(int) - shared).max() <= 1  # rounding of another batch size
    assert one.std() > 1


def accelerator(index, count):
    return SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0)


def test_a_grid_is_float32_where_sampling_would_be_bfloat16(tmp_path, monkeypatch):
    recipe = tiny_recipe(num_images=2)
    pipeline = make_pipeline(recipe.model.build(recipe.noise_range), recipe, tuple("0123456789"), None)
    monkeypatch.setattr(type(pipeline), "sampling_dtype", lambda _, asked=None: asked or torch.bfloat16)
    asked = []
    inverse, denoiser = type(pipeline.flow).inverse, type(pipeline).flow_denoiser

    def noted_inverse(flow, *args, **options):
        asked.append(options["dtype"])
        return inverse(flow, *args, **options)

    def noted_denoiser(pipe, slice_size=None, dtype=None):
        asked.append(dtype)
        return denoiser(pipe, slice_size, dtype)

    monkeypatch.setattr(type(pipeline.flow), "inverse", noted_inverse)
    monkeypatch.setattr(type(pipeline), "flow_denoiser", noted_denoiser)
    sample_grid(pipeline, recipe, open_data(recipe, None), tmp_path / "grid.png", accelerator(0, 1))
    assert set(asked) == {torch.float32}
    assert len(asked) >= 2
