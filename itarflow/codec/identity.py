"""Which autoencoder made codes, and with which numbers: all that they depend on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from itarflow.codec.kinds import Vae, kind_of
from itarflow.runtime.files import weights_digest

_LARGEST_SCALING = 1e9  # of the usual VAEs it is 0.1 to 2


@dataclass(frozen=True)
class VaeIdentity:
    """All that codes depend on: two VAEs with equal identities give equal codes; their decoders may differ."""

    kind: str
    """Class of diffusers."""
    encoder: str
    """SHA-256 of the encoder's weights, as float32."""
    stride: Annotated[int, Meta(ge=1)]
    """Pixels a code, in each direction."""
    channels: Annotated[int, Meta(ge=1)]
    """Of the codes."""
    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] = ()
    """Of single channels, where a VAE has them: codes are (latents - latents_mean) / latents_std * scaling_factor."""
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_scaling(
            self.scaling_factor, self.shift_factor, self.latents_mean, self.latents_std, self.channels, "the VAE's "
        )


def vae_identity(vae: Vae) -> VaeIdentity:
    """The identity of a VAE; reads all weights of its encoder."""
    kind = kind_of(vae)
    weights = vae.state_dict().items()
    encoder = {kind.plain_name(name): value for name, value in weights if name.startswith(kind.of_codes)}
    (factor, shift), (means, stds), traits = own_scaling(vae), kind.statistics(vae), kind.traits(vae)
    return VaeIdentity(
        kind=type(vae).__name__,
        encoder=weights_digest(encoder),
        stride=traits.stride,
        channels=traits.channels,
        scaling_factor=float(factor),
        shift_factor=float(shift),
        latents_mean=tuple(means or ()),
        latents_std=tuple(stds or ()),
    )


def differing(stored: VaeIdentity, wanted: VaeIdentity) -> list[str]:
    """Lines "name: stored -> wanted" of what differs."""
    old, new = asdict(stored), asdict(wanted)
    return [f"{name}: {old[name]} -> {value}" for name, value in new.items() if old[name] != value]


def check_same_codes(name: str, other: Vae, vae: Vae) -> None:
    """Refuse what is called `name` if its VAE, `other`, makes other codes than `vae`.

    Raises:
        ValueError: saying what differs.
    """
    if lines := differing(vae_identity(vae), vae_identity(other)):
        raise ValueError(f"{name} is for other codes than the checkpoint's VAE makes:\n  " + "\n  ".join(lines))


def own_scaling(vae: Vae) -> tuple[Any, Any]:
    """scaling_factor and shift_factor of a VAE's config; 1 and 0 where its class has none."""
    return vae.config.get("scaling_factor", 1.0), vae.config.get("shift_factor") or 0.0


def check_own_scaling(vae: Vae, whose: str) -> None:
    """Refuse a VAE whose numbers no latents can be scaled by.

    Args:
        vae: of any kind.
        whose: beginning of the message.

    Raises:
        ValueError: naming the first.
    """
    kind = kind_of(vae)
    factor, _ = own_scaling(vae)
    _check_scaling(factor, vae.config.get("shift_factor"), *kind.statistics(vae), kind.traits(vae).channels, whose)


def affine(vae: Vae, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and factor (C or 1, 1, 1) of codes = (latents - shift) * factor."""
    (factor, offset), (means, stds) = own_scaling(vae), kind_of(vae).moments(vae, device)
    shift = torch.tensor([float(offset)], device=device) if means is None else means
    spread = torch.ones(1, device=device) if stds is None else stds
    return shift[:, None, None], (factor / spread)[:, None, None]


def _check_scaling(factor: Any, shift: Any, means: Any, stds: Any, channels: int, whose: str) -> None:
    """Refuse numbers by which no latents can be scaled; the last three may be None, and () is as None.

    Raises:
        ValueError: naming the first.
    """

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    if not number(factor) or not 0 < factor <= _LARGEST_SCALING:
        raise ValueError(f"{whose}scaling_factor is {factor!r}; expected a number > 0, at most {_LARGEST_SCALING:g}.")
    if shift is not None and not (number(shift) and abs(shift) <= _LARGEST_SCALING):
        raise ValueError(f"{whose}shift_factor is {shift!r}; expected a number of such a size, or null for none.")
    for name, values, positive in (("latents_mean", means, False), ("latents_std", stds, True)):
        if not values and values in (None, [], ()):
            continue
        fits = isinstance(values, list | tuple) and len(values) == channels and all(map(number, values))
        if not fits or (positive and min(values) <= 0):
            wanted = f"{channels} numbers{' > 0' if positive else ''}, one a channel"
            raise ValueError(f"{whose}{name} is {values!r}; expected {wanted}, or null for none.")
