"""A plug-in: a solver, a noise distribution, a loss weight and a guidance rule. See docs/extend.md.

itarflow train digits --plugins docs/plugin_example.py --noise.distribution log_uniform --noise.weight sqrt
itarflow sample runs/digits/pipeline --plugins docs/plugin_example.py --method midpoint
"""

import torch
from torch import Tensor

from itarflow import plugins
from itarflow.denoisers.ode import Path
from itarflow.flow import NoiseConfig
from itarflow.inverse.guidance import Affine


def midpoint(path: Path, x: Tensor) -> Tensor:
    """x' = x + h d(x + h/2 d(x, t), t + h/2): second order, two evaluations a step, and one in the last."""
    for index, t, t_next in path.steps():
        x0 = path.estimate(x, t)
        path.report(index, t, x, x0)
        if t_next == 0:
            return x0
        middle = (t + t_next) / 2
        halfway = x + (middle - t) * (x - x0) / t
        x = x + (t_next - t) * (halfway - path.estimate(halfway, middle)) / middle
    return x


def log_uniform(config: NoiseConfig, batch_size: int, generator: torch.Generator) -> Tensor:
    """log t is uniform between log t_min and log t_max."""
    u = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float32)
    return config.t_min * (config.t_max / config.t_min) ** u


def sqrt(config: NoiseConfig, noise_level: Tensor) -> Tensor:  # noqa: ARG001
    """The square root of t."""
    return noise_level.sqrt()


def shift_only(conditional: Affine, guiding: Affine, weights: Tensor) -> Affine:
    """mu~ = (1 + w) mu - w mu_u; the scale stays."""
    (shift, log_scale), (shift_u, _) = conditional, guiding
    return shift + weights * (shift - shift_u), log_scale.exp()


plugins.register_solver("midpoint", midpoint, num_levels=lambda evaluations: (evaluations + 1) // 2)
plugins.register_noise_distribution("log_uniform", log_uniform)
plugins.register_loss_weight("sqrt", sqrt)
plugins.register_guidance_rule("shift_only", shift_only)
