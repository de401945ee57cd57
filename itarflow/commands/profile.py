"""`itarflow profile`: where the inverse spends its time, and its fastest solvers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from itarflow.codec import codec_of, to_pixels
from itarflow.commands.class_labels import check_seed
from itarflow.commands.console import say
from itarflow.commands.prompts import Prompts, encode_once, listed_prompts, subjects_of, take_encoder
from itarflow.data.images import spread_over, square_side
from itarflow.data.load import DataConfig, load_data
from itarflow.denoisers.ode import denoise
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Jacobi
from itarflow.pipeline.labels import label_tensor
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.pipeline.plan import InversePlan, replaced
from itarflow.pipeline.plan_search import BlockMetrics, FoundPlan, Timing, block_metrics, check_search, find_plan
from itarflow.runtime.devices import usable_device
from itarflow.runtime.files import check_writable, write_json
from itarflow.runtime.pictures import blank_figure, save_figure
from itarflow.runtime.seeds import image_generators

_REAL_IMAGES = 64
"""Images of --data that CRM and IGM are computed on."""


class _Given(NamedTuple):
    """What images are made from, one an image, on their device."""

    labels: Tensor | None
    """(N,); None = all unlabelled."""
    context: Tensor | None = None
    """(N, T, E) of prompts; None = there are none."""
    null_context: Tensor | None = None
    """(1, T, E), of the empty prompt."""

    def part(self, part: slice) -> _Given:
        """The same of some images."""
        labels, context = (None if one is None else one[part] for one in self[:2])
        return _Given(labels, context, self.null_context)


@dataclass(frozen=True)
class Profile:
    """Find the fastest inverse of a checkpoint on this device, and write it into the checkpoint.

    Example: itarflow profile runs/digits/pipeline --data digits --batch-sizes 1 16

    Each block is inverted token by token, by Jacobi iteration on the whole sequence, and by windows of several sizes.
    The fastest of them make a plan, with which no pixel of --num-images images changes by more than
    --largest-difference; from then on the checkpoint samples by it on such a device, in the same precision and with
    this version of torch. `itarflow sample --exact` does without.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/digits/pipeline. One on the Hub is downloaded by
    `hf download NAME/MODEL --local-dir FOLDER`."""
    data: str | None = None
    """Real images for the metrics CRM and IGM: as --data.path in training. None = generated ones."""
    batch_sizes: tuple[int, ...] = (16,)
    """Images that are made at a time; a plan for each, also used for smaller batches. Small ones gain the most."""
    largest_difference: float = 1 / 255
    """Of a pixel, on the scale from 0 to 1, between planned and exact images; half of it is kept as a margin for
    images other than the compared ones. 0 = no difference but rounding."""
    num_images: int = 32
    """Images to compare with the exact ones; at least as many as the largest of --batch-sizes."""
    windows: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """Sizes of windows that are tried, besides the whole sequence; those longer than a block are left out."""
    repeats: int = 3
    """Timed runs of each solver, of which the median counts."""
    class_labels: tuple[str, ...] | None = None
    """Labels of the generated images, by name or number. None = every class in turn, or none."""
    prompt: Prompts = ()
    """Of a checkpoint that takes prompts: texts that the generated images are made from, in turn; see `itarflow
    sample`."""
    guidance_weight: float | None = None
    """None = the checkpoint's."""
    seed: int = 0
    """Of the generated images."""
    output: Path = Path("profile")
    """Folder for profile.json and profile.png."""
    write: bool = True
    """Whether the plans are written into the checkpoint."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        self._check()
        device = usable_device(self.device)
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        self._guidance(pipe)  # refused before any work
        given = self._given(pipe, device)
        metrics = block_metrics(pipe.flow, *self._noisy(pipe, given))
        report = {}
        for batch_size in self.batch_sizes:
            found = self._find(pipe, given, batch_size)
            report[batch_size] = found
            Console().print(_plan_table(pipe, metrics, found))
            say(_summary(found.plan))
            if self.write:
                self._write(pipe, found.plan)
        self._save(metrics, report)
        say(f"figures in {self.output}/; see {self.output / 'profile.png'}")
        if self.write:
            say(f"{self.checkpoint} samples by {'this plan' if len(report) == 1 else 'these plans'} from now on")

    def _check(self) -> None:
        if not self.checkpoint.is_dir():
            raise OSError(
                f"{self.checkpoint} is no folder; expected one with a pipeline, such as runs/digits/pipeline. A "
                "checkpoint on the Hub is brought here by `hf download NAME/MODEL --local-dir FOLDER`."
            )
        if self.num_images < 1:
            raise ValueError(f"--num-images is {self.num_images}; expected a number >= 1.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"--batch-sizes is {list(self.batch_sizes)}; expected numbers >= 1.")
        check_seed(self.seed)
        check_search(self.largest_difference, self.windows, self.repeats)
        check_writable(self.output)
        if self.write:
            check_writable(self.checkpoint)
        blank_figure(1, 1)  # refuses where matplotlib is missing

    def _write(self, pipe: ITARFlowPipeline, plan: InversePlan) -> None:
        pipe.record(
            self.checkpoint,
            "plans",
            lambda known: [
                one.to_json() for one in replaced([InversePlan.from_json(one) for one in known or []], plan)
            ],
        )

    def _given(self, pipe: ITARFlowPipeline, device: str) -> _Given:
        """What the generated images are made from; brings the pipeline to the device.

        Raises:
            ValueError: labels or prompts that there are not, or --data, which has no prompts.
        """
        count = max(self.num_images, *self.batch_sizes)
        subjects = subjects_of(pipe, self.class_labels, listed_prompts(self.prompt) or None, count)
        if subjects.prompts is None:
            return _Given(label_tensor(subjects.labels, pipe.to(device).flow.device))
        if self.data is not None:
            raise ValueError("--data has no prompts, which this checkpoint is conditioned on; leave it out.")
        encoder = take_encoder(pipe)
        embeds = encode_once(encoder, subjects.prompts, device).of(slice(None))
        pipe.to(device).register_modules(text_encoder=encoder.encoder, tokenizer=encoder.tokenizer)
        context, null_context = (embeds[name].to(device) for name in ("prompt_embeds", "negative_prompt_embeds"))
        return _Given(None, context, null_context)

    def _noisy(self, pipe: ITARFlowPipeline, given: _Given) -> tuple[Tensor, Tensor | None, float, Tensor | None]:
        """Noisy images at t_max, with labels and context, for the metrics."""
        flow, t_max = pipe.flow, pipe.scheduler.config.t_max
        generator = torch.Generator().manual_seed(self.seed)
        if self.data is None:
            part, z = given.part(slice(0, min(self.batch_sizes))), flow.sample_prior(min(self.batch_sizes), generator)
            noisy = flow.inverse(z, part.labels, t_max, context=part.context, dtype=pipe.sampling_dtype())
            return noisy, part.labels, t_max, part.context
        channels, side = pipe.picture_shape[0], square_side(pipe.picture_shape)
        config = DataConfig(path=self.data, held_out_images=0)
        data = load_data(config, image_size=side, in_channels=channels)
        chosen = spread_over(len(data.train), min(len(data.train), _REAL_IMAGES))
        examples = [data.train[index] for index in chosen]
        images = to_pixels(torch.stack([example.image for example in examples])).to(flow.device)
        codes = codec_of(pipe.vae, slice_size=8).encode(images).mean
        noise = torch.randn(codes.shape, generator=generator).to(flow.device)
        same_classes = len(data.class_names) == flow.config.num_classes > 0
        labels = torch.tensor([example.label for example in examples]).to(flow.device) if same_classes else None
        return codes + t_max * noise, labels, t_max, None

    def _find(self, pipe: ITARFlowPipeline, given: _Given, batch_size: int) -> FoundPlan:
        flow, guidance, t_max = pipe.flow, self._guidance(pipe), pipe.scheduler.config.t_max
        count = max(self.num_images, batch_size)
        z = flow.sample_prior(count, image_generators(torch.Generator().manual_seed(self.seed), count))
        size = max(batch_size, min(count, 16))

        def invert(part: slice, **options: Any) -> Tensor:
            own = given.part(part)
            return flow.inverse(
                z[part],
                own.labels,
                t_max,
                context=own.context,
                null_context=own.null_context,
                guidance=guidance,
                dtype=pipe.sampling_dtype(),
                **options,
            )

        def images(**options: Any) -> Iterator[Tensor]:
            for start in range(0, count, size):
                chunk = slice(start, start + size)
                yield _denoised(pipe, invert(chunk, **options), given.part(chunk))

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=None)
            return find_plan(
                flow,
                partial(invert, slice(0, batch_size)),
                images,
                dtype=pipe.sampling_dtype(),
                batch_size=batch_size,
                largest_difference=self.largest_difference,
                windows=self.windows,
                repeats=self.repeats,
                progress=lambda title, _: progress.update(task, description=f"{batch_size} at a time: {title}"),
            )

    def _guidance(self, pipe: ITARFlowPipeline) -> Guidance:
        stored = pipe.default_guidance
        return stored if self.guidance_weight is None else replace(stored, weight=self.guidance_weight)

    def _save(self, metrics: Sequence[BlockMetrics], report: dict[int, FoundPlan]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        content = {
            "metrics": [asdict(block) for block in metrics],
            "batch_sizes": {
                size: {
                    "plan": found.plan.to_json(),
                    "blocks": [[_row(timing) for timing in block.timings] for block in found.blocks],
                }
                for size, found in report.items()
            },
        }
        write_json(self.output / "profile.json", content)
        _draw(report, self.output / "profile.png")


def _summary(plan: InversePlan) -> str:
    facts, size = plan.facts, plan.batch_size
    exact, planned = facts["seconds, exact"], facts["seconds, planned"]
    if plan.exact:
        return f"{size} at a time: nothing is faster than one token after another ({1e3 * exact:.1f} ms in all)"
    return (
        f"{size} at a time: {1e3 * exact:.1f} ms one token after another, {1e3 * planned:.1f} ms by the plan, with "
        f"all that an inversion prepares ({exact / planned:.2f} times as fast); a pixel differs by at most "
        f"{255 * facts['largest difference of a pixel']:.2f} / 255 in {facts['pictures compared']} images"
    )


def _denoised(pipe: ITARFlowPipeline, noisy: Tensor, given: _Given) -> Tensor:
    """Noisy images denoised by the checkpoint, and decoded, (B, C, H, W) in [0, 1]."""
    without_noise = pipe.schedule(method="euler" if pipe.scheduler.config.method == "sde" else None)
    images = denoise(pipe.flow_denoiser(), noisy, given.labels, without_noise, context=given.context)
    return (codec_of(pipe.vae, slice_size=8).decode(images).clamp(-1, 1) + 1) / 2


def _plan_table(pipe: ITARFlowPipeline, metrics: Sequence[BlockMetrics], found: FoundPlan) -> Table:
    """A row for each block."""
    facts = found.plan.facts
    table = Table(
        title=f"The inverse of {_images(found.plan.batch_size)}, noise side first",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption="CRM: convergence ranking metric. IGM: initial guessing metric of the guesses z/zero. Less is easier. "
        "Evals: that whole-sequence Jacobi needs from these guesses until a change of at most "
        f"{facts['tolerance']:g}; > where it was stopped, because one by one was faster. Fastest: tokens at once, and "
        "first guess.",
        caption_justify="left",
    )
    for column in ("block", "layers", "tokens", "CRM", "IGM", "evals", "exact, ms", "fastest", "ms"):
        justify: Literal["left", "right"] = "left" if column in ("block", "fastest") else "right"
        table.add_column(column, justify=justify)
    depths, last = pipe.flow.config.num_layers, len(metrics) - 1
    for index, (metric, block) in enumerate(zip(metrics, found.blocks, strict=True)):
        whole = [timing for guess in metric.igm if (timing := block.whole(guess)) is not None]
        table.add_row(
            str(last - index),
            str(depths[last - index]),
            str(found.plan.num_tokens[index]),
            f"{metric.crm:.2f}",
            "/".join(f"{value:.2f}" for value in metric.igm.values()),
            "/".join(f"{'' if timing.finished else '>'}{timing.evaluations}" for timing in whole),
            f"{1e3 * block.sequential.seconds:.1f}",
            _name(block.fastest.solver),
            f"{1e3 * block.fastest.seconds:.1f}",
        )
    return table


def _images(batch_size: int) -> str:
    return f"{batch_size} images at a time" if batch_size > 1 else "one image"


def _name(solver: Jacobi) -> str:
    if solver.window == 1:
        return "exact"
    return f"{'all' if solver.window is None else solver.window}, {solver.guess}"


def _row(timing: Timing) -> dict[str, object]:
    values = asdict(timing)
    return {name: None if value != value or value == math.inf else value for name, value in values.items()}


def _draw(report: dict[int, FoundPlan], path: Path) -> None:
    """Seconds of each block over the window, a panel for each batch size."""
    figure = blank_figure(4.6 * len(report), 3.6)
    axes = figure.subplots(1, len(report), squeeze=False)[0]
    for axis, (batch_size, found) in zip(axes, report.items(), strict=True):
        last, marks = len(found.blocks) - 1, {1}
        for index, (block, tokens) in enumerate(zip(found.blocks, found.plan.num_tokens, strict=True)):
            color, best = f"C{index}", dict[int, float]()
            for timing in block.timings:
                window = timing.solver.window or tokens
                marks.add(window)
                best[window] = min(timing.seconds, best.get(window, math.inf))
            finished = sorted((window, seconds) for window, seconds in best.items() if math.isfinite(seconds))
            axis.plot(*zip(*finished, strict=True), "o-", markersize=3, color=color, label=f"block {last - index}")
            stopped = [window for window, seconds in best.items() if not math.isfinite(seconds)]
            axis.plot(stopped, [block.sequential.seconds] * len(stopped), "^", markersize=4, color=color, alpha=0.5)
            place = block.fastest.solver.window or tokens
            axis.plot(place, block.fastest.seconds, "o", markersize=9, fillstyle="none", color=color)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(marks), [str(mark) for mark in sorted(marks)])
        axis.set_yscale("log")
        axis.set_title(_images(batch_size), fontsize=10)
        axis.set_xlabel("tokens at once; triangles: stopped, slower than one by one", fontsize=8)
        axis.set_ylabel("seconds", fontsize=8)
        axis.tick_params(labelsize=8, which="both")
        axis.grid(linewidth=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path, 110)
