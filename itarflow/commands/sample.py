"""`itarflow sample`: images of a checkpoint, in a grid or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from itarflow.codec import CodecConfig, Vae, check_same_codes, image_shape, load_vae
from itarflow.commands.class_labels import check_seed
from itarflow.commands.console import say
from itarflow.commands.guidance import OneGuidance
from itarflow.commands.prompts import (
    Encoded,
    Prompts,
    Subjects,
    encode_once,
    listed_prompts,
    prompts_in,
    put_encoder,
    subjects_of,
    take_encoder,
)
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.inverse.solvers import sequential
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.devices import Precision, asked_dtype, usable_device
from itarflow.runtime.files import check_writable
from itarflow.runtime.pictures import (
    Grid,
    balanced_columns,
    check_picture,
    save_picture,
)
from itarflow.runtime.seeds import image_generators
from itarflow.runtime.text import display_name, listed, printable, short_names


@dataclass(frozen=True)
class Sample(OneGuidance):
    """Make images with a checkpoint.

    Example: itarflow sample runs/digits/pipeline --class-labels 3 1 4 --output digits.png
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/digits/pipeline, or a Hugging Face Hub id (NAME/MODEL). Comes first."""
    output: Path = Path("samples.png")
    """An image file for a grid of all images, or a new folder (any name without suffix) for one file an image. A PNG
    carries checkpoint, seed and labels or prompts as texts."""
    class_labels: tuple[str, ...] | None = None
    """Labels, by number as in Python, or by name; -1 = no label. None = every class in turn, or no labels if the model
    has none. A name that begins with a dash is given as --class-labels=-name."""
    prompt: Prompts = ()
    """Texts to make images from, of a checkpoint that takes prompts, each in quotes, such as 'a corgi on the beach';
    '' is none in particular. Those that begin with a dash are given as --prompt='-one'."""
    prompts: Path | None = None
    """A file with one prompt a line; a blank line is the empty prompt."""
    text_encoder: str | None = None
    """The text encoder that the checkpoint was trained with, if it holds none: a folder or a Hub id of a T5, such as
    google/flan-t5-xl."""
    num_images: int | None = None
    """How many images; labels and prompts are repeated in turn. None = one each, or 16 if there are no labels."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label or prompt, not on how many are made. How many are made
    at a time changes it by rounding; by a little more if the checkpoint has a plan and --exact is not given."""
    captions: bool = True
    """Write the names of the classes, or the prompts, above the images of a grid."""
    num_denoise_steps: int | None = None
    """Score evaluations, 1 or more. None = the checkpoint's."""
    method: Method | None = None
    """Solver of the denoising ODE; skip shows the noisy images. None = the checkpoint's."""
    spacing: Spacing | None = None
    """Of the noise levels: even, or quadratic, which predictor-corrector goes best with. None = the checkpoint's."""
    denoiser: str | None = None
    """The denoiser, instead of the checkpoint itself: a folder or Hub id of another flow's pipeline, or of
    a diffusers pipeline with a DiT or UNet (facebook/DiT-XL-2-256, once converted to safetensors), for images or codes
    of the same size. One trained on a single noise level, a TARFlow, needs --num-denoise-steps 1; the others know a
    range of levels, and do best with 10 steps or so."""
    decoder: str | None = None
    """Of a checkpoint that models codes: the VAE that decodes them, if the checkpoint holds none, or another one with
    the same encoder, such as one whose decoder was fine-tuned on noisy codes, which goes with --method skip. A folder
    or Hub id. None = the checkpoint's."""
    exact: bool = False
    """Invert the flow token by token, even if the checkpoint has a plan of `itarflow profile`, and in float32."""
    inverse_dtype: Precision | None = None
    """Precision of the transformers in the inverse. bf16 makes slightly other images, and is faster unless
    the model is narrow. None = bf16 on GPUs that have it, unless --exact is given; else the checkpoint's, float32."""
    batch_size: int = 64
    """Images that are made at a time; lower it if memory runs out."""
    denoise_batch_size: int | None = None
    """Images that are denoised at a time. None = as many as are made, or as fit the memory."""
    denoise_dtype: Precision | None = None
    """Precision of a flow's layers in denoising. bf16 takes about half of the time on CPUs that support it, unless the
    model is tiny, and changes images by about one grey level. None = bf16 on GPUs that have it, else float32."""
    decode_batch_size: int = 8
    """Images that a VAE decodes at a time. Not used by checkpoints that model pixels."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; expected a number >= 1.")
        check_seed(self.seed)
        _check_output(self.output)
        device = usable_device(self.device)
        prompts = self._prompts()
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        subjects = subjects_of(pipe, self.class_labels, prompts, self.num_images)
        if self.decoder is None and pipe.picture_shape[0] not in (1, 3):
            raise ValueError(
                f"this checkpoint has no VAE: give --decoder, or convert it again with --vae. Without one it makes "
                f"codes of {pipe.picture_shape[0]} channels, which are no picture."
            )
        if self.text_encoder is not None:
            put_encoder(pipe, self.text_encoder)
        if self.decoder is not None:
            pipe.register_modules(vae=_matching_vae(pipe, self.decoder))
        plan, prompted = self._plan(pipe, subjects), None
        if subjects.prompts is not None:  # before the flow needs the memory
            prompted = encode_once(take_encoder(pipe), subjects.prompts, device)
        pipe.to(device)
        pipe.set_progress_bar_config(desc="sampling", unit=" image steps")  # tokens and denoising of each image
        dtype = asked_dtype(self.denoise_dtype)
        denoiser = None
        if self.denoiser is not None:
            denoiser = load_denoiser(
                self.denoiser, vae=pipe.vae, slice_size=self.denoise_batch_size, dtype=dtype, device=device
            )
        name = display_name(self.checkpoint)  # of a run it is "pipeline", as of any other
        name = short_names([self.checkpoint])[0] if name in ("pipeline", "vae") else name
        facts = {"checkpoint": name, "seed": self.seed}
        images = self._images(pipe, subjects, prompted, denoiser, dtype)
        if plan is None:
            self.output.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images):
                told = {**facts, "number": index, **subjects.facts_of(index)}
                save_picture(image, self.output / subjects.file(index), told)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            save_picture(plan.drawn(list(images)), self.output, {**facts, **subjects.facts()})
        say(f"{len(subjects)} {'image' if len(subjects) == 1 else 'images'} in {self.output}")

    def _prompts(self) -> Sequence[str] | None:
        """The prompts that were given; None = none were."""
        if self.prompts is None:
            return listed_prompts(self.prompt) or None
        if self.prompt:
            raise ValueError("--prompt and --prompts were given; expected one of them.")
        return prompts_in(self.prompts)

    def _plan(self, pipe: ITARFlowPipeline, subjects: Subjects) -> Grid | None:
        """How the grid is laid out, checked; None = there is none.

        Raises:
            ValueError: the format can't hold it.
        """
        if not self.output.suffix:
            return None
        names, count = subjects.names, len(subjects)
        kinds = len(set(names))
        columns = kinds if 2 <= kinds <= 12 else balanced_columns(count)
        grid = Grid(columns, names if self.captions and count > 1 and any(names) else None)
        channels, height, width = pipe.picture_shape
        check_picture(self.output, grid.size(width, height, count), "L" if channels == 1 else "RGB")
        return grid

    def _images(
        self,
        pipe: ITARFlowPipeline,
        subjects: Subjects,
        prompted: Encoded | None,
        denoiser: Denoiser | None,
        dtype: torch.dtype | None,
    ) -> Iterator[Image.Image]:
        """The images in order, batch by batch, so that what is done can be saved before the next begins."""
        generators = image_generators(torch.Generator().manual_seed(self.seed), len(subjects))
        guidance = self.guidance_of(pipe.default_guidance)
        for start in range(0, len(subjects), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield from pipe(
                **(prompted.of(part) if prompted is not None else {"class_labels": subjects.labels[part]}),
                guidance=guidance,
                num_denoise_steps=self.num_denoise_steps,
                method=self.method,
                spacing=self.spacing,
                denoiser=denoiser,
                solver=sequential if self.exact else None,
                inverse_dtype=asked_dtype(self.inverse_dtype, exact=self.exact),
                generator=generators[part],
                denoise_batch_size=self.denoise_batch_size,
                denoise_dtype=dtype if denoiser is None else None,
                decode_batch_size=self.decode_batch_size,
            ).images


def _matching_vae(pipe: ITARFlowPipeline, name: str) -> Vae:
    """A VAE by name that decodes the codes of the pipeline."""
    vae = load_vae(CodecConfig(vae=name))
    if pipe.vae is not None:
        check_same_codes(name, vae, pipe.vae)
        return vae
    try:
        image_shape(vae, pipe.flow.image_shape)
    except ValueError as error:
        pixels = pipe.picture_shape[0] in (1, 3)
        advice = "A checkpoint of pixels needs none; leave it out." if pixels else "Name that of its training."
        raise ValueError(f"--decoder {name} does not fit: {error} {advice}") from error
    return vae


def _check_output(output: Path) -> None:
    """Refuse an output that can't be written, before hours of sampling."""
    if output.suffix:
        check_picture(output, (64, 64), "RGB")
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; give a file name in it, or a name without a suffix.")
    elif output.is_dir() and (there := sorted(path.name for path in output.iterdir() if path.name[0] != ".")):
        raise ValueError(
            f"--output {output} holds other files: {printable(listed(there))}; new images among them could not be "
            "told from old ones. Name another folder, or empty this one."
        )
    check_writable(output.parent if output.suffix else output)
