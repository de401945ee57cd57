"""Solvers, noise laws, loss weights, guidance rules of your own, in a file that `--plugins FILE` loads.

The file calls the functions below. From then on its names are choices of all options and recipes, as itarflow's own
are. A checkpoint stores names, never code: it opens without the file as well, and then warns, and takes the defaults.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from itarflow.denoisers import ode
from itarflow.flow import noise
from itarflow.inverse import guidance
from itarflow.runtime.text import printable

HELP = """With --plugins FILE, as often as you like: a Python file of yours that adds
solvers, noise distributions, loss weights or guidance rules (docs/extend.md)."""
_LEVELS = 0.02, 0.5
"""(t_min, t_max) of the trials."""


def register_solver(
    name: str,
    follow: Callable[[ode.Path, Tensor], Tensor],
    *,
    num_levels: Callable[[int], int] = lambda num_steps: num_steps,
) -> None:
    """Add a denoising method, once it was tried on a few numbers.

    Args:
        name: what `method` is called.
        follow: (path, x) -> the denoised images: x (B, C, H, W) is noisy at path.levels[0]; see `ode.Path`.
        num_levels: how many levels above 0 there are for n evaluations, 1 to n. If each step takes two, but the last
            one, to 0, takes one: (n + 1) // 2.

    Raises:
        ValueError: the name is itarflow's own, or no name; the trial took more evaluations than it may, or levels
            beyond the path's, or gave no images of the same shape.
    """
    solver = ode.Solver(follow, num_levels)
    for evaluations in range(1, 13):
        _try_solver(name, solver, evaluations)
    ode.SOLVERS.register(name, solver)


def register_noise_distribution(name: str, draw: noise.DistributionFunction) -> None:
    """Add a law of the noise level in training, over a range of levels, once it was tried.

    Args:
        name: what `noise.distribution` is called.
        draw: (config, batch_size, generator) -> levels (B,) > 0, on the generator's device.

    Raises:
        ValueError: as `register_solver`.
    """
    low, high = _LEVELS
    levels = draw(noise.NoiseConfig(t_min=low, t_max=high), 64, torch.Generator().manual_seed(0))
    _expect(f"the noise distribution {name!r}", levels, (64,), positive=True)
    noise.DISTRIBUTIONS.register(name, draw)


def register_loss_weight(name: str, weight: noise.WeightFunction) -> None:
    """Add a loss weight, once it was tried.

    Args:
        name: what `noise.weight` is called.
        weight: (config, noise_level (B,)) -> gamma_t (B,) >= 0.

    Raises:
        ValueError: as `register_solver`.
    """
    low, high = _LEVELS
    weights = weight(noise.NoiseConfig(t_min=low, t_max=high), torch.linspace(low, high, 8, dtype=torch.float32))
    _expect(f"the loss weight {name!r}", weights, (8,))
    noise.WEIGHTS.register(name, weight)


def register_guidance_rule(name: str, rule: guidance.RuleFunction) -> None:
    """Add a guidance rule, once it was tried.

    Args:
        name: what `guidance.rule` is called.
        rule: (conditional, guiding, weights) -> (shift, scale), as `itarflow.inverse.guide` says.

    Raises:
        ValueError: as `register_solver`.
    """
    shift, log_scale = torch.linspace(-0.5, 0.5, 24, dtype=torch.float32).view(2, 2, 3, 2)
    affine = rule((shift, log_scale), (log_scale, shift), torch.ones(3, 1, dtype=torch.float32))
    for value, part in zip(affine, ("shift", "scale"), strict=True):
        _expect(f"the {part} of the guidance rule {name!r}", value, (2, 3, 2))
    guidance.RULES.register(name, rule)


def _try_solver(name: str, solver: ode.Solver, evaluations: int) -> None:
    (low, high), asked = _LEVELS, 0

    def estimate(x: Tensor, t: float) -> Tensor:
        nonlocal asked
        asked += 1
        if not low * (1 - 1e-6) <= t <= high * (1 + 1e-6):
            raise ValueError(f"the solver {name!r} asks for level {t:g}; expected {low} to {high}, as path.levels.")
        return x / (1 + t**2)  # of data with a standard deviation of 1

    levels = ode.noise_levels(high, low, solver.num_levels(evaluations))
    path = ode.Path(estimate, levels, lambda *_: None, evaluations, torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, 8, dtype=torch.float32).view(2, 1, 2, 2)
    _expect(f"the solver {name!r}", solver.follow(path, x), tuple(x.shape))
    if asked > evaluations:
        raise ValueError(
            f"the solver {name!r} takes {asked} evaluations where it may take {evaluations}; let num_levels give "
            "fewer levels, such as lambda n: (n + 1) // 2 for two evaluations a step and one in the last."
        )


def _expect(what: str, found: Tensor, shape: tuple[int, ...], positive: bool = False) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{what} gives {given}; expected a tensor of shape {shape}.")
    if not found.isfinite().all() or (positive and not (found > 0).all()):
        raise ValueError(f"{what} gives {found.flatten().tolist()[:5]}; expected finite numbers{positive * ' > 0'}.")


def load(path: str | Path) -> None:
    """Run a plug-in's file; one that is loaded already is not run again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file fails, saying in which line.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"--plugins {printable(str(path))}: there is no such file; expected a Python file.")
    name = f"itarflow_plugin:{file}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--plugins {printable(str(path))}: expected a Python file, which ends in .py.")
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        reason = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"the plug-in {printable(str(path))} fails in line {line}: {reason}") from error


def load_named(words: Sequence[str]) -> list[str]:
    """Load the files that --plugins names among the words of a command line; returns the other words.

    Raises:
        ValueError: --plugins without a file, or as `load`.
        FileNotFoundError: as `load`.
    """
    rest, given = [], iter(words)
    for word in given:
        option, equals, value = word.partition("=")
        if option != "--plugins":
            rest.append(word)
            continue
        file = value if equals else next(given, "")
        if not file or file.startswith("--"):
            raise ValueError("--plugins is given without a file; expected --plugins FILE.")
        load(file)
    return rest
