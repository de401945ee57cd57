"""How generation is guided, as options of the commands that make images: every part of `Guidance`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from itarflow.inverse.guidance import Guidance

if TYPE_CHECKING:
    Rule = str
    Schedule = str
else:  # those that `Guidance` knows
    Rule, Schedule = (get_type_hints(Guidance, include_extras=True)[name] for name in ("rule", "schedule"))


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """What `Guidance` has beside its weight and temperature, which a sweep takes several of."""

    guidance_rule: Rule | None = None
    """What is extrapolated: shift and log-scale (TARFlow), shift and scale (iTARFlow's code), or the product of
    Gaussians (STARFlow). None = the checkpoint's."""
    guidance_schedule: Schedule | None = None
    """The weight over the tokens of a block; linear: it grows from 0. None = the checkpoint's."""
    guidance_blocks: Literal["all"] | int | tuple[int, ...] | None = None
    """Which blocks are guided: all, the first so many from the noise side (a number), or those with these indices
    (several numbers, 0 = the first inverted). None = the checkpoint's."""
    guided: tuple[Literal["shift", "scale"], ...] | None = None
    """Which parts of a token's affine map are guided: shift, scale, or both. None = as the checkpoint says."""

    def guidance_fields(self, weight: float | None = None, temperature: float | None = None) -> dict[str, Any]:
        """The fields of `Guidance` that were given, these two included; all others are the checkpoint's."""
        values: dict[str, Any] = {
            "weight": weight,
            "temperature": temperature,
            "rule": self.guidance_rule,
            "schedule": self.guidance_schedule,
            "shift": None if self.guided is None else "shift" in self.guided,
            "scale": None if self.guided is None else "scale" in self.guided,
        }
        given = {name: value for name, value in values.items() if value is not None}
        if self.guidance_blocks is not None:
            given["blocks"] = None if self.guidance_blocks == "all" else self.guidance_blocks
        return given


@dataclass(frozen=True, kw_only=True)
class OneGuidance(GuidanceOptions):
    """All parts of a guidance, one value each."""

    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    guidance_temperature: float | None = None
    """tau, by which the attention logits of the guiding pass are divided. Away from 1 it guides models without labels
    (TARFlow, equation 11). None = the checkpoint's."""

    def given_guidance(self) -> dict[str, Any]:
        """See `guidance_fields`."""
        return self.guidance_fields(self.guidance_weight, self.guidance_temperature)

    def guidance_of(self, stored: Guidance) -> Guidance | None:
        """The checkpoint's guidance with what was given put in; None = nothing was given."""
        given = self.given_guidance()
        return replace(stored, **given) if given else None
