"""The golden cases, and what our code gives for each of their calls: for test_golden.py and the deviation table.

A call of the official code is translated into ours, and every tensor that it recorded is paired with our value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from itarflow.convert import load_official, name_map
from itarflow.denoisers import DenoiseScheduler, FlowDenoiser, denoise
from itarflow.denoisers.ode import Method, noise_levels
from itarflow.flow import NoiseConfig, TARFlow, nll_per_dim
from itarflow.flow.block import FlowOutput
from itarflow.flow.density import updated_prior_variance
from itarflow.flow.noise import dequantise, lognormal_level, loss_weight, quadratic_level, uniform_level
from itarflow.inverse import Guidance

GOLDEN = Path(__file__).parent / "golden"
RTOL, ATOL = 1e-4, 5e-5

KNOWN_QUIRKS = {
    # ml-itarflow accepts guide_what, but only asks whether it is empty: "a" and "b" both guide scale and shift.
    ("itarflow_sample_guide_what", "a.x"),
    ("itarflow_sample_guide_what", "b.x"),
    # In a batch, the official product of Gaussians uses the variance ratio of sample 0 for all means.
    ("itarflow_sample_starflow", "official_batched_bug_annealed.x"),
    # In official sampling label -1 indexes the last class; in the official forward pass, and with us, it is the mean.
    ("itarflow_sample_quirk_yneg", "official.x"),
}
"""(case, tensor) that are recorded, but that we do not want to equal."""

OF_TRAINING = re.compile(r"lr\..*|sched\.y_dropped|sched\..*\.x_noisy")
"""Tensors that training.py makes, so that its tests compare them."""

WEIGHTS: dict[str, Any] = {
    "ones": "one",
    "t": "t",
    "sqr_t": "t2",
    "t_norm": "t_normalised",
    "sqr_t_norm": "t2_normalised",
}
"""Official name of a loss weight -> ours."""

METHODS: dict[str, Method] = {"ode": "euler", "sde_vanilla": "sde"}
"""Official name of the denoising dynamics -> our method."""


@dataclass(frozen=True)
class Case:
    """A folder of golden data."""

    name: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls of the official code; each has an id, a function and inputs. Those of STARFlow are not listed."""
        return self.spec.get("calls", [])

    def inputs(self, call: dict[str, Any]) -> dict[str, Any]:
        """The tensors (or None) that the call got, by the official argument's name."""
        return {name: None if key is None else self.tensors[key] for name, key in call["inputs"].items()}

    def expected(self, call: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that the call gave, without its id in front of their names."""
        prefix = call["id"] + "."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def flow(self) -> TARFlow:
        """The case's model, read from its official checkpoint."""
        constructor = self.spec["constructor"]
        path = (GOLDEN / self.name / self.spec["weights"]).resolve()
        return _loaded(path, constructor["in_channels"], constructor.get("input_scale", 1))


@dataclass(frozen=True)
class Comparison:
    """One recorded tensor beside our value for it."""

    case: str
    call: str
    tensor: str
    ours: Tensor
    expected: Tensor

    @property
    def kind(self) -> str:
        """What the tensor is, without the numbers that tell blocks and steps apart: "z", "grad.param", ..."""
        if self.tensor.startswith("grad.param"):
            return "grad.param"
        return ".".join(part for part in self.tensor.split(".") if not part.isdigit())

    @property
    def tolerance(self) -> float:
        """The absolute part of the tolerance: no larger than 5e-5 of the largest value."""
        return ATOL * min(1.0, self.expected.abs().max().item())

    @property
    def absolute(self) -> float:
        """The largest deviation."""
        return (self.ours.double() - self.expected.double()).abs().max().item()

    @property
    def relative(self) -> float:
        """The largest deviation in units of the largest recorded value."""
        largest = self.expected.abs().max().item()
        return self.absolute / largest if largest else self.absolute


@cache
def load_cases() -> tuple[Case, ...]:
    """All cases of ml-tarflow and ml-itarflow, sorted by name; for ml-starflow's see test_convert_starflow."""
    folders = sorted(path.parent for path in GOLDEN.glob("*/case.json") if not path.parent.name.startswith("starflow"))
    return tuple(
        Case(folder.name, json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors"))
        for folder in folders
    )


def golden_calls() -> list[tuple[Case, dict[str, Any]]]:
    """Every call of every case whose function is one of ours here."""
    return [(case, call) for case in load_cases() for call in case.calls if call["function"] in _FUNCTIONS]


def compare(case: Case, call: dict[str, Any]) -> Iterator[Comparison]:
    """Run our code on a call's inputs and pair what comes out with every tensor the official code gave.

    Raises:
        KeyError: a recorded tensor for which there is no value of ours.
    """
    ours = _FUNCTIONS[call["function"]](case, call)
    for name, expected in case.expected(call).items():
        full_name = f"{call['id']}.{name}"
        if (case.name, full_name) not in KNOWN_QUIRKS and not OF_TRAINING.fullmatch(full_name):
            yield Comparison(case.name, call["id"], name, ours[name].reshape(expected.shape), expected)


def guidance_of(case: Case, call: dict[str, Any]) -> Guidance:
    """The official sampling arguments as our `Guidance`."""
    kwargs = call["kwargs"]
    starflow = kwargs.get("lerp_style") == "starflow"
    in_log_space = case.spec["repo"] == "ml-tarflow"
    blocks = 1 if starflow else kwargs.get("guide_flows", -1)
    what = kwargs.get("guide_what", "ab")
    return Guidance(
        weight=kwargs["guidance"],
        rule="log_scale" if in_log_space else "gaussian" if starflow else "scale",
        schedule="linear" if kwargs.get("annealed_guidance") else "constant",
        blocks=None if blocks < 0 else blocks,
        shift="b" in what,
        scale="a" in what,
        temperature=kwargs.get("attn_temp", 1.0),
    )


@cache
def _loaded(path: Path, in_channels: int, input_scale: float) -> TARFlow:
    return load_official(path, in_channels=in_channels, input_scale=input_scale)


def _level(t: Any) -> Any:
    """The official noise level (B, 1) as ours (B,); None stays None."""
    return None if t is None else t[:, 0]


def _forward(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """z and log-determinants with those of each block, loss, and its gradients."""
    flow, inputs = case.flow(), case.inputs(call)
    x, level = inputs["x"].clone().requires_grad_(), _level(inputs.get("t"))
    output, blocks = _with_blocks(flow, lambda: flow(x, inputs["y"], level))
    nll = nll_per_dim(output)
    weight = torch.ones(len(x))
    if "reweight" in call:
        config = NoiseConfig(t_min=call["t0"], t_max=call["t1"], weight=WEIGHTS[call["reweight"]])
        weight = loss_weight(config, level)
    loss = (weight * nll).mean()
    result = {
        "z": output.z,
        "logdets": output.log_det / x[0].numel(),
        "nll_per_dim": nll,
        "loss": loss,
        **_block_tensors(blocks),
        **(_gradients(flow, loss, x, call["grads"]["params"]) if "grads" in call else {}),
    }
    return {name: tensor.detach() for name, tensor in result.items()}


def _with_blocks(flow: TARFlow, run: Callable[[], FlowOutput]) -> tuple[FlowOutput, list[tuple[Tensor, FlowOutput]]]:
    """The result of `run`, and what went into and came out of each block meanwhile."""
    blocks: list[tuple[Tensor, FlowOutput]] = []
    hooks = [block.register_forward_hook(lambda _, args, out: blocks.append((args[0], out))) for block in flow.blocks]
    try:
        return run(), blocks
    finally:
        for hook in hooks:
            hook.remove()


def _block_tensors(blocks: list[tuple[Tensor, FlowOutput]]) -> dict[str, Tensor]:
    per_dim = [output.log_det / output.z[0].numel() for _, output in blocks]
    return {
        "block_logdets": torch.stack(per_dim, dim=1),
        "residuals": torch.stack([(out.z - x).square().mean(dim=(1, 2)) for x, out in blocks], dim=1),
        "norms": torch.stack([out.z.square().mean(dim=(1, 2)) for _, out in blocks], dim=1),
        **{f"outputs.{index}": output.z for index, (_, output) in enumerate(blocks)},
    }


def _gradients(flow: TARFlow, loss: Tensor, x: Tensor, official_names: list[str]) -> dict[str, Tensor]:
    names = name_map(flow, "attn_blocks") | name_map(flow, "head_blocks")
    parameters = dict(flow.named_parameters())
    wanted = [parameters[names[name]] for name in official_names]
    gradients = torch.autograd.grad(loss, [x, *wanted])
    keys = ["grad.x", *(f"grad.param.{name}" for name in official_names)]
    return dict(zip(keys, gradients, strict=True))


def _reverse(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """A sample from given noise, and the path to it."""
    flow, inputs = case.flow(), case.inputs(call)
    # The official noise is standard normal; our z already has the prior's variance.
    z = inputs["x"] * flow.prior_variance.sqrt()
    path = flow.inverse(
        z, inputs["y"], _level(inputs.get("t")), guidance=guidance_of(case, call), return_trajectory=True
    )
    # Official paths are not divided by input_scale. Their first entry, before the variance, is in cases without one.
    steps = {f"seq.{index}": image * flow.config.input_scale for index, image in enumerate(path)}
    return {"x": path[-1], **steps}


def _iterative_denoising(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """The integration from t1 to 0, and its steps. Fresh noise is handed out from the recording."""
    inputs = case.inputs(call)
    t_max, t_min = call["t1"], call["t0"]
    num_steps = call["steps"] or int(t_max / 0.01)
    trace: dict[str, Tensor] = {}

    def record(index: int, t: float, x: Tensor, x0: Tensor) -> None:
        trace.update({f"trace.x.{index}": x.clone(), f"trace.x0.{index}": x0.clone()})

    draws = list(inputs.get("noise", ()))
    with mock.patch("itarflow.denoisers.ode.randn_tensor", side_effect=draws) as drawn:
        x = denoise(
            FlowDenoiser(case.flow(), slice_size=call.get("denoising_batch_size")),
            inputs["x"],
            inputs["y"],
            DenoiseScheduler(
                t_max=t_max,
                t_min=t_min,
                num_denoise_steps=num_steps,
                method=METHODS[call["dyn"]],
                clip=bool(call["clip"]),
            ),
            callback=record,
        )
    if drawn.call_count != len(draws):
        raise AssertionError(f"{case.name} {call['id']}: {drawn.call_count} draws, but {len(draws)} were recorded.")
    return {"x": x, "ts": torch.tensor(noise_levels(t_max, t_min, num_steps)), **trace}


def _self_denoise(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """One step of Tweedie's formula."""
    inputs = case.inputs(call)
    return {"x0": FlowDenoiser(case.flow())(inputs["x"], inputs["y"], call["t"] if "t" in call else call["sigma"])}


def _score(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """Score, log-density and Tweedie's estimate."""
    flow, inputs = case.flow(), case.inputs(call)
    x, labels = inputs["x"], inputs["y"]
    level = torch.full((len(x),), call["sigma"]) if "sigma" in call else _level(inputs["t"])
    denoiser = FlowDenoiser(flow)
    with torch.no_grad():
        log_prob = flow.log_prob(x, labels, level)
    return {"score": denoiser.score(x, labels, level), "log_prob": log_prob, "tweedie": denoiser(x, labels, level)}


@torch.no_grad()
def _bpd(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """Bits per dim of 8-bit images. Dividing a grey level's width by 128 costs log(128) nats a dim."""
    flow, inputs = case.flow(), case.inputs(call)
    x = dequantise(inputs["images"].float() / 127.5 - 1, inputs["u"])
    num_dims = x[0].numel()
    log_det, log_prob = flow(x).log_det, flow.log_prob(x)
    discrete = log_prob - num_dims * math.log(128)
    bpd = -discrete / (num_dims * math.log(2))
    return {
        "x": x,
        "prior_log_p": discrete - log_det,
        "logdets": log_det / num_dims,
        "bpd": bpd,
        "bpd_mean": bpd.mean(),
    }


@torch.no_grad()
def _update_prior(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """The prior variance over three training batches, and a sample with the last."""
    flow, inputs = case.flow(), case.inputs(call)
    labels, level = inputs["y"], _level(inputs["t"])
    variance = flow.prior_variance
    result = {"var_before": variance}
    for index, images in enumerate(inputs["xs"]):
        z = flow(images, labels, level).z
        variance = updated_prior_variance(variance, z)
        result |= {f"z.{index}": z, f"var.{index}": variance}
    return {**result, "x": flow.inverse(inputs["noise"] * variance.sqrt(), labels, level)}


def _noise_schedule(case: Case, call: dict[str, Any]) -> dict[str, Tensor]:
    """Noise levels drawn in three ways, and the loss weights of each."""
    inputs = case.inputs(call)
    t_min, t_max = call["t0"], call["t1"]
    levels = {
        "uni": uniform_level(inputs["u"], t_min, t_max),
        "edm": lognormal_level(inputs["n"][:, 0]),
        "linear": quadratic_level(inputs["u"], t_min, t_max),
    }
    configs = {name: NoiseConfig(t_min=t_min, t_max=t_max, weight=ours) for name, ours in WEIGHTS.items()}
    weights = {
        f"{drawn}.w.{name}": loss_weight(config, level)
        for drawn, level in levels.items()
        for name, config in configs.items()
    }
    return {**{f"{drawn}.t": level for drawn, level in levels.items()}, **weights}


_FUNCTIONS: dict[str, Callable[[Case, dict[str, Any]], dict[str, Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "iterative_denoising": _iterative_denoising,
    "self_denoise": _self_denoise,
    "score": _score,
    "bpd": _bpd,
    "update_prior": _update_prior,
    "noise_schedule": _noise_schedule,
}
