"""The command `itarflow`: sample from checkpoints, compare, look into and convert them, and prepare images."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from itarflow.checkpoint import foreign_entries
from itarflow.codec import CodecConfig, load_vae
from itarflow.compare import Comparison, compare, short_names
from itarflow.convert import export_official, load_official
from itarflow.denoise import Denoiser, DenoiseScheduler, Method
from itarflow.denoisers import load_denoiser
from itarflow.diffusion import DiffusionDenoiser
from itarflow.embedding import NULL_LABEL
from itarflow.flow import TARFlow
from itarflow.official_file import CheckpointError
from itarflow.pipeline import ITARFlowPipeline, image_generators
from itarflow.plot import plot_runs
from itarflow.prepare import PrepareConfig, Prepared, prepare
from itarflow.presets import T_MAX, T_MIN, TARFLOW
from itarflow.progress import image_grid
from itarflow.run import RunError, check_writable, replace_folder

_console = Console()


@dataclass(frozen=True)
class Sample:
    """Make images with a checkpoint.

    Example: itarflow sample runs/digits/pipeline --class-labels 3 1 4 --output digits.png
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/digits/pipeline, or a Hugging Face Hub id (NAME/MODEL). Comes first."""
    output: Path = Path("samples.png")
    """A picture file for a grid of all images, or a folder (any name without suffix) for one file an image."""
    class_labels: tuple[str, ...] | None = None
    """Labels, by name or number. None = every class in turn, or no labels if the model has none."""
    num_images: int | None = None
    """How many images; labels are repeated in turn. None = one a label, or 16 if there are no labels."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label, not on how many are made, or how many at a time."""
    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
    num_denoise_steps: int | None = None
    """Score evaluations, 1 or more. None = the checkpoint's."""
    method: Method | None = None
    """Solver of the denoising ODE; skip shows the noisy images. None = the checkpoint's."""
    denoiser: str | None = None
    """What cleans the images, instead of the checkpoint itself: a folder or Hub id of another flow's pipeline, or of
    a DiT or UNet in diffusers' format (facebook/DiT-XL-2-256, once converted to safetensors), for images or codes of
    the same size. One trained on a single noise level, a TARFlow, needs --num-denoise-steps 1; the others know a
    range of levels, and do best with 10 steps or so."""
    batch_size: int = 64
    """Images that are made at a time; lower it if memory runs out."""
    denoise_batch_size: int | None = None
    """Images that are denoised at a time. None = as many as are made."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        _check_output(self.output)
        device = _usable(self.device) if self.device else _best_device()
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        pipe.to(device)
        labels = _chosen_labels(pipe, self.class_labels, self.num_images)
        denoiser = None
        if self.denoiser is not None:
            denoiser = load_denoiser(self.denoiser, slice_size=self.denoise_batch_size, device=device)
        if self.output.suffix:
            columns = _columns(len(set(labels)), len(labels))
            image_grid(list(self._images(pipe, labels, denoiser)), columns).save(self.output)
        else:
            self.output.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(self._images(pipe, labels, denoiser)):
                image.save(self.output / f"{index:06d}.png")
        _say(f"{len(labels)} {'image' if len(labels) == 1 else 'images'} in {self.output}")

    def _images(
        self, pipe: ITARFlowPipeline, labels: list[int | None], denoiser: Denoiser | None
    ) -> Iterator[Image.Image]:
        """The images in order, batch by batch, so that what is done can be saved before the next begins."""
        generators = image_generators(torch.Generator().manual_seed(self.seed), len(labels))
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; expected a number >= 1.")
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield from pipe(
                class_labels=labels[part],
                guidance_weight=self.guidance_weight,
                num_denoise_steps=self.num_denoise_steps,
                method=self.method,
                denoiser=denoiser,
                generator=generators[part],
                denoise_batch_size=self.denoise_batch_size,
            ).images


@dataclass(frozen=True)
class Info:
    """Show what a checkpoint is: architecture, noise levels, sampling defaults, and how it was trained."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, or a Hugging Face Hub id (NAME/MODEL)."""

    def run(self) -> None:
        """Carry the command out."""
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        config, parameters = pipe.flow.config, sum(p.numel() for p in pipe.flow.parameters())
        kind = "iTARFlow, conditioned on the noise level" if config.noise_conditioned else "TARFlow, one noise level"
        num_tokens, token_dim = pipe.flow.z_shape
        _table("Flow", {
            "kind": kind,
            "parameters": f"{parameters:,}",
            "trained on noise levels": _range(config.noise_range),
            "z": f"{num_tokens} tokens of {token_dim} values",
            **_public(config, without=("noise_conditioned", "noise_range")),
        })  # fmt: skip
        _table("Sampling defaults", {
            **_public(pipe.scheduler.config),
            **{f"guidance {key}": value for key, value in vars(pipe.default_guidance).items()},
        })  # fmt: skip
        names = pipe.config.class_names
        if names and names != [str(index) for index in range(len(names))]:
            more = {"...": f"{len(names)} in all"} if len(names) > 20 else {}
            _table("Labels", {str(index): name for index, name in enumerate(names[:20])} | more)
        training = pipe.config.training
        if training:
            recipe = training.get("recipe", {})
            facts = {key: value for key, value in training.items() if key not in ("recipe", "metrics")}
            _table("Training", facts if facts.keys() != {"name"} else {})
            _table("Results", training.get("metrics", {}))
            _table("Recipe", {section: values for section, values in recipe.items() if isinstance(values, dict)})


@dataclass(frozen=True)
class Convert:
    """Turn an official ml-tarflow or ml-itarflow checkpoint into a pipeline, or back by --to-official.

    Example: itarflow convert imagenet_model.pth imagenet64/ --t-max 0.3
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """An official .pth file; with --to-official a pipeline's folder or Hub id."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The folder to write; with --to-official the .pth file."""
    to_official: bool = False
    """Write the official format from ours."""
    overwrite: bool = False
    """Replace the target if it exists."""
    in_channels: int = 3
    """Channels of the images, which the file does not tell."""
    input_scale: float = 1.0
    """The official input_scale, which the file does not tell."""
    t_max: float | None = None
    """Noise level at which to sample: the official t1, or TARFlow's noise_std. None = the paper's for the image
    size, else 0.3."""
    t_min: float | None = None
    """Smallest noise level for denoising: the official t0. None = the paper's 0.01, or less if t_max asks for it."""
    guidance_weight: float = 0.0
    """Guidance by default, in the way of the official code that made the checkpoint."""
    num_denoise_steps: int | None = None
    """Score evaluations by default. None = 10 for an iTARFlow, 1 for a TARFlow."""

    def run(self) -> None:
        """Carry the command out."""
        self._check()
        if self.to_official:
            flow = ITARFlowPipeline.from_pretrained(self.source).flow
            _say(f"official checkpoint in {export_official(flow, self.target)}")
            return
        flow = load_official(Path(self.source), in_channels=self.in_channels, input_scale=self.input_scale)
        pipeline = self._pipeline(flow)
        if self.t_max is not None:  # an assumed level must refuse nothing
            only_level = not flow.config.noise_conditioned and self.t_min is None
            low = self.t_max if only_level else pipeline.scheduler.config.t_min
            flow.register_to_config(noise_range=(low, self.t_max))
        replace_folder(self.target.absolute(), pipeline.save_pretrained)
        parameters = sum(parameter.numel() for parameter in flow.parameters())
        defaults, weight = pipeline.scheduler.config, pipeline.default_guidance.weight
        _say(
            f"pipeline with {parameters:,} parameters in {self.target}/; it samples at t_max {defaults.t_max:g}, "
            f"guidance {weight:g}, and denoises in {defaults.num_denoise_steps} steps down to t_min "
            f"{defaults.t_min:g} unless told otherwise. See `itarflow info {self.target}`."
        )

    def _check(self) -> None:
        """Refuse, before anything is read, a target that can't be written or that would be lost."""
        if not self.to_official and Path(self.source).is_dir():
            raise ValueError(
                f"{self.source} is a folder; expected an official .pth file. To write one from the pipeline in it, "
                "add --to-official."
            )
        holds = any(self.target.iterdir()) if self.target.is_dir() else self.target.exists()
        if self.target.is_dir() and self.to_official:
            raise ValueError(f"{self.target} is a folder; expected a file name ending in .pth.")
        others = foreign_entries(self.target) if self.target.is_dir() else []
        if others:
            raise ValueError(
                f"{self.target} is a folder with other things in it ({others[0]}); expected a new one or a pipeline's."
            )
        if self.target.is_file() and not self.to_official:
            raise ValueError(f"{self.target} is a file; expected a folder for the pipeline.")
        if holds and not self.overwrite:
            raise ValueError(f"{self.target} exists; add --overwrite to replace it, or choose another name.")
        check_writable(self.target.parent)

    def _pipeline(self, flow: TARFlow) -> ITARFlowPipeline:
        iterative, size = flow.config.noise_conditioned, flow.config.image_size
        of_paper = T_MAX if iterative else {row.image_size: row.noise_std for row in TARFLOW.values() if row.noise_std}
        t_max = self.t_max if self.t_max is not None else of_paper.get(size, 0.3)
        if self.t_max is None:
            _console.print(f"[yellow]t_max is not in the file; {t_max} is assumed. Say --t-max if it is another.")
        scheduler = DenoiseScheduler(
            t_max=t_max,
            t_min=self.t_min if self.t_min is not None else min(T_MIN, t_max / 2),
            num_denoise_steps=self.num_denoise_steps or (10 if iterative else 1),
        )
        guidance = {
            "weight": self.guidance_weight,
            "rule": "scale" if iterative else "log_scale",
            "schedule": "linear",
        }
        return ITARFlowPipeline(flow, scheduler, guidance=guidance, training={"name": Path(self.source).stem})


@dataclass(frozen=True)
class Prepare(PrepareConfig):
    """Crop and resize a data set once, into parquet files that train like it but need far less time and room.

    Training reads the folder by --data.path: the classes, labels and, as png, pixels are those of the source.
    An interrupted command goes on where it stopped when it is run again.

    Example: itarflow prepare /data/imagenet/train imagenet64/ --size 64 --crop adm
    """

    source: tyro.conf.Positional[str]
    """Where the images are: digits, a folder, parquet files, or a data set on the Hugging Face Hub."""
    out: tyro.conf.Positional[Path]
    """Folder to write: a new or empty one, or one that the same command has begun."""

    def run(self) -> None:
        """Carry the command out."""
        check_writable(self.out)
        try:
            prepared = prepare(self, console=Console(stderr=True))
        except KeyboardInterrupt:
            Console(stderr=True).print(
                f"[yellow]Stopped.[/] The same command goes on with {escape(str(self.out))} later.", soft_wrap=True
            )
            sys.exit(130)
        broken, speed = sum(map(len, prepared.broken.values())), prepared.images_per_second
        _table("Prepared", {
            **{f"images in {split}": f"{count:,}" for split, count in prepared.images.items()},
            "broken, left out": f"{broken:,}, see {self.out / 'broken.json'}" if broken else "none",
            "classes": len(prepared.class_names) or "none: unlabelled",
            "files": prepared.shards,
            "size": f"{prepared.num_bytes / 1e6:,.1f} MB",
            "speed": f"{speed:,.0f} images/s" if speed else "nothing was left to do",
        })  # fmt: skip
        _say(f"Train on them (NAME is a recipe's): {self._training(prepared)}")

    def _training(self, prepared: Prepared) -> str:
        """The command that trains on what was prepared."""
        train = "train" if "train" in self.split else self.split[0]
        held_out = next((split for split in self.split if split != train), None)
        options = {
            "data.path": self.out,
            "data.split": train,
            "data.held-out-split": held_out,
            "model.image-size": self.size,
            "model.in-channels": self.in_channels,
            "model.num-classes": len(prepared.class_names),
        }
        return "accelerate launch recipes/NAME.py " + " ".join(
            f"--{name} {shlex.quote(str(value))}" for name, value in options.items()
        )


@dataclass(frozen=True)
class Plot:
    """Draw the curves of one training, or of several over one another.

    Example: itarflow plot runs/digits --output curves.png
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]
    """Folders of runs, such as runs/digits."""
    output: Path = Path("curves.png")
    """Picture file: .png, .svg or .pdf."""

    def run(self) -> None:
        """Carry the command out."""
        if not self.runs:
            raise ValueError("no run is named; expected folders such as runs/digits.")
        if self.output.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output {self.output} has an unknown picture format; use .png, .svg or .pdf.")
        check_writable(self.output.parent)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        plot_runs(self.runs, self.output)
        _say(f"curves in {self.output}")


@dataclass(frozen=True)
class Compare:
    """Make noisy images with several checkpoints, clean them in every way that applies, and put all side by side.

    Example: itarflow compare runs/tarflow/pipeline runs/itarflow/pipeline --data digits --output compare

    Each checkpoint generates once, from the same seeds and labels. Its noisy images are then cleaned: by one step of
    its own (self), by its own ODE (own iterative), by those of the other noise-conditioned checkpoints (iterative), by
    diffusion models, and by decoders. What does not apply is left out.
    """

    checkpoints: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folders with pipelines, or Hugging Face Hub ids, of one image size, VAE and number of classes."""
    output: Path = Path("compare")
    """Folder for compare.png, compare.json, and a grid for each checkpoint and way of cleaning."""
    diffusion: tuple[str, ...] = ()
    """Diffusion models in diffusers' format that clean too: folders or Hub ids of a DiT or UNet with its scheduler."""
    decoder: tuple[str, ...] = ()
    """VAEs fine-tuned to decode noisy codes: folders or Hub ids. Only for checkpoints that model a VAE's codes."""
    data: str | None = None
    """Real images whose residual noise is given for reference: as --data.path in training."""
    class_labels: tuple[str, ...] | None = None
    """Labels, by name or number. None = every class in turn, or no labels if the models have none."""
    num_images: int = 16
    """How many images each checkpoint makes; labels are repeated in turn."""
    picture_rows: int = 2
    """How many of them compare.png shows."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label."""
    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional, in generating; 0 = off. None = each checkpoint's."""
    num_denoise_steps: int | None = None
    """Evaluations in each iterative column. None = as the checkpoint says that denoises; 10 for a diffusion model."""
    batch_size: int = 16
    """Images that are made, and cleaned, at a time; lower it if memory runs out."""
    denoise_batch_size: int | None = None
    """Images that a denoiser sees at a time. None = as many as are made."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        check_writable(self.output)
        device = _usable(self.device) if self.device else _best_device()
        size = self.denoise_batch_size or self.batch_size
        pipelines = {
            name: ITARFlowPipeline.from_pretrained(path).to(device)
            for name, path in zip(short_names(self.checkpoints), self.checkpoints, strict=True)
        }
        if not pipelines:
            raise ValueError("no checkpoint is named; expected folders such as runs/NAME/pipeline.")
        diffusion = {}
        for name, path in zip(short_names(self.diffusion), self.diffusion, strict=True):
            denoiser = load_denoiser(path, slice_size=size, device=device)
            if not isinstance(denoiser, DiffusionDenoiser):
                raise ValueError(
                    f"--diffusion {path} is a flow; name it as a CHECKPOINT, and it cleans the others' too."
                )
            diffusion[name] = denoiser
        decoders = {
            name: load_vae(CodecConfig(vae=path)).to(device)
            for name, path in zip(short_names(self.decoder), self.decoder, strict=True)
        }
        comparison = compare(
            pipelines,
            _chosen_labels(next(iter(pipelines.values())), self.class_labels, self.num_images),
            output=self.output,
            diffusion=diffusion,
            decoders=decoders,
            data=self.data,
            seed=self.seed,
            guidance_weight=self.guidance_weight,
            num_denoise_steps=self.num_denoise_steps,
            batch_size=self.batch_size,
            denoise_batch_size=self.denoise_batch_size,
            picture_rows=self.picture_rows,
            console=Console(stderr=True),
        )
        _console.print(_comparison_table(comparison))
        for title, meaning in comparison.metrics.items():
            _say(f"{title}: {meaning}.")
        _say(f"pictures and figures in {self.output}/; see {self.output / 'compare.png'}")


Command = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 and a message where something is wrong.

    Args:
        args: the words after `itarflow`; None = the process's.
    """
    disable_progress_bar()  # diffusers' own, for the loading of files; that of sampling stays
    command: Any = tyro.cli(
        Command,
        prog="itarflow",
        description="Normalizing flows that generate images. Training is started by the files in recipes/.",
        args=args,
    )
    try:
        command.run()
    except (CheckpointError, ImportError, OSError, RunError, ValueError) as error:
        Console(stderr=True).print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("[yellow]Stopped.")
        sys.exit(130)


def _label(pipe: ITARFlowPipeline, text: str) -> int | None:
    """A label from the command line: a name if there is one like it, else a number."""
    if text in (pipe.config.class_names or []) or not text.lstrip("-").isdigit():
        return pipe.label_id(text)
    number = int(text)
    return None if number == NULL_LABEL else pipe.label_id(number)


def _chosen_labels(
    pipe: ITARFlowPipeline, class_labels: Sequence[str] | None, num_images: int | None
) -> list[int | None]:
    """A label an image, as the options of a command say; None = no label."""
    num_classes = pipe.flow.config.num_classes
    given: list[int | None]
    if class_labels:
        given = [_label(pipe, text) for text in class_labels]
    else:
        given = list(range(num_classes)) if num_classes else [None]
    count = num_images if num_images is not None else len(given) if num_classes else 16
    if count < 1:
        raise ValueError(f"--num-images is {count}; expected a number >= 1.")
    return [given[index % len(given)] for index in range(count)]


def _comparison_table(comparison: Comparison) -> Table:
    """A row for each generator and method, a column for each metric."""
    table = Table(title="Images of each checkpoint, cleaned in each way", title_justify="left")
    table.add_column("images of")
    table.add_column("cleaned by")
    for title in comparison.metrics:
        table.add_column(escape(title), justify="right")
    before = None
    for result in comparison.results:
        if before not in (None, result.generator):
            table.add_section()
        values = (result.values[title] for title in comparison.metrics)
        figures = ("-" if value is None else f"{value:.4g}" for value in values)
        broken = f" ({result.broken} not finite)" if result.broken else ""
        table.add_row(escape(result.generator), escape(result.method) + broken, *figures)
        before = result.generator
    if comparison.real is not None:
        table.add_section()
        noise = comparison.real["residual noise"]
        others = [""] * (len(comparison.metrics) - 1)
        table.add_row(f"{comparison.real['images']} real images", "", f"{noise:.4g}", *others)
    return table


def _check_output(output: Path) -> None:
    """Refuse a picture format that can't be written, before hours of sampling."""
    if output.suffix and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"--output {output} has an unknown picture format; use .png, or a folder name without a suffix."
        )
    if output.suffix and output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file name in it, or a name without a suffix.")
    folder = output.parent if output.suffix else output
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _columns(labels: int, images: int) -> int:
    """Columns of a grid: one a label if they are few, else as many as rows."""
    return labels if 2 <= labels <= 12 else math.ceil(math.sqrt(images))


def _usable(device: str) -> str:
    """The device, if PyTorch can compute on it."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"--device {device} can't be used: {reason}. Try cpu, or leave --device out.") from error
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _say(text: str) -> None:
    """Print a line as it stands, so that a path in it can be copied."""
    _console.print(text, markup=False, highlight=False, soft_wrap=True)


def _public(config: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in without}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        items = (
            (name, f"({_short(item)})" if isinstance(item, dict) else _short(item)) for name, item in value.items()
        )
        return "  ".join(f"{name}={item}" for name, item in items)
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _range(noise_range: Sequence[float] | None) -> str:
    return "not recorded" if noise_range is None else f"{noise_range[0]:g} to {noise_range[1]:g}"


def _table(title: str, values: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in values.items():
        table.add_row(escape(key), escape(_short(value)))
    if values:
        _console.print(table)
