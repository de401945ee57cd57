"""Classifier-free guidance of an autoregressive flow: the rules, and how the weight grows over tokens.

A guided block runs twice on the same tokens: with the labels, and as a guiding pass without them
and / or with tempered attention. A rule then moves the first affine map away from the second.
The rules are not interchangeable: equal weights give different images.

mu and alpha are shift and log-scale of a token, mu_u and alpha_u those of the guiding pass; sigma = exp(alpha).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from itarflow.runtime.ranges import check_flag, check_number, shown
from itarflow.runtime.tables import Table, choices, with_known

Affine = tuple[Tensor, Tensor]


def _log_scale(conditional: Affine, guiding: Affine, weights: Tensor) -> Affine:
    """mu~ = (1 + w) mu - w mu_u,  alpha~ = (1 + w) alpha - w alpha_u (TARFlow, eq. 10)."""
    (shift, log_scale), (shift_u, log_scale_u) = conditional, guiding
    return shift + weights * (shift - shift_u), (log_scale + weights * (log_scale - log_scale_u)).exp()


def _scale(conditional: Affine, guiding: Affine, weights: Tensor) -> Affine:
    """mu~ = (1 + w) mu - w mu_u,  sigma~ = (1 + w) sigma - w sigma_u: as the official iTARFlow code."""
    (shift, log_scale), (shift_u, log_scale_u) = conditional, guiding
    scale = log_scale.exp()
    return shift + weights * (shift - shift_u), scale + weights * (scale - log_scale_u.exp())


def _gaussian(conditional: Affine, guiding: Affine, weights: Tensor) -> Affine:
    """The product N(mu, sigma^2)^(1 + w) / N(mu_u, sigma_u^2)^w, normalised (STARFlow, arXiv 2506.06276).

    mu~ = ((1 + w) mu - w s mu_u) / (1 + w - w s),  sigma~ = sigma / sqrt(1 + w - w s),
    s = min(sigma^2 / sigma_u^2, 1)
    """
    (shift, log_scale), (shift_u, log_scale_u) = conditional, guiding
    ratio = (2 * (log_scale - log_scale_u)).exp().clamp(max=1)  # sigma^2 / sigma_u^2
    precision = 1 + weights - weights * ratio  # of the product, in units of 1 / sigma^2
    return ((1 + weights) * shift - weights * ratio * shift_u) / precision, log_scale.exp() * precision.rsqrt()


RuleFunction = Callable[[Affine, Affine, Tensor], Affine]
"""(conditional, guiding, weights) -> (shift, scale), arguments as of `guide`."""
RULES: Table[RuleFunction] = Table(
    "Guidance rule", "scale", {"log_scale": _log_scale, "scale": _scale, "gaussian": _gaussian}
)
SCHEDULES: Table[Callable[[float, Tensor, int], Tensor]] = Table(  # (weight, positions, N) -> weights
    "Guidance schedule",
    "linear",
    {
        "constant": lambda weight, positions, _: torch.full_like(positions, weight),
        "linear": lambda weight, positions, num_tokens: weight * positions / max(num_tokens - 1, 1),
    },
)
Rule = Annotated[str, choices(RULES)]
Schedule = Annotated[str, choices(SCHEDULES)]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How samples are guided. The default is no guidance.

    With labels the guiding pass is the unconditional one. Without labels it is the same model with its attention
    logits divided by tau:

        mu~_i = (1 + w) mu_i(x_{<i}; 1) - w mu_i(x_{<i}; tau),  alpha~_i likewise       (TARFlow, eq. 11)

    Args:
        weight: w in (1 + w) * conditional - w * unconditional; 0 = off. Never negative.
        rule: what is extrapolated. "log_scale": shift and log-scale (TARFlow, eq. 10);
            "scale": shift and scale (the published iTARFlow code), whose result may turn negative;
            "gaussian": the product of Gaussians p(x|y)^(1+w) / p(x)^w, with the variance ratio
            kept at most 1 (STARFlow), which is always a valid Gaussian.
        schedule: "constant", or "linear": token i of N, in the block's own order, gets weight * i / (N - 1).
        blocks: which blocks are guided, counted from the noise side, where sampling starts: a number k
            = the first k that are inverted; a collection of indices = those (0 = the first inverted); None = all, as
            in TARFlow. iTARFlow guides the first alone, 1 (iTARFlow, section 3.2).
        shift: whether the shift is guided.
        scale: whether the scale is guided.
        temperature: tau, divides the attention logits of the guiding pass. Away from 1 it guides models without
            labels.

    Raises:
        ValueError: a value is out of its range.
    """

    weight: float = 0.0
    rule: Rule = "scale"
    schedule: Schedule = "linear"
    blocks: int | tuple[int, ...] | None = None
    shift: bool = True
    scale: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        hint = ", where 0 turns guidance off (a guidance_scale s of diffusers is the weight s - 1)"
        check_number("Guidance weight", self.weight, 0, 1e6, hint)
        RULES.check(self.rule)
        SCHEDULES.check(self.schedule)
        check_number("Guidance temperature", self.temperature, 1e-6, 1e6, " (1 = untouched)")
        check_flag("Guidance shift", self.shift)
        check_flag("Guidance scale", self.scale)
        is_collection = isinstance(self.blocks, list | tuple | set | frozenset | range)
        chosen: Any = self.blocks if is_collection else () if self.blocks is None else (self.blocks,)
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in chosen):
            raise ValueError(
                f"Guidance blocks is {shown(self.blocks)}; expected None for all blocks, a number of blocks >= 0, "
                "or a collection of indices >= 0 counted from the noise side."
            )

    @classmethod
    def from_json(cls, stored: Any) -> Self:
        """The guidance that a checkpoint stores; a rule that is not known here becomes the default, with a warning.

        Args:
            stored: fields of this class, or None for no guidance.

        Raises:
            ValueError: they are no fields of this class, or out of their ranges.
        """
        fields = dict(stored) if isinstance(stored, Mapping) else {} if stored is None else {"": stored}
        if not set(fields) <= set(cls.__dataclass_fields__):
            raise ValueError(f"guidance is {shown(stored)}; expected {', '.join(cls.__dataclass_fields__)}.")
        if isinstance(fields.get("blocks"), list):
            fields["blocks"] = tuple(fields["blocks"])
        return cls(**with_known(fields, {"rule": RULES, "schedule": SCHEDULES}))

    def guides(self, block: int) -> bool:
        """Whether the block inverted as number `block` (0 = the first, at the noise side) is guided."""
        if self.weight == 0 or not (self.shift or self.scale):
            return False
        if self.blocks is None:
            return True
        return block in self.blocks if isinstance(self.blocks, Collection) else block < self.blocks

    def weights(self, positions: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """The weights (..., 1) of the tokens at positions (...) of `num_tokens`.

            w_i = w i / (N - 1),  i = 0 .. N - 1, if linear; else w_i = w       (TARFlow, appendix B)

        Args:
            positions: i, in the block's own order.
            num_tokens: N.
            dtype: of the weights.
        """
        positions = positions[..., None].to(dtype)
        return SCHEDULES[self.schedule](self.weight, positions, num_tokens)


def guide(conditional: Affine, guiding: Affine, weights: Tensor, guidance: Guidance) -> Affine:
    """Combine the two passes of a guided block.

        x_i = z_i exp(alpha~_i) + mu~_i                                 (TARFlow, eq. 9)

    where mu~ and exp(alpha~) are what the rule gives; they replace mu and exp(alpha) of equation 4. Equation 10 is
    the rule "log_scale"; "scale", the default, extrapolates exp(alpha) in place of alpha, as iTARFlow's code does.

    Args:
        conditional: (shift, log_scale), each (B, n, D).
        guiding: the same of the guiding pass.
        weights: (n, 1) or (B, n, 1), from `Guidance.weights`.
        guidance: the rule, and which of shift and scale it may change.

    Returns:
        (shift, scale), each (B, n, D), of x = z * scale + shift. The scale is not given as a logarithm
        since the rule "scale" may make it negative.
    """
    shift, scale = RULES[guidance.rule](conditional, guiding, weights)
    return (
        shift if guidance.shift else conditional[0],
        scale if guidance.scale else conditional[1].exp(),
    )
