"""8-bit pixels survive the way to the flow's values and back."""

from __future__ import annotations

import pytest
import torch

from itarflow.codec import to_pixels, to_uint8


def test_pixels_round_trip_for_all_values() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    pixels = to_pixels(images)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    torch.testing.assert_close(pixels, images.double().div(127.5).sub(1).float(), rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(pixels), images)
    assert torch.equal(to_uint8(pixels + 0.0038), images)  # half a grey level is 0.00392


def test_to_uint8_clamps_and_takes_half_precision() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert to_uint8(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)).tolist() == [0, 255]


def test_pixels_are_not_converted_twice() -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_pixels(torch.zeros(1))
