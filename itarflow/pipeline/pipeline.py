"""The diffusers pipeline: noise -> flow's inverse -> denoising -> decoding -> images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from itarflow.codec import PixelCodec, Vae, codec_of, image_shape
from itarflow.denoisers.ode import DenoiseScheduler, Method, Spacing, lowest_level
from itarflow.denoisers.score import Denoiser, FlowDenoiser, check_level
from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance
from itarflow.inverse.solvers import Solver
from itarflow.pipeline.call import Call, check_denoiser, check_output, converted, generate, in_our_words, positive
from itarflow.pipeline.described import DescribedPipeline
from itarflow.pipeline.labels import Label, label_list, label_number, label_tensor
from itarflow.pipeline.memory import Fitted
from itarflow.pipeline.plan import InversePlan, place_of, planned
from itarflow.pipeline.prompts import Prompt, Prompts, encoded, refuse_labels, refuse_prompts, text_encoder_of
from itarflow.runtime.devices import in_batches, sampling_dtype
from itarflow.runtime.seeds import image_generators
from itarflow.text_encoder import TextEncoder, checked_prompts


class ITARFlowPipeline(DescribedPipeline):
    """Generates images from class labels, from prompts, or without any.

    Args:
        flow: generates at noise level t_max, and denoises unless a call names another denoiser.
        scheduler: the denoising defaults.
        guidance: the guidance defaults, as fields of `Guidance`; None = unguided.
        class_names: the name of each label; None = labels have no names.
        training: a record of how the flow was trained, for the model card and `itarflow info`.
        vae: the autoencoder whose codes the flow models; None = it models pixels.
        plans: the fastest inverse for a device and batch size each, `InversePlan.to_json`; written by `itarflow
            profile`.
        evaluations: scores of its samples as text, by what was evaluated; written by `itarflow evaluate`.
        text_encoder: a `T5EncoderModel` of transformers, for a flow that takes prompts; None = it is given vectors.
        tokenizer: of the text encoder.

    Raises:
        ImportError: there is a text encoder, but transformers is not installed.
        ValueError: names, guidance, plans, VAE or text encoder that do not fit the flow.

    Example:
        >>> flow = TARFlow(image_size=8, in_channels=1, channels=64, num_layers=(1, 1), num_classes=2)
        >>> pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.02), class_names=["cat", "dog"])
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(class_labels=["dog", 0], generator=torch.Generator().manual_seed(0)).images[0].size
        (8, 8)
    """

    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]
    model_cpu_offload_seq = "text_encoder->flow->vae"

    def __init__(
        self,
        flow: TARFlow,
        scheduler: DenoiseScheduler,
        guidance: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        training: dict[str, Any] | None = None,
        vae: Vae | None = None,
        plans: list[dict[str, Any]] | None = None,
        evaluations: dict[str, str] | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self._fits = Fitted()
        if class_names is not None and len(class_names) != flow.config.num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names for a flow with {flow.config.num_classes} classes."
            )
        Guidance.from_json(guidance)  # raises ValueError if it is invalid
        for plan in plans or []:
            InversePlan.from_json(plan).solvers_of(flow)
        if vae is not None:
            image_shape(vae, flow.image_shape)  # raises ValueError if it is not the flow's
        text_encoder_of(text_encoder, tokenizer, flow)  # raises ValueError if they do not fit
        self.register_modules(flow=flow, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            guidance=guidance, class_names=class_names, training=training, plans=plans, evaluations=evaluations
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] = None,
        num_images: int | None = None,
        *,
        prompt: Prompt = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt: Prompt = None,
        negative_prompt_embeds: Tensor | None = None,
        guidance_weight: float | None = None,
        guidance: Guidance | None = None,
        num_denoise_steps: int | None = None,
        method: Method | None = None,
        spacing: Spacing | None = None,
        t_max: float | None = None,
        t_min: float | None = None,
        clip: bool | None = None,
        denoiser: Denoiser | None = None,
        solver: Solver | Sequence[Solver] | None = None,
        inverse_dtype: torch.dtype | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        denoise_batch_size: int | None = None,
        denoise_dtype: torch.dtype | None = None,
        decode_batch_size: int | None = None,
        tiled_decode: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        **words: Any,
    ) -> ImagePipelineOutput:
        """Generate images. Arguments that are None take the checkpoint's defaults.

        Args:
            class_labels: one label or several, as numbers or names; None inside a list, or alone = unlabelled: an
                image of any class, without guidance. (`itarflow sample` makes one of each class if it is given none.)
            num_images: how many; None = one a label. With a single label it is repeated.
            prompt: one text or several, for a flow that takes prompts: "" is the empty one. Those of more tokens than
                the flow takes are cut, with a warning. A single one is repeated num_images times.
            prompt_embeds: their vectors (B, T, E) in the place of texts, from `encode_prompt`.
            negative_prompt: of the unguided branch, one or one a prompt; None = the empty one. Not used if unguided.
            negative_prompt_embeds: its vectors, (1, T, E) or (B, T, E).
            guidance_weight: w >= 0 in (1 + w) * conditional - w * unconditional; 0 = off. Without labels there is
                nothing to guide by: the checkpoint's weight is then ignored, and one given here is refused.
            guidance: rule, schedule and blocks; `guidance_weight` then overrides its weight.
            num_denoise_steps: score evaluations, >= 1; 1 = TARFlow's single step.
            method: "euler", "heun", "multistep", "predictor-corrector" or "sde", or "skip" for the noisy images.
            spacing: of the noise levels, "even" or "quadratic", see `noise_levels`.
            t_max: noise level at which the flow is sampled, inside its noise_range.
            t_min: smallest level at which the denoiser is evaluated. With a flow of one level and another denoiser,
                the smallest that the denoiser was trained on.
            clip: clamp the clean estimates to [-1, 1]; not for codes.
            denoiser: another denoiser than the flow itself, such as `FlowDenoiser(other_flow)`.
            solver: how the flow is inverted, see `TARFlow.inverse`; `sequential` is exact, one token after another.
                None = by the checkpoint's plan for such a device and so many images, else `sequential`.
            inverse_dtype: of the transformers in the inverse, such as torch.bfloat16: slightly other images, and
                faster unless the model is narrow. None = that of `sampling_dtype`, bfloat16 on most GPUs.
            generator: one for all images (image i then depends on its seed and on i alone, up to rounding; with a
                plan, up to its tolerance, because plans depend on the batch size), or one an image: `[g]` gives the
                first image of `g`, and an image does not depend on the others of its call.
            batch_size: images that are generated at a time, to bound memory; None = all. If it runs out, fewer.
            denoise_batch_size: images that the flow denoises at a time; None = as many as are generated, or, with a
                warning, as fit the memory.
            denoise_dtype: of the flow's layers while it denoises: torch.bfloat16 takes about half of the time and
                of the memory, unless the model is tiny, and changes images by about one grey level, see
                `FlowDenoiser`. None = as `inverse_dtype`. Not with a `denoiser`, which has its own.
            decode_batch_size: images that the VAE decodes at a time; None = as many as are generated.
            tiled_decode: decode large images in tiles, see `VaeCodec`.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "codes": what the flow
                models, (B, C, H, W) in float32, not decoded; in pixel space that is pixels in about [-1, 1].
            return_dict: False = a tuple with the images alone, as in diffusers.
            words: diffusers' names for the same, `num_inference_steps`, `guidance_scale` (s is the weight s - 1) and
                `num_images_per_prompt`, of a label or a prompt; see `call.in_our_words`.

        Returns:
            An object whose `images` are of `output_type`.

        Raises:
            ValueError: labels, prompts, counts, noise levels or settings out of range; raised before anything is
                computed.
            torch.OutOfMemoryError: not even one image, or one prompt, fits the memory.
        """
        own: dict[str, Any] = {
            "class_labels": class_labels,
            "num_images": num_images,
            "guidance_weight": guidance_weight,
            "num_denoise_steps": num_denoise_steps,
        }
        prompts = Prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        own |= in_our_words(words, own, prompted=self.takes_prompts)
        class_labels, guidance_weight = own["class_labels"], own["guidance_weight"]
        num_denoise_steps = own["num_denoise_steps"]
        check_output(output_type, self.picture_shape[0])
        codec = codec_of(self.vae, slice_size=positive("decode_batch_size", decode_batch_size), tiled=tiled_decode)
        labels, rows = None, list[int]()
        if self.takes_prompts:
            refuse_labels(class_labels, prompts)
            guidance = self._guidance(guidance, guidance_weight, conditional=True)
            prompts = prompts.checked(self.flow, self._text_encoder, guided=guidance.weight > 0)
            rows = prompts.rows(num_images, words.get("num_images_per_prompt"))
            count = len(rows)
        else:
            refuse_prompts(prompts.given(), self.flow)
            labels, count = self._labels(class_labels, num_images)
            guidance = self._guidance(guidance, guidance_weight, conditional=labels is not None)
        schedule = self.schedule(t_max, t_min, num_denoise_steps, method, spacing, clip, denoiser)
        slice_size = positive("denoise_batch_size", denoise_batch_size)
        build_denoiser = partial(self._denoiser, denoiser, slice_size, denoise_dtype)
        inverse_dtype = self.sampling_dtype(inverse_dtype)
        denoiser = build_denoiser()
        check_denoiser(denoiser, schedule, self.flow, labels)
        size = self._fits.batch(positive("batch_size", batch_size) or count)
        call = Call(
            labels=labels,
            generators=image_generators(generator, count),
            guidance=guidance,
            solver=self.planned_solver(min(size, count), inverse_dtype) if solver is None else solver,
            inverse_dtype=inverse_dtype,
            denoiser=denoiser,
            build_denoiser=build_denoiser,
            schedule=schedule,
            codec=PixelCodec() if output_type == "codes" else codec,
        )
        if self.takes_prompts:  # all else is checked by now
            device = self._execution_device
            contexts = prompts.contexts(self._text_encoder, guided=guidance.weight > 0, device=device)
            call = call.with_contexts(contexts, rows)
        self._fits.check(self.flow, call, torch.device(self._execution_device))
        images = converted(self._make(call, size), output_type)
        self.maybe_free_model_hooks()
        if hasattr(self.flow, "_hf_hook"):
            self._fits.forget_weights()
        # The type is that of a call as most are.
        return ImagePipelineOutput(images=images) if return_dict else cast(ImagePipelineOutput, (images,))

    def _make(self, call: Call, size: int) -> Tensor:
        """The images of a call, of at most `size` at a time, or fewer if memory runs out."""
        count = len(call.generators)
        with self.progress_bar(total=count * (self.flow.num_solved_tokens + call.evaluations)) as bar:

            def make(chunk: slice) -> Tensor:
                part, done = self._on_device(call.part(chunk)), 0
                states = [generator.get_state() for generator in part.generators]

                def advance(steps: int) -> None:
                    nonlocal done
                    done += steps
                    bar.update(steps * len(part.generators))

                try:
                    return generate(self.flow, part, advance)
                except (MemoryError, RuntimeError):  # if memory ran out, the same are made again, fewer at a time
                    for generator, state in zip(part.generators, states, strict=True):
                        generator.set_state(state)
                    advance(-done)
                    raise

            images, fitted = in_batches(make, count, size, "making", "batch_size")
        self._fits.note(min(size, count), fitted)
        return torch.cat(images)

    def _on_device(self, call: Call) -> Call:
        """The call with the flow where it computes, after `enable_model_cpu_offload`; the VAE moves by itself."""
        hook = getattr(self.flow, "_hf_hook", None)
        if hook is None:
            return call
        hook.pre_forward(self.flow)
        return replace(call, denoiser=call.build_denoiser())  # a view of the weights where they are now

    def _denoiser(self, denoiser: Denoiser | None, slice_size: int | None, dtype: torch.dtype | None) -> Denoiser:
        if denoiser is None:
            return self.flow_denoiser(slice_size, dtype)
        if dtype is not None:
            raise ValueError(
                f"denoise_dtype is {dtype}, but a denoiser was given, which has a type of its own; leave it out, or "
                "build the denoiser with it: FlowDenoiser(flow, dtype=...)."
            )
        return denoiser

    def flow_denoiser(self, slice_size: int | None = None, dtype: torch.dtype | None = None) -> FlowDenoiser:
        """The flow as the denoiser of its own samples, in `sampling_dtype`; the same object while its weights stay."""
        return self._fits.denoiser(self.flow, slice_size, self.sampling_dtype(dtype))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of diffusers."""
        self._fits.forget_weights()
        return super().to(*args, **kwargs)

    @property
    def _text_encoder(self) -> TextEncoder | None:
        return text_encoder_of(self.text_encoder, self.tokenizer, self.flow)

    def encode_prompt(self, prompt: str | Sequence[str]) -> Tensor:
        """The vectors (B, T, E) of prompts, float32, as `prompt_embeds` and `negative_prompt_embeds` take them.

        Raises:
            ValueError: the pipeline has no text encoder, or there are no prompts.
            torch.OutOfMemoryError: not even one prompt fits the memory.
        """
        if (encoder := self._text_encoder) is None:
            raise ValueError("this pipeline has no text encoder, so it can't encode prompts; load it with one.")
        return encoded(encoder, [prompt] if isinstance(prompt, str) else checked_prompts(prompt))

    def sampling_dtype(self, asked: torch.dtype | None = None) -> torch.dtype | None:
        """The precision of the flow's layers in sampling: the one asked for, or this device's; None = the weights'."""
        return asked or sampling_dtype(torch.device(self._execution_device), self.flow.dtype)

    def planned_solver(self, batch_size: int, dtype: torch.dtype | None = None) -> Solver | list[Solver]:
        """The default solver for batches of that size on the pipeline's device; with that `inverse_dtype`."""
        device, dtype = torch.device(self._execution_device), self.sampling_dtype(dtype) or self.flow.dtype
        return planned(self.inverse_plans, self.flow, partial(place_of, device, dtype), batch_size)

    def _labels(self, class_labels: Label | Sequence[Label], num_images: int | None) -> tuple[Tensor | None, int]:
        """Labels (B,) on the flow's device, or None if all are unlabelled, and B."""
        given = [self.label_id(label) for label in label_list(class_labels, num_images)]
        return label_tensor(given, self._execution_device), len(given)

    def label_id(self, label: Label) -> int:
        """The number of a label given by number or name; None = no label.

        Raises:
            ValueError: there is no such label.
        """
        return label_number(label, self.flow.config.num_classes, self.config.class_names or [])

    def _guidance(self, guidance: Guidance | None, weight: float | None, conditional: bool) -> Guidance:
        chosen = guidance or self.default_guidance
        if weight is not None:
            chosen = replace(chosen, weight=weight)
        asked = guidance is not None or weight is not None
        if asked and chosen.weight > 0 and not conditional and chosen.temperature == 1:
            raise ValueError(
                f"guidance_weight is {chosen.weight}, but there are no labels to guide by; give class_labels, "
                "or a guidance with temperature != 1, or guidance_weight=0."
            )
        return chosen

    def schedule(
        self,
        t_max: float | None = None,
        t_min: float | None = None,
        num_denoise_steps: int | None = None,
        method: Method | None = None,
        spacing: Spacing | None = None,
        clip: bool | None = None,
        denoiser: Denoiser | None = None,
    ) -> DenoiseScheduler:
        """The stored scheduler with a call's arguments put in, which see.

        Raises:
            ValueError: values out of range, or outside the flow's noise range.
        """
        stored = self.scheduler.config
        t_max = stored.t_max if t_max is None else t_max
        low = stored.t_min if t_min is None else t_min
        if denoiser is not None and t_min is None and low >= t_max:  # the flow has one level, but the denoiser more
            low = lowest_level(denoiser, t_max)
        check_level(self.flow, "t_max", t_max)
        scheduler = DenoiseScheduler(
            t_max=t_max,
            t_min=low,
            num_denoise_steps=stored.num_denoise_steps if num_denoise_steps is None else num_denoise_steps,
            method=stored.method if method is None else method,
            clip=stored.clip if clip is None else clip,
            spacing=stored.spacing if spacing is None else spacing,
        )
        if scheduler.config.clip and self.vae is not None:
            raise ValueError("clip is on, but codes are not limited to [-1, 1]; leave it out.")
        return scheduler
