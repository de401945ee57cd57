"""Step: whether every kind of flow computes on this device in float32 what a CPU computes in float64."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu.figures import Figure, named_missing, not_installed
from gpu.setting import Setting, distance, tried
from itarflow.denoisers import FlowDenoiser
from itarflow.flow import TARFlow, nll_per_dim
from itarflow.inverse import Guidance, Jacobi, sequential

ROOT = Path(__file__).resolve().parents[2]
GUIDED = Guidance(weight=1.0, rule="log_scale")
Computed = dict[str, Tensor]


class Given(NamedTuple):
    """What a flow is given."""

    images: Tensor
    labels: Tensor | None
    level: Tensor | None
    z: Tensor
    context: Tensor | None
    """Of a flow of texts."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Given:
        """Elsewhere, or in another type."""
        return Given(
            self.images.to(device, dtype),
            None if self.labels is None else self.labels.to(device),
            None if self.level is None else self.level.to(device, dtype),
            self.z.to(device, dtype),
            None if self.context is None else self.context.to(device, dtype),
        )

    def contexts(self) -> dict[str, Tensor]:
        """Of both passes of an inverse."""
        if self.context is None:
            return {}
        return {"context": self.context, "null_context": torch.zeros_like(self.context)}


def right(setting: Setting) -> Iterator[Figure]:
    """All kinds of flows of the tests, in float32 and in bf16; then the tests that need a GPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_flows

    variants = {"texts": tiny_flows.STARFLOW_TEXT, **tiny_flows.VARIANTS}
    for name, changes in list(variants.items())[:: 3 if setting.dry else 1]:
        torch.manual_seed(0)
        flow = TARFlow(**tiny_flows.TINY | changes)
        tiny_flows.randomise(flow)
        yield from _compared(setting, name, flow)
    if not setting.dry:
        yield tried(Figure(what="pytest -m cuda"), lambda blank: tests(setting, blank))


def _compared(setting: Setting, name: str, flow: TARFlow) -> Iterator[Figure]:
    exact = copy.deepcopy(flow).double()
    given = _given(flow)
    expected = _computed(exact, given.to(torch.device("cpu"), torch.float64), all_solvers=False)
    flow = flow.to(setting.device)
    here = given.to(setting.device, torch.float32)

    def compared(blank: Figure, compute: Callable[[], Computed], tolerance: float) -> Figure:
        errors = {what: distance(found, expected[what.split(" by ")[0]]) for what, found in compute().items()}
        wrong = {what: f"{error:.1e}" for what, error in errors.items() if not error <= tolerance}
        return replace(blank, error=max(errors.values()), tolerance=tolerance, more=wrong)

    yield tried(
        Figure(what="flow", case=name, dtype="float32"),
        lambda blank: compared(blank, lambda: _computed(flow, here, all_solvers=True), 1e-3),
    )
    yield tried(
        Figure(what="flow", case=name, dtype="bf16"),
        lambda blank: compared(blank, lambda: _in_bf16(flow, here), 5e-2),
    )


def _given(flow: TARFlow) -> Given:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, *flow.image_shape, generator=generator)
    labels = torch.tensor([0, flow.null_label, 2]) if flow.config.num_classes else None
    level = torch.tensor([0.1, 0.3, 0.5]) if flow.config.noise_conditioned else None
    z, size = 0.5 * torch.randn(3, *flow.z_shape, generator=generator), flow.config.context_tokens
    of_texts = size > 0 and labels is None
    context = torch.randn(3, size, flow.config.context_dim, generator=generator) if of_texts else None
    return Given(images, labels, level, z, context)


def _computed(flow: TARFlow, given: Given, *, all_solvers: bool) -> Computed:
    """All that a flow computes; the same inverse by several solvers is called "inverse by ..."."""
    images, labels, level, z, context = given
    output = flow(images, labels, level, context)
    found = {"z": output.z, "log-determinant": output.log_det}
    flow.zero_grad()
    nll_per_dim(output).mean().backward()
    found["gradients"] = torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])
    flow.zero_grad()
    found["score"] = FlowDenoiser(flow, dtype=flow.dtype).score(
        images, labels, 0.1 if level is None else level, context
    )
    shortest = min(block.num_tokens for block in flow.blocks)
    solvers: dict[str, Any] = {"": sequential}
    if all_solvers:
        solvers |= {" by windows": Jacobi(window=min(3, shortest), tolerance=0.0), " by Jacobi": Jacobi(tolerance=0.0)}
    for how, guidance in (("inverse", None), ("guided inverse", GUIDED)):
        for by, solver in solvers.items():
            found[how + by] = flow.inverse(
                z, labels, level, guidance=guidance, solver=solver, dtype=flow.dtype, **given.contexts()
            )
    return found


def _in_bf16(flow: TARFlow, given: Given) -> Computed:
    images, labels, level, z, context = given
    with torch.no_grad(), torch.autocast(flow.device.type, torch.bfloat16):
        output = flow(images, labels, level, context)
    score = FlowDenoiser(flow, dtype=torch.bfloat16).score(images, labels, 0.1 if level is None else level, context)
    inverse = flow.inverse(z, labels, level, guidance=GUIDED, dtype=torch.bfloat16, **given.contexts())
    return {"z": output.z, "score": score, "guided inverse": inverse}


def tests(setting: Setting, blank: Figure) -> Figure:
    """Those that need a GPU, each in its file."""
    if importlib.util.find_spec("pytest") is None:
        return replace(blank, left_out=not_installed("pytest"))
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.cuda" in path.read_text()]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts=", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "ITARFLOW_TEST_CUDA": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(setting.left, 10), check=False
    )
    missing = named_missing(done.stdout + done.stderr)
    if missing is not None and done.returncode in (2, 4):  # none has run, since one can't be imported
        return replace(blank, left_out=missing)
    told = done.stdout.splitlines()[-1:] or done.stderr.splitlines()[-1:]
    if done.returncode:
        return replace(blank, failed=f"{' '.join(told)}: {' '.join(done.stdout.splitlines()[-6:-1])}")
    return replace(blank, more={"": " ".join(told)})
