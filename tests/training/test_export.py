"""Sample grids: the same pictures whichever process makes them."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_training import tiny_recipe

from itarflow.training import export
from itarflow.training.export import make_pipeline, sample_grid


@pytest.mark.parametrize("num_processes", [1, 2, 4, 16])
def test_processes_share_a_grid_whose_images_do_not_depend_on_their_number(tmp_path, monkeypatch, num_processes):
    recipe = tiny_recipe(num_images=10, batch_size=128)
    pipeline = make_pipeline(recipe.model.build(recipe.noise_range), recipe, tuple("0123456789"), None)
    sample_grid(pipeline, recipe, tmp_path / "one.png", accelerator(0, 1))

    made = []
    monkeypatch.setattr(export, "gather_object", lambda images: made.extend(images) or [*made])
    for index in reversed(range(num_processes)):  # the main process is the last to gather here
        sample_grid(pipeline, recipe, tmp_path / "shared.png", accelerator(index, num_processes))
    assert [index for index, _ in made] == sorted([index for index, _ in made], key=lambda i: -(i % num_processes))
    one, shared = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "shared.png"))
    assert np.abs(one.astype(int) - shared).max() <= 1  # rounding of another batch size
    assert one.std() > 1


def accelerator(index, count):
    return SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0)
