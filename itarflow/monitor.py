"""What a training says while it runs: on the terminal, in metrics.jsonl, and to Accelerate's trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape

from itarflow.data.dataset import too_many_broken
from itarflow.objective import Evaluation, describe
from itarflow.recipe import Settings, to_json
from itarflow.run import RunDir
from itarflow.runtime.text import flat

_EXPLOSION = 10.0
"""A gradient norm so many times the usual one is reported."""
_USUAL_AFTER = 20
"""Steps before there is a usual norm."""


class Monitor:
    """Tells people and files what happens. All processes have one; most of it is said by the main one."""

    def __init__(self, recipe: Settings, run: RunDir, accelerator: Accelerator) -> None:
        self.recipe, self.run, self.accelerator = recipe, run, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.broken: frozenset[str] = frozenset()
        """Names, with reasons, of the images that could not be read; those of all processes after `gather_broken`."""
        self._met: set[str] = set()  # by this process, in this part of the run: what counts towards the limit
        self._warnings = Console(stderr=True)  # of every process: a broken image is met by one of them
        self._usual_norm, self._norms_seen, self._quiet_until = 0.0, 0, 0
        accelerator.init_trackers("logs", config=_scalars(to_json(recipe)))

    def say(self, text: str, style: str = "") -> None:
        """A line on the main process's terminal."""
        self.console.print(escape(text), style=style, soft_wrap=True, highlight=False)

    # -- images that can't be read ------------------------------------------------------------------------------

    def name_broken(self, names: Sequence[str], aloud: bool = True) -> None:
        """Name each unreadable image once, and give up past the limit.

        Args:
            names: "name: reason" of each.
            aloud: False where another process says the same.

        Raises:
            DataError: more than data.max_broken.
        """
        new = [name for name in names if name not in self.broken]
        for name in dict.fromkeys(new) if aloud else ():
            self._warnings.print(
                f"[yellow]Unreadable image, replaced by the next one: {escape(name)}", soft_wrap=True, highlight=False
            )
        self.broken |= frozenset(new)
        self._met |= set(names)
        if len(self._met) > self.recipe.data.max_broken:
            raise too_many_broken(sorted(self._met), self.recipe.data.max_broken)

    def gather_broken(self) -> None:
        """Make `broken` the same on all processes, which all call this."""
        self.broken = frozenset(gather_object(sorted(self.broken)))

    # -- gradients ----------------------------------------------------------------------------------------------

    def exploded(self, grad_norm: float) -> bool:
        """Whether a finite gradient norm is far above the usual one, which it then updates."""
        self._norms_seen += 1
        usual = self._usual_norm or grad_norm
        self._usual_norm = 0.95 * usual + 0.05 * min(grad_norm, _EXPLOSION * usual)
        return self._norms_seen > _USUAL_AFTER and grad_norm > _EXPLOSION * usual

    def report_explosion(self, step: int, grad_norm: float, level: float, nll: float) -> None:
        """Say where a large gradient came from; not more often than every hundred steps.

        The image is of the main process's: asking the others would need all to come to the same verdict.
        """
        if step < self._quiet_until:
            return
        self._quiet_until = step + 100
        self.say(
            f"Step {step}: gradient norm {grad_norm:.3g}, the usual one is {self._usual_norm:.3g}. The image with the "
            f"largest loss has noise level {level:.3g} (nll {nll:.3g} nats/dim).",
            "yellow",
        )

    # -- figures ------------------------------------------------------------------------------------------------

    def log(self, values: dict[str, Any]) -> None:
        """A line of metrics; values that are None stay out of the trackers."""
        if self.accelerator.is_main_process:
            self.run.log(values)
            self.accelerator.log(_scalars(_named(values)), step=values["step"])

    def log_held_out(self, step: int, held_out: Evaluation) -> None:
        """A held-out evaluation, to the terminal too."""
        if not self.accelerator.is_main_process:
            return
        self.run.log({"step": step, "held_out": {"nll": held_out.nll, "bpd": held_out.bpd}})
        flat = {f"held_out/nll at t={level}": value for level, value in held_out.nll.items()}
        if held_out.bpd is not None:
            flat["held_out/bpd"] = held_out.bpd
        self.accelerator.log(flat, step=step)
        self.say(f"step {step}  held-out {describe(held_out)}")


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as one entry a block, and what is None left out."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            named |= {f"{key}/block {index}": item for index, item in enumerate(value)}
        elif isinstance(value, dict):
            named |= {f"{key}/{name}": item for name, item in value.items()}
        elif value is not None:
            named[key] = value
    return named


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Flat and plain, as trackers want them."""
    plain = int | float | bool | str
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat(values).items()}
