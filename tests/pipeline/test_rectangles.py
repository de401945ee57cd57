"""Images that are not square: made, decoded and shown; not trained or measured, since data is made square."""

import numpy as np
import pytest
from conftest import tiny_vae
from PIL import Image

from itarflow import DenoiseScheduler, ITARFlowPipeline
from itarflow.commands.cli import main
from itarflow.data.images import square_side
from itarflow.runtime.errors import DataError


@pytest.fixture(params=[False, True], ids=["pixels", "codes"])
def folder(request, make_flow, tmp_path):
    """A pipeline of images of 12 x 20 pixels, or of codes of such images."""
    channels, size = (4, (6, 10)) if request.param else (1, (12, 20))
    flow = make_flow(
        fresh=True,
        image_size=size,
        in_channels=channels,
        channels=16,
        head_dim=16,
        rotary_side=3,
        noise_range=(0.05, 0.5),
    )
    scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
    pipe = ITARFlowPipeline(flow, scheduler, class_names=["a", "b", "c"], vae=tiny_vae() if request.param else None)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pictures_have_their_height_and_width(folder, tmp_path):
    pipe = ITARFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.picture_shape == (1, 12, 20)
    assert [image.size for image in pipe(class_labels=[0, 1]).images] == [(20, 12)] * 2
    assert "12 x 20" in repr(pipe)
    main(["sample", str(folder), "--class-labels", "a", "--device", "cpu", "--output", str(tmp_path / "one.png")])
    height, width = np.asarray(Image.open(tmp_path / "one.png")).shape
    assert height * 20 == width * 12


def test_data_sets_which_are_square_are_refused_for_them(folder, tmp_path, capsys):
    data = ["--data", "digits", "--device", "cpu"]
    for words in (["bpd", "--noise-levels", "0.1", "--output", str(tmp_path / "bpd")], ["profile"]):
        with pytest.raises(SystemExit):
            main([words[0], str(folder), *data, *words[1:]])
        assert "pixels, but those of a data set are made square" in capsys.readouterr().err.replace("\n", " ")


def test_the_side_of_square_images():
    assert square_side((3, 8, 8)) == 8
    with pytest.raises(DataError, match="the images are 8 x 12 pixels"):
        square_side((3, 8, 12))
