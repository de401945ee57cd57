"""One call on one GPU: is everything right there, and how fast is it? In eight and a half minutes at most.

python benchmarks/gpu_check.py --out check --peer ../ml-itarflow

Each step is on its own: what fails is told, and the rest goes on. What has been found is in a JSON file of OUT after
each step, and in the end in a page beside it, whose path is printed last: a section for RESULTS.md. What an earlier
call has found stays. It asks nothing of the network.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

from gpu.figures import Check, Done, Figure, deviations, page
from gpu.targets import targets
from gpu.worker import Step, Worker, run_here, unready

NEEDED = ("torch", "accelerate", "diffusers", "datasets", "msgspec", "safetensors", "einops", "scipy", "sklearn",
          "psutil", "filelock", "rich", "tyro")  # fmt: skip
"""What must be there to import; README.md says how to bring it along."""


class Budget(NamedTuple):
    """Of a step."""

    seconds: float
    module: str
    alone: bool = False
    """Only if it is named: it is for a call of its own, whose time it takes."""


STEPS: dict[str, Budget] = {
    "env": Budget(15, "gpu.device"),
    "kernels": Budget(50, "gpu.device"),
    "right": Budget(40, "gpu.right"),
    "inverse": Budget(75, "gpu.sampling"),
    "starflow": Budget(40, "gpu.sampling"),
    "score": Budget(35, "gpu.scores"),
    "train": Budget(50, "gpu.training"),
    "pipeline": Budget(35, "gpu.sampling"),
    "peer": Budget(35, "gpu.scores"),
    "imagenet64": Budget(20, "gpu.sampling"),
    "jacobi": Budget(20, "gpu.sampling"),
    "token": Budget(20, "gpu.sampling"),  # whose profiler may slow down what follows
    "spread": Budget(20, "gpu.training"),
    "recipe": Budget(50, "gpu.training"),
    "cifar10": Budget(math.inf, "gpu.training", alone=True),
    "study": Budget(math.inf, "gpu.training", alone=True),
}
"""In the order of what is needed most."""
LEAST = 0.5
"""Part of its budget without which a step does not begin."""
GRACE = 0.5
"""Part of its budget in which a step that does not know of the time, such as a compiler's, may still end by itself."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is checked."""

    out: Path = Path("gpu_check")
    """Folder for all that is written."""
    only: tuple[str, ...] = ()
    """Steps to run; without it all but cifar10 and study, which take what time there is."""
    seconds: float = 505.0
    """For all of it. Steps that no longer fit are left out, and named."""
    peer: Path | None = None
    """A clone of the official ml-itarflow, for its speed on the same weights."""
    data: Path | None = None
    """CIFAR-10 as parquet files, train-* and test-*, for the steps cifar10 and study."""
    features: Path | None = None
    """The Inception network's weights, for the study; None = distances of a small network, which are no FID."""
    minutes: float = 6.0
    """For the training of the step cifar10."""
    dry: bool = False
    """Run on the CPU with tiny sizes, to see whether the script itself is right. Its figures mean nothing."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in STEPS]
        if unknown:
            raise ValueError(f"--only names {unknown[0]!r}; expected some of {', '.join(STEPS)}.")
        for name, value in (("--seconds", self.seconds), ("--minutes", self.minutes)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0.")
        for name, folder in (("--peer", self.peer), ("--data", self.data), ("--features", self.features)):
            if folder is not None and not folder.exists():
                raise ValueError(f"{name} {folder} is not there; check the path, or leave it out.")


class UnableError(Exception):
    """No step can run here."""


def check(options: Options, command: str, began: float, say: Callable[[str], None] = print) -> Check:
    """Run the steps, and write what they find.

    Args:
        options: what is checked.
        command: by which.
        began: when the time began, of `time.monotonic()`.
        say: tells of each step, and the page with its path in the end.

    Raises:
        UnableError: if no step can run here, for want of a GPU or of a package.
    """
    worker = Worker()
    unable = unready(dry=True) if options.dry else worker.start(began + options.seconds)
    if unable is not None:
        raise UnableError(unable)
    try:
        return _checked(options, command, began, say, worker)
    finally:
        worker.stop()


def _checked(options: Options, command: str, began: float, say: Callable[[str], None], worker: Worker) -> Check:
    options.out.mkdir(parents=True, exist_ok=True)
    file = _free(options.out, "gpu_check", ".json")
    found = Check(command=command, device="", dry=options.dry, steps=[])
    try:
        for name in options.only or [name for name, budget in STEPS.items() if not budget.alone]:
            done = Done(name=name)
            found.steps.append(done)
            left = options.seconds - (time.monotonic() - began)
            _run(options, done, left, worker)
            found = Check(command=command, device=_device(found), dry=options.dry, steps=found.steps)
            file.write_text(json.dumps(found.to_json(), indent=1, default=str) + "\n")
            left_out = [figure for figure in done.figures if figure.left_out is not None]
            ends = [] if done.failed is None else [done.failed]
            ends += [f"{figure.what} left out, {figure.left_out}" for figure in left_out]
            figures = len(done.figures) - len(left_out)
            say(f"{name}: {figures} figures in {done.seconds:.1f} s{': ' * bool(ends)}{'; '.join(ends)}")
    finally:
        written = file.with_suffix(".md")
        written.write_text(told(found))
        say(f"\n{told(found)}\nThis page is in {written}")
    return found


def told(found: Check) -> str:
    """The page of a check; a dry run has no targets."""
    figures = [figure for step in found.steps for figure in step.figures]
    return page(found, [] if found.dry else [target.row for target in targets(figures)])


def _run(options: Options, done: Done, left: float, worker: Worker) -> None:
    budget = STEPS[done.name]
    if (left < LEAST * budget.seconds and not budget.alone) or left <= 0:
        done.failed = f"left out: {max(0, left):.0f} s were left, and it has {budget.seconds:.0f}"
        return
    if not options.dry:
        starting = time.monotonic()
        done.failed = worker.start(starting + left)
        left -= time.monotonic() - starting
        if done.failed is not None:
            return
    began = time.monotonic()
    grace = 0.0 if budget.alone else GRACE * budget.seconds
    until = math.inf if options.dry else began + min(budget.seconds, left)
    setting = {"dry": options.dry, "out": options.out.resolve(), "peer": options.peer and options.peer.resolve(),
               "data": options.data and options.data.resolve(), "minutes": options.minutes, "until": until,
               "features": options.features and options.features.resolve()}  # fmt: skip
    step = Step(done.name, budget.module, setting)
    if options.dry:  # there is no device that a step could leave broken
        done.failed = run_here(step, done.figures.append)
    else:
        worker.run(step, done, min(until + grace, began + left))
    done.seconds = time.monotonic() - began


def _device(found: Check) -> str:
    machine = next((f for step in found.steps for f in step.figures if f.what == "machine"), Figure(what=""))
    named = [f"{key} {machine.more[key]}" for key in ("torch", "CUDA", "driver", "triton") if key in machine.more]
    return ", ".join([str(machine.more.get("name", "a GPU that the step env was not asked to name")), *named])


def _free(folder: Path, stem: str, suffix: str) -> Path:
    """A file that is not there yet: what an earlier call has found stays."""
    number, path = 1, folder / f"{stem}{suffix}"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 if anything deviated, with 2 if nothing can run."""
    began = time.monotonic()
    words = sys.argv[1:] if args is None else list(args)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        _refuse(f"{', '.join(missing)} can't be imported; benchmarks/README.md says which wheels to bring.")
    import tyro  # now that it is known to be there

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = tyro.cli(Options, prog="benchmarks/gpu_check.py", description=__doc__, args=words)
    try:
        found = check(options, shlex.join(["python", "benchmarks/gpu_check.py", *words]), began)
    except UnableError as error:
        _refuse(str(error))
    if any(True for _ in deviations(found)):
        sys.exit(1)


def _refuse(why: str) -> NoReturn:
    print(f"Error: {why}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
