"""The terms that train a decoder, against closed forms."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from itarflow.training.decoder.losses import (
    LossConfig,
    PatchCritic,
    adversarial_loss,
    hinge_loss,
    load_lpips,
    psnr,
    reconstruction_terms,
)


def test_psnr_is_of_each_image_and_clamps_what_is_decoded() -> None:
    images = torch.zeros(3, 1, 4, 4)
    decoded = torch.stack([torch.full((1, 4, 4), value) for value in (0.2, -7.0, 0.0)])
    assert psnr(decoded, images).tolist() == pytest.approx([20.0, 10 * torch.tensor(4.0).log10().item(), 100.0])


def test_terms_of_no_weight_are_left_out() -> None:
    images, decoded = torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), 0.5)
    terms = reconstruction_terms(LossConfig(), decoded, images, None)
    assert {name: float(term) for name, term in terms.items()} == {"l1": 0.5, "l2": 0.25}
    seen = []

    def perceptual(*pair: torch.Tensor) -> torch.Tensor:
        seen.extend(tuple(part.shape) for part in pair)
        return (pair[0] - pair[1]).mean(dim=(1, 2, 3), keepdim=True)

    terms = reconstruction_terms(LossConfig(l1=0, l2=0, lpips=1), decoded, images, perceptual)  # type: ignore[arg-type]
    assert {name: float(term) for name, term in terms.items()} == {"lpips": 0.5}
    assert seen == [(2, 3, 16, 16)] * 2  # grey images have three equal channels there


def test_decoder_and_critic_want_opposite_things_of_the_score() -> None:
    real, decoded = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge_loss(real, decoded)) == pytest.approx(0.5 * (0.25 + 0.75))
    torch.manual_seed(0)
    critic, images = PatchCritic(1, width=8), torch.randn(2, 1, 16, 16, requires_grad=True)
    scores = critic(images)
    assert scores.shape == (2, 1, 2, 2)
    loss = adversarial_loss(critic, images)
    torch.testing.assert_close(loss, -scores.mean())
    loss.backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_an_image_is_judged_by_itself() -> None:
    critic, images = PatchCritic(3, width=8), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(critic(images)[:1], critic(images[:1]))


def test_lpips_that_can_not_be_had_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r'pip install "itarflow\[decoder\]"'):
        load_lpips()

    def offline(**_: object) -> None:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(ValueError, match=r"no network.*\n.*vgg16-397923af.pth"):
        load_lpips()


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"l1": -1.0}, 64, "loss.l1 is -1.0"),
        ({"l2": float("nan")}, 64, "loss.l2 is nan"),
        ({"l1": 0.0, "l2": 0.0}, 64, "all 0"),
        ({"lpips": 1.0}, 8, "16 x 16 pixels"),
        ({"adversarial": 1.0}, 4, "8 x 8 pixels"),
    ],
)
def test_losses_that_make_no_sense_are_refused(changes: dict[str, float], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes).check(size)
