"""`itarflow convert`: official checkpoints to pipelines, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from itarflow.codec import CodecConfig, load_vae
from itarflow.commands.console import say
from itarflow.convert import PUBLIC_FILES, export_official, load_official
from itarflow.convert.public_files import Preset, PublicFile, likely_presets
from itarflow.denoisers.load import stored_flow
from itarflow.denoisers.ode import DenoiseScheduler
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.folder import foreign_entries
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.presets import T_MAX, T_MIN, TARFLOW
from itarflow.runtime.files import check_writable, replace_folder
from itarflow.runtime.hub import INDEX, folder_of
from itarflow.runtime.json_file import read_json
from itarflow.runtime.model_folder import CONFIG, read_heads, weight_files
from itarflow.runtime.pipeline_index import ENCODER, pipeline_index
from itarflow.runtime.ranges import LARGEST, check_number
from itarflow.runtime.text import counted, listed, printable
from itarflow.runtime.torch_file import shards_advice
from itarflow.text_encoder import TextEncoder

STARFLOW_T_MAX = 0.3


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of ml-tarflow, ml-itarflow or ml-starflow into a pipeline, or back by --to-official.

    Example: itarflow convert imagenet_model.pth imagenet64/ --t-max 0.3
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """An official .pth file, or its tensors as safetensors; with --to-official a pipeline's folder or Hub id."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The folder to write; with --to-official the .pth file."""
    to_official: bool = False
    """Write the official format from ours."""
    overwrite: bool = False
    """Replace the target if it exists."""
    preset: Literal[Preset, None] = None  # tyro lists these in order
    """Which public file it is: what it does not record, and how it samples, is then as its owners publish it, but for
    what other options say. The card names source and licence."""
    in_channels: int | None = None
    """Channels of the images or codes, which the file does not record. None = 3, or 4 of a STARFlow."""
    image_size: tuple[int, ...] | None = None
    """Of a STARFlow: side, or height and width, of the codes to generate, if not those that it was trained on."""
    input_scale: float = 1.0
    """The official input_scale of a TARFlow or iTARFlow, which the file does not record."""
    soft_clip: float | None = None
    """The soft_clip of ml-starflow, which the file does not record; 0 = off. None = 4."""
    softplus: bool | None = None
    """The use_softplus of ml-starflow, which the file does not record. None = True."""
    seq_order: Literal["L2R", "R2L", None] = None
    """The seq_order of ml-starflow, which the file does not record. None = L2R."""
    context_tokens: int | None = None
    """Of a STARFlow: its number of text tokens. None = as its buffers tell; a file without them needs it."""
    t_max: float | None = None
    """Noise level at which to sample: the official t1, or TARFlow's noise_std. None = the paper's for the image
    size, else 0.3."""
    t_min: float | None = None
    """Smallest noise level for denoising: the official t0. None = the paper's 0.01, or less if t_max asks for it."""
    guidance_weight: float | None = None
    """Default guidance weight, with the rule of the official code that made the checkpoint. None = 0."""
    num_denoise_steps: int | None = None
    """Score evaluations by default. None = 10 for an iTARFlow, 1 for others."""
    vae: str | None = None
    """The VAE of a flow of codes: a folder, or a name on the Hub, such as stabilityai/sd-vae-ft-ema. "none" = leave
    out that of the preset."""
    text_encoder: str | None = None
    """The T5 encoder of a flow of prompts: a folder, or a name on the Hub, such as google/flan-t5-xl. "none" = leave
    out that of the preset."""

    def run(self) -> None:
        """Carry the command out."""
        self._check()
        if self.to_official:
            flow = _stored(self.source)
            say(f"official checkpoint in {export_official(flow, self.target)}")
            return
        public = None if self.preset is None else PUBLIC_FILES[self.preset]
        flow = self._flow(public)
        pipeline = self._pipeline(flow, public)
        self._record_levels(pipeline, public)
        replace_folder(self.target.absolute(), pipeline.save_pretrained)
        parameters = sum(parameter.numel() for parameter in flow.parameters())
        defaults, weight = pipeline.scheduler.config, pipeline.default_guidance.weight
        say(
            f"pipeline with {parameters:,} parameters in {self.target}/; it samples at t_max {defaults.t_max:g}, "
            f"guidance {weight:g}, and denoises in {counted(defaults.num_denoise_steps, 'step')} down to t_min "
            f"{defaults.t_min:g} unless a call overrides them. See `itarflow info {self.target}`."
        )

    def _check(self) -> None:
        """Refuse, before anything is read, a target that can't be written or that would be lost."""
        if not self.to_official and Path(self.source).is_dir():
            raise ValueError(
                shards_advice(Path(self.source))
                or f"{self.source} is a folder; expected an official .pth file. {_advice(Path(self.source))}"
            )
        own = ("source", "target", "to_official", "overwrite")
        given = [one.name for one in fields(self) if one.name not in own and getattr(self, one.name) != one.default]
        if self.to_official and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} was given with --to-official, whose file has no place for it: leave "
                "it out."
            )
        self._check_numbers()
        holds = any(self.target.iterdir()) if self.target.is_dir() else self.target.exists()
        if self.target.is_dir() and self.to_official:
            raise ValueError(f"{self.target} is a folder; expected a file name ending in .pth.")
        others = foreign_entries(self.target) if self.target.is_dir() else []
        if others:
            raise ValueError(
                f"{self.target} is a folder with other things in it ({printable(listed(others, 3))}); expected a new "
                "one or a pipeline's."
            )
        if self.target.is_file() and not self.to_official:
            raise ValueError(f"{self.target} is a file; expected a folder for the pipeline.")
        if holds and not self.overwrite:
            raise ValueError(f"{self.target} exists; add --overwrite to replace it, or choose another name.")
        check_writable(self.target.parent)

    def _check_numbers(self) -> None:
        """Refuse numbers that nothing can be made with, whatever the file holds."""
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise ValueError(f"image_size has {len(self.image_size)} numbers; expected a side, or height and width.")
        check_number("input_scale", self.input_scale)
        if self.soft_clip is not None:
            check_number("soft_clip", self.soft_clip, 0)
        Guidance(weight=self.guidance_weight or 0.0)
        self._scheduler(LARGEST if self.t_max is None else self.t_max, 1)

    def _flow(self, public: PublicFile | None) -> TARFlow:
        """The flow in the source, by the preset and the options."""
        size = self.image_size
        asked = {
            "in_channels": self.in_channels,
            "image_size": None if size is None else size[0] if len(size) == 1 else (size[0], size[1]),
            "soft_clip": self.soft_clip,
            "softplus": self.softplus,
            "seq_order": self.seq_order,
            "context_tokens": self.context_tokens,
        }
        options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        flow = load_official(Path(self.source), input_scale=self.input_scale, **options)
        if public is not None and self.preset is not None:
            public.check(self.preset, flow, asked=options)
        elif likely := likely_presets(flow):
            _note(f"It has the shapes of a public file; if it is that, say --preset {' or '.join(likely)}.")
        return flow

    def _pipeline(self, flow: TARFlow, public: PublicFile | None = None) -> ITARFlowPipeline:
        config = flow.config
        iterative, starflow = config.noise_conditioned, bool(config.rotary_side)
        t_max = self._t_max(flow, public)
        guidance = Guidance(
            rule="scale" if iterative else "gaussian" if starflow else "log_scale",
            schedule="constant" if starflow else "linear",
            blocks=config.context_blocks if starflow else None,
        )
        if public is not None:
            guidance = public.guidance
        if self.guidance_weight is not None:
            guidance = replace(guidance, weight=self.guidance_weight)
        scheduler = self._scheduler(t_max, 10 if iterative else 1)
        return ITARFlowPipeline(
            flow,
            scheduler,
            guidance=asdict(guidance),
            class_names=list(public.class_names) if public and public.class_names else None,
            training=self._record(flow, public),
            **self._parts(flow, public),
        )

    def _scheduler(self, t_max: float, num_denoise_steps: int) -> DenoiseScheduler:
        """By the options; the number of steps is the family's default."""
        return DenoiseScheduler(
            t_max=t_max,
            t_min=self.t_min if self.t_min is not None else min(T_MIN, t_max / 2),
            num_denoise_steps=num_denoise_steps if self.num_denoise_steps is None else self.num_denoise_steps,
        )

    def _record_levels(self, pipeline: ITARFlowPipeline, public: PublicFile | None) -> None:
        """Make the flow refuse levels that it was not trained on, where they are known and not assumed."""
        only_level = not pipeline.flow.config.noise_conditioned and self.t_min is None
        t_max = self.t_max
        if t_max is None and public is not None and public.denoise_factor == 1:  # else t_max is no level of training
            t_max = public.noise_std
        if t_max is not None:
            low = t_max if only_level else pipeline.scheduler.config.t_min
            pipeline.flow.register_to_config(noise_range=(low, t_max))

    def _t_max(self, flow: TARFlow, public: PublicFile | None) -> float:
        if self.t_max is not None:
            return self.t_max
        if public is not None:
            return public.t_max
        if flow.config.rotary_side:
            t_max = STARFLOW_T_MAX
        elif flow.config.noise_conditioned:
            t_max = T_MAX.get(flow.config.image_size, 0.3)
        else:
            of_paper = {row.image_size: row.noise_std for row in TARFLOW.values() if row.noise_std}
            t_max = of_paper.get(flow.config.image_size, 0.3)
        _note(f"t_max is not in the file; {t_max} is assumed. Say --t-max if it is another.")
        return t_max

    def _parts(self, flow: TARFlow, public: PublicFile | None) -> dict[str, Any]:
        """VAE, text encoder and tokenizer, those that there are."""
        vae = self.vae or (public and public.vae) or "none"
        of_prompts = flow.config.context_tokens and not flow.config.num_classes
        text_encoder = self.text_encoder or (public and public.text_encoder) or "none"
        if text_encoder != "none":
            _check_width(text_encoder, flow.config.context_dim if of_prompts else 0)
        parts: dict[str, Any] = {} if vae == "none" else {"vae": load_vae(CodecConfig(vae=vae))}
        if text_encoder != "none":
            text = TextEncoder.from_pretrained(text_encoder, max_tokens=flow.config.context_tokens)
            parts |= {"text_encoder": text.encoder, "tokenizer": text.tokenizer}
        if flow.config.rotary_side and vae == "none":
            _note("It has no VAE, and makes codes alone; give the one that it was trained with by --vae, or later to "
                  "`itarflow sample` by --decoder.")  # fmt: skip
        if of_prompts and text_encoder == "none":
            _note("It has no text encoder, and needs prompt_embeds; give the one that it was trained with by "
                  "--text-encoder.")  # fmt: skip
        return parts

    def _record(self, flow: TARFlow, public: PublicFile | None) -> dict[str, Any]:
        """What the card and `itarflow info` tell of the conversion."""
        moved = flow.config.rotary_side and flow.patch_sizes[0] > 1
        changes = "Tensors were renamed" + (", and the values in a token put into another order" * moved)
        changes += f"; stored as {str(flow.dtype).removeprefix('torch.')}. Buffers without information were left out."
        record: dict[str, Any] = {"name": Path(self.source).stem, "converted": {"changes": changes}}
        if public is None:
            return record
        record["converted"]["source"] = public.source
        published = {
            "noise_std": public.noise_std,
            "denoise_factor": public.denoise_factor,
            "published_fid": public.fid,
        }
        known = {key: value for key, value in published.items() if value is not None}
        return {**record, "name": self.preset, **known, "license": asdict(public.license)}


def _note(text: str) -> None:
    Console().print(f"[yellow]{text}", soft_wrap=True)


def _advice(folder: Path) -> str:
    """What to give in the place of a folder."""
    if (folder / INDEX).is_file():
        return "To write one from the pipeline in it, add --to-official."
    files = [path.name for kind in ("pth", "pt", "safetensors") for path in sorted(folder.glob(f"*.{kind}"))]
    return f"Name a file in it: {printable(listed(files, 3))}." if files else "There is none in it."


def _check_width(text_encoder: str, width: int) -> None:
    """Refuse an encoder of another width, by its config.json: its weights may be gigabytes to download."""
    if not width:
        raise ValueError(
            f"text_encoder is {text_encoder!r}, but this flow takes no prompts; leave --text-encoder out."
        )
    folder = folder_of(text_encoder, (CONFIG, f"{ENCODER}/{CONFIG}"), expected="a T5 text encoder")
    path = next((path for path in (folder / ENCODER / CONFIG, folder / CONFIG) if path.is_file()), None)
    found = None if path is None else read_json(path, dict[str, Any]).get("d_model")
    if isinstance(found, int) and found != width:  # else it is no T5, as loading it will say
        raise ValueError(
            f"the text encoder {text_encoder!r} gives vectors of {found}, but the flow takes vectors of {width}; "
            "expected the encoder that the flow was trained with."
        )


def _stored(source: str) -> TARFlow:
    """The flow of a pipeline in the type that it is stored in, without its other parts."""
    folder = folder_of(source, ("*.json", "*.safetensors"), expected="a pipeline of itarflow")
    index = pipeline_index(folder)
    stored = {head.dtype for head in read_heads(weight_files(folder / "flow")).values()}
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    return stored_flow(folder, index, dtype=halves.get(stored.pop()) if len(stored) == 1 else None)
