"""`itarflow sample`: images of a checkpoint, in a grid or one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image

from itarflow.codec import CodecConfig, Vae, check_same_codes, load_vae
from itarflow.commands.console import chosen_labels, say
from itarflow.denoisers.load import load_denoiser
from itarflow.denoisers.ode import Method, Spacing
from itarflow.denoisers.score import Denoiser
from itarflow.inverse.solvers import sequential
from itarflow.pipeline.pipeline import ITARFlowPipeline
from itarflow.runtime.devices import usable_device
from itarflow.runtime.files import check_writable
from itarflow.runtime.pictures import image_grid
from itarflow.runtime.seeds import image_generators


@dataclass(frozen=True)
class Sample:
    """Make images with a checkpoint.

    Example: itarflow sample runs/digits/pipeline --class-labels 3 1 4 --output digits.png
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """A folder with a pipeline, such as runs/digits/pipeline, or a Hugging Face Hub id (NAME/MODEL). Comes first."""
    output: Path = Path("samples.png")
    """An image file for a grid of all images, or a folder (any name without suffix) for one file an image."""
    class_labels: tuple[str, ...] | None = None
    """Labels, by name or number. None = every class in turn, or no labels if the model has none."""
    num_images: int | None = None
    """How many images; labels are repeated in turn. None = one a label, or 16 if there are no labels."""
    seed: int = 0
    """Image number i depends on the seed, on i and on its label, not on how many are made. How many are made at a time
    changes it by rounding; by a little more if the checkpoint has a plan and --exact is not given."""
    guidance_weight: float | None = None
    """w in (1 + w) * conditional - w * unconditional; 0 = off. None = the checkpoint's."""
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
    """Of a checkpoint that models codes: another VAE with the same encoder, such as one whose decoder was fine-tuned
    on noisy codes, which goes with --method skip. A folder or Hub id. None = the checkpoint's."""
    exact: bool = False
    """Invert the flow token by token, even if the checkpoint has a plan of `itarflow profile`."""
    inverse_dtype: Literal["float32", "bf16"] = "float32"
    """Precision of the transformers in the inverse. bf16 makes slightly other images, and is faster unless
    the model is narrow."""
    batch_size: int = 64
    """Images that are made at a time; lower it if memory runs out."""
    denoise_batch_size: int | None = None
    """Images that are denoised at a time. None = as many as are made, or as fit the memory."""
    denoise_dtype: Literal["float32", "bf16"] = "float32"
    """Precision of a flow's layers in denoising. bf16 takes about half of the time on CPUs that support it, unless the
    model is tiny, and changes images by about one grey level."""
    decode_batch_size: int = 8
    """Images that a VAE decodes at a time. Not used by checkpoints that model pixels."""
    device: str | None = None
    """Such as cuda, cuda:1, mps or cpu. None = a GPU if there is one."""

    def run(self) -> None:
        """Carry the command out."""
        _check_output(self.output)
        device = usable_device(self.device)
        pipe = ITARFlowPipeline.from_pretrained(self.checkpoint)
        if self.decoder is not None:
            pipe.register_modules(vae=_matching_vae(pipe, self.decoder))
        pipe.to(device)
        labels = chosen_labels(pipe, self.class_labels, self.num_images)
        dtype = torch.bfloat16 if self.denoise_dtype == "bf16" else None
        denoiser = None
        if self.denoiser is not None:
            denoiser = load_denoiser(
                self.denoiser, vae=pipe.vae, slice_size=self.denoise_batch_size, dtype=dtype, device=device
            )
        if self.output.suffix:
            columns = _columns(len(set(labels)), len(labels))
            image_grid(list(self._images(pipe, labels, denoiser, dtype)), columns).save(self.output)
        else:
            self.output.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(self._images(pipe, labels, denoiser, dtype)):
                image.save(self.output / f"{index:06d}.png")
        say(f"{len(labels)} {'image' if len(labels) == 1 else 'images'} in {self.output}")

    def _images(
        self,
        pipe: ITARFlowPipeline,
        labels: list[int | None],
        denoiser: Denoiser | None,
        dtype: torch.dtype | None,
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
                spacing=self.spacing,
                denoiser=denoiser,
                solver=sequential if self.exact else None,
                inverse_dtype=torch.bfloat16 if self.inverse_dtype == "bf16" else None,
                generator=generators[part],
                denoise_batch_size=self.denoise_batch_size,
                denoise_dtype=dtype if denoiser is None else None,
                decode_batch_size=self.decode_batch_size,
            ).images


def _matching_vae(pipe: ITARFlowPipeline, name: str) -> Vae:
    """A VAE by name that decodes the codes of the pipeline."""
    if pipe.vae is None:
        raise ValueError(f"--decoder {name} is for codes, but this checkpoint models pixels; leave it out.")
    vae = load_vae(CodecConfig(vae=name))
    check_same_codes(name, vae, pipe.vae)
    return vae


def _check_output(output: Path) -> None:
    """Refuse an image format that can't be written, before hours of sampling."""
    if output.suffix and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"--output {output} has an unknown image format; use .png, or a folder name without a suffix."
        )
    if output.suffix and output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file name in it, or a name without a suffix.")
    folder = output.parent if output.suffix else output
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _columns(labels: int, images: int) -> int:
    """Columns of a grid: one a label if they are few, else as many as rows."""
    return labels if 2 <= labels <= 12 else math.ceil(math.sqrt(images))
