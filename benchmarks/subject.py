"""The model that is measured, and the settings that all paths share."""

from __future__ import annotations

import math
import runpy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from peaks import chosen_device
from torch import Tensor

from itarflow.codec import CodecConfig
from itarflow.data import DataConfig
from itarflow.flow import NoiseConfig, TARFlow
from itarflow.pipeline import ITARFlowPipeline
from itarflow.pipeline.plan import InversePlan
from itarflow.presets import ModelConfig
from itarflow.training import Recipe

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of every path."""

    model: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[RECIPE|PIPELINE]")] = None
    """A recipe file, or a pipeline's folder with its weights; without either, the sizes below count."""
    width: int = 256
    """Channels of the transformers."""
    image_size: int = 32
    """Side of the images."""
    in_channels: int = 3
    """Channels of the images."""
    patch_size: int = 2
    """Side of a patch."""
    layers: tuple[int, ...] = (2, 2, 2, 12)
    """Of each block, noise side last."""
    classes: int = 10
    """0 = no labels."""
    starflow: bool = False
    """Measure the same sizes with STARFlow's blocks, too, whose label comes as a vector before the tokens."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Images at a time."""
    dtype: Literal["float32", "bf16"] = "float32"
    """Precision of the transformers: bf16 = autocast."""
    peer: Path | None = None
    """A clone of the official ml-itarflow, which then does the same with the same weights and inputs."""
    only: tuple[str, ...] = ()
    """Names of the variants to measure; () = all."""
    repeats: int = 5
    """Timed repetitions, of which the median is shown."""
    warm_up: int = 1
    """Repetitions before them."""
    memory: bool = True
    """Measure the working memory too; on a CPU each variant then runs in a process of its own first."""
    device: str | None = None
    """Such as cpu or cuda; None = the accelerator, if there is one."""
    threads: int | None = None
    """Of the CPU; None = as PyTorch chooses."""
    seed: int = 0
    """Of weights and inputs."""
    json: Path | None = None
    """Write the figures here, too."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--repeats", self.repeats, 1),
            ("--warm-up", self.warm_up, 0),
            ("--threads", 1 if self.threads is None else self.threads, 1),
            ("--batch-sizes", min(self.batch_sizes, default=0), 1),
        ):
            if value < least:
                raise ValueError(f"{name} has {value}; expected numbers >= {least}.")

    def torch_device(self) -> torch.device:
        """Where everything runs; raises ValueError if there is no such device."""
        return chosen_device(self.device)


@dataclass(frozen=True)
class Subject:
    """A flow on its device, with a recipe that says how it is trained."""

    name: str
    flow: TARFlow
    recipe: Recipe
    plans: tuple[InversePlan, ...] = ()
    """Of a pipeline, as `itarflow profile` left them."""

    @property
    def levels(self) -> tuple[float, float]:
        """(t_min, t_max), which for a flow of one noise level may be equal."""
        return self.recipe.noise_range or (self.recipe.noise.t_min, self.recipe.noise.t_max)

    def noise(self, batch_size: int, seed: int) -> Tensor:
        """(B, N, D), standard normal: z before it is scaled by the prior's variance."""
        return self._drawn(batch_size, self.flow.z_shape, seed)

    def noisy(self, batch_size: int, seed: int) -> Tensor:
        """(B, C, H, W): uniform random pixels with noise of the largest level."""
        clean = torch.rand(self.flow.image_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        noise = self._drawn(batch_size, self.flow.image_shape, seed + 1)
        return clean.to(self.flow.device) + self.levels[1] * noise

    def labels(self, batch_size: int) -> Tensor | None:
        """(B,), one class after another; None without classes."""
        num_classes = self.flow.config.num_classes
        return torch.arange(batch_size, device=self.flow.device) % num_classes if num_classes else None

    def _drawn(self, batch_size: int, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch_size, *shape, generator=generator).to(self.flow.device)


def open_subjects(options: Options) -> list[Subject]:
    """Build or load the flow; with `starflow` the same with STARFlow's blocks is the second one.

    Raises:
        ValueError: sizes that do not fit together, a file that holds no recipe, or a pipeline, whose weights fit its
            own blocks alone, with `starflow`.
        OSError: there is no such file or folder.
    """
    subject = open_subject(options)
    if not options.starflow:
        return [subject]
    if options.model is not None and options.model.is_dir():
        raise ValueError(f"--starflow is given with a pipeline, {options.model}; expected a recipe, or sizes.")
    recipe = replace(subject.recipe, model=with_starflow_blocks(subject.recipe.model))
    flow = _random_flow(recipe, options.seed).to(options.torch_device())
    return [subject, Subject(f"{subject.name}, STARFlow's blocks", flow, recipe)]


def with_starflow_blocks(model: ModelConfig) -> ModelConfig:
    """The same sizes with STARFlow's blocks; labels become the one vector before the tokens."""
    smallest = model.patch_size if isinstance(model.patch_size, int) else min(model.patch_size)
    return replace(
        model,
        rotary_side=model.image_size // smallest,
        start_token=True,
        learned_first_token=False,
        final_norm=True,
        soft_clip=4.0,
        softplus_scale=True,
        first_block_reversed=True,
        context_dim=model.num_classes + 1 if model.num_classes else 0,
        context_tokens=1 if model.num_classes else 0,
    )


def open_subject(options: Options) -> Subject:
    """Build or load the flow.

    Raises:
        ValueError: sizes that do not fit together, or a file that holds no recipe.
        OSError: there is no such file or folder.
    """
    device = options.torch_device()
    if options.model is None:
        sizes = ModelConfig(
            image_size=options.image_size, in_channels=options.in_channels, num_classes=options.classes,
            patch_size=options.patch_size, channels=options.width, num_layers=options.layers,
        )  # fmt: skip
        recipe = Recipe(name="sizes of the command line", model=sizes, data=DataConfig())
        return Subject(recipe.name, _random_flow(recipe, options.seed).to(device), recipe)
    if options.model.is_dir():
        pipeline = ITARFlowPipeline.from_pretrained(options.model)
        flow = pipeline.flow
        recipe = Recipe(name="pipeline", model=_sizes(flow), data=DataConfig(), noise=_noise(flow))
        return Subject(options.model.name, flow.eval().to(device), recipe, tuple(pipeline.inverse_plans))
    if options.model.suffix != ".py" or not options.model.is_file():
        raise OSError(f"{options.model} is neither a recipe file (.py) nor the folder of a pipeline. Check the path.")
    recipe = runpy.run_path(str(options.model)).get("recipe")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{options.model} defines no recipe; expected one of the files in recipes/.")
    recipe = replace(recipe, codec=CodecConfig())  # steps are measured on random images, whatever they stand for
    return Subject(recipe.name, _random_flow(recipe, options.seed).to(device), recipe)


def _random_flow(recipe: Recipe, seed: int) -> TARFlow:
    """Fresh, but no identity: its last layers are not zero, only so small that samples stay finite."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(recipe.model.build(recipe.noise_range)).eval()


def randomised(flow: TARFlow) -> TARFlow:
    """A fresh flow whose last layers are made random in place, by the global generator."""
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.25 / math.sqrt(block.proj_out.in_features))
    return flow


def _sizes(flow: TARFlow) -> ModelConfig:
    values: dict[str, Any] = {field.name: flow.config[field.name] for field in fields(ModelConfig)}
    return ModelConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _noise(flow: TARFlow) -> NoiseConfig:
    low, high = flow.config.noise_range or (NoiseConfig().t_min, NoiseConfig().t_max)
    return NoiseConfig(t_min=low, t_max=high, distribution="uniform" if low < high else "constant")
