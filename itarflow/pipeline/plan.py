"""Inverse plans: the solver of each block of a flow. `itarflow profile` finds them, pipelines keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers.utils import logging

from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.solvers import Jacobi, Solver, sequential
from itarflow.runtime.devices import device_name
from itarflow.runtime.errors import DataError
from itarflow.runtime.json_file import as_type
from itarflow.runtime.model_folder import check_arguments
from itarflow.runtime.text import printable

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class InversePlan:
    """The solvers of a flow's blocks, and where they were found to be fastest: it is used only there.

    Args:
        solvers: one a block, noise side first; a window of 1 stands for `sequential`.
        num_tokens: of each block, in the same order.
        device: type of the device, such as "cpu" or "cuda".
        batch_size: images that were inverted at a time, >= 1; the plan is used for smaller batches too.
        device_name: of the device, such as "NVIDIA H100 80GB HBM3"; its type, if it has none. This and what follows
            are "" in plans of version 0.2, which are not used.
        dtype: of the transformers' products, such as "torch.bfloat16".
        torch: its version, such as "2.13".
        facts: of the measurement, for display.

    Raises:
        ValueError: not as many solvers as blocks, a window longer than its block, or batch_size < 1.
    """

    solvers: tuple[Jacobi, ...]
    num_tokens: tuple[int, ...]
    device: str
    batch_size: int
    device_name: str = ""
    dtype: str = ""
    torch: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.solvers) != len(self.num_tokens):
            raise ValueError(
                f"the inverse plan has {len(self.solvers)} solvers for {len(self.num_tokens)} blocks; expected one "
                "each."
            )
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size of the inverse plan is {self.batch_size}; expected a number >= 1.")
        if not isinstance(self.device, str):
            raise ValueError(f'device of the inverse plan is {self.device}; expected a name such as "cpu".')
        for solver, num_tokens in zip(self.solvers, self.num_tokens, strict=True):
            solver.check(num_tokens)

    def solvers_of(self, flow: TARFlow) -> list[Solver]:
        """The solvers as `TARFlow.inverse` takes them.

        Raises:
            ValueError: the plan is for another architecture.
        """
        if self.num_tokens != tokens_of_blocks(flow):
            raise ValueError(
                f"the inverse plan is for blocks of {self.num_tokens} tokens, noise side first, but this flow has "
                f"{tokens_of_blocks(flow)}; find one for it by `itarflow profile`."
            )
        return [sequential if solver.window == 1 else solver for solver in self.solvers]

    @property
    def exact(self) -> bool:
        """Whether nothing was faster than one token after another."""
        return all(solver.window == 1 for solver in self.solvers)

    @property
    def place(self) -> str:
        """Where it holds, in words."""
        named = self.device_name or str(self.facts.get("device", ""))
        return _in_words(self.device, named, self.dtype, self.torch)

    def described(self) -> dict[str, str]:
        """A row of a table: title and description."""
        name = f"inverse on {self.place}, up to {self.batch_size} at a time"
        if self.exact:
            return {name: "exact: nothing is faster than one token after another"}
        windows = ", ".join("all" if solver.window is None else str(solver.window) for solver in self.solvers)
        gain = ""
        exact, planned = (self.facts.get(f"seconds, {name}") for name in ("exact", "planned"))
        if isinstance(exact, int | float) and isinstance(planned, int | float) and planned > 0:
            gain = f": {exact / planned:.2f} times as fast as one by one"
        return {name: f"{windows} tokens at once in the blocks, noise side first{gain}"}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"solvers": [asdict(solver) for solver in self.solvers], "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InversePlan:
        """What `to_json` gave.

        Raises:
            DataError: it is not such a dict.
        """
        try:
            plan = as_type(values, cls, "it")
            check_arguments(dict(values), cls.__init__, "it")
            for solver in values["solvers"]:
                check_arguments(solver, Jacobi.__init__, "a solver of it")
        except DataError as error:
            raise DataError(f"this is no inverse plan: {error}. Make one by `itarflow profile`.") from error
        return plan


def tokens_of_blocks(flow: TARFlow) -> tuple[int, ...]:
    """The number of tokens of each block, noise side first."""
    return tuple(block.num_tokens for block in reversed(flow.blocks))  # type: ignore[misc]


def place_of(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where a plan holds that is found, or wanted, here: fields of `InversePlan`.

    Args:
        device: that computes.
        dtype: of the transformers' products.
    """
    major, minor = torch.__version__.split(".")[:2]
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(dtype),
        "torch": f"{major}.{minor}",
    }


def choose(plans: Sequence[InversePlan], place: Mapping[str, str], batch_size: int) -> InversePlan | None:
    """The plan for that place with the least batch size that is not smaller; None if there is none.

    Small batches gain the most: what is faster for a batch is so for smaller ones, but need not be for larger ones.

    Args:
        plans: of a checkpoint.
        place: from `place_of`.
        batch_size: images that are inverted at a time.
    """
    large_enough = [plan for plan in plans if plan.batch_size >= batch_size]
    fitting = [plan for plan in large_enough if all(getattr(plan, name) == value for name, value in place.items())]
    return min(fitting, key=lambda plan: plan.batch_size, default=None)


def planned(
    plans: Sequence[InversePlan], flow: TARFlow, here: Callable[[], Mapping[str, str]], batch_size: int
) -> Solver | list[Solver]:
    """The solvers of the plan that `choose` gives; `sequential` if there is none.

    Where there are plans for this type of device, but for other devices, it is said, once.

    Args:
        plans: of a checkpoint.
        flow: the checkpoint's.
        here: gives the place, see `place_of`; called if there are plans.
        batch_size: images that are inverted at a time.
    """
    if not plans:
        return sequential
    place = here()
    plan = choose(plans, place, batch_size)
    if plan is not None:
        return plan.solvers_of(flow)
    alike = [one for one in plans if one.device == place["device"]]
    if alike and not any(choose([one], place, 1) for one in alike):
        found = "; ".join(dict.fromkeys(one.place for one in alike))
        _warn_once(
            f"The checkpoint's inverse plan is not used: it was found on {found}, and this is {_in_words(**place)}. "
            "The inverse is exact, one token after another; `itarflow profile CHECKPOINT` finds a plan for here."
        )
    return sequential


@cache
def _warn_once(text: str) -> None:
    logger.warning(printable(text))  # names in a checkpoint may be anybody's


def _in_words(device: str, device_name: str, dtype: str, torch: str) -> str:
    """A place."""
    return f"{device_name or device} in {dtype.removeprefix('torch.') or 'unknown dtype'}, torch {torch or 'unknown'}"


def replaced(plans: Sequence[InversePlan], found: InversePlan) -> list[InversePlan]:
    """The plans with `found` in the place of those for its device, dtype and batch size; in order of these.

    Those of another version of torch go too, and those for its type of device that do not say where they hold.
    """

    def superseded(plan: InversePlan) -> bool:
        same = (plan.device, plan.batch_size) == (found.device, found.batch_size)
        return same and (plan.device_name, plan.dtype) in ((found.device_name, found.dtype), ("", ""))

    others = [plan for plan in plans if not superseded(plan)]
    return sorted([*others, found], key=lambda plan: (plan.device, plan.device_name, plan.dtype, plan.batch_size))
