"""What a pipeline says of itself: its defaults, sizes and parts, in words and on its model card."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from itarflow.codec import image_shape, own_scaling
from itarflow.inverse.guidance import Guidance
from itarflow.pipeline.model_card import model_card
from itarflow.pipeline.plan import InversePlan
from itarflow.pipeline.prompts import takes_prompts
from itarflow.pipeline.storage import StoredPipeline
from itarflow.runtime.text import counted, listed, printable

_SIZES = ("image_size", "in_channels", "patch_size", "channels", "num_layers", "num_classes")
_OTHERS = ("noise_conditioned", "noise_range", "volume_preserving", "shared_layers", "learned_first_token",
           "rotary_side", "start_token", "final_norm", "soft_clip", "softplus_scale", "first_block_reversed",
           "context_dim", "context_tokens", "context_blocks")  # fmt: skip
"""Settings of a flow that a card tells of where they are on."""


class DescribedPipeline(StoredPipeline):
    """A stored pipeline that knows what it holds; see `ITARFlowPipeline`."""

    def sampling_dtype(self, asked: torch.dtype | None = None) -> torch.dtype | None:
        """See `ITARFlowPipeline`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        flow, scheduler, flow_dtype = self.flow.config, self.scheduler.config, self.flow.dtype
        channels, height, width = self.picture_shape
        names = f" ({printable(listed(self.class_names))})" if self.class_names else ""
        steps = counted(scheduler.num_denoise_steps, "step")
        lines = {
            "images": f"{channels} x {height} x {width}" + ("" if self.vae is None else ", decoded by a VAE"),
            **(self.prompt_facts() or {"classes": f"{flow.num_classes}{names}"}),
            "flow": f"{sum(p.numel() for p in self.flow.parameters()):,} parameters, {flow_dtype}, "
            f"on {self.flow.device}",
            "sampling": f"t_max {scheduler.t_max:g}, {steps} of {scheduler.method}, "
            f"guidance {self.default_guidance.weight:g}, in {self.sampling_dtype() or flow_dtype}",
        }
        return "\n".join([type(self).__name__, *(f"  {name}: {text}" for name, text in lines.items())])

    @property
    def class_names(self) -> list[str]:
        """The names of the labels in order; [] if they have none."""
        return list(self.config.class_names or [])

    @property
    def inverse_plans(self) -> list[InversePlan]:
        """The plans stored with the checkpoint."""
        return [InversePlan.from_json(plan) for plan in self.config.plans or []]

    @property
    def default_guidance(self) -> Guidance:
        """The guidance stored with the checkpoint."""
        return Guidance.from_json(self.config.guidance)

    @property
    def takes_prompts(self) -> bool:
        """Whether images are made from prompts, and not from class labels."""
        return takes_prompts(self.flow)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the output images, which are decoded codes if there is a VAE."""
        shape: tuple[int, int, int] = self.flow.image_shape
        return shape if self.vae is None else image_shape(self.vae, shape)

    def model_card(
        self,
        repo_id: str | None = None,
        license: str | None = None,  # noqa: A002
        picture: bool = False,
    ) -> Any:
        """The card of this pipeline, a `huggingface_hub.ModelCard`.

        Args:
            repo_id: where it is shared; None = it is not, or not yet.
            license: of the weights, an identifier of the Hub; None = the card names none.
            picture: whether there is a picture beside the card.
        """
        parameters, flow = sum(parameter.numel() for parameter in self.flow.parameters()), self.flow.config
        told = [name for name in (*_SIZES, *_OTHERS) if name in _SIZES or flow.get(name)]
        return model_card(
            architecture={"parameters": f"{parameters:,}", **{name: flow[name] for name in told}, **self.vae_facts(),
                          **self.prompt_facts(), "noise_conditioned": flow.noise_conditioned},
            sampling={
                **self.scheduler.config,
                **{f"guidance {k}": v for k, v in asdict(self.default_guidance).items()},
                **{key: value for plan in self.inverse_plans for key, value in plan.described().items()},
            },
            training=self.config.training,
            class_names=self.config.class_names,
            evaluations=self.config.evaluations or {},
            repo_id=repo_id,
            license=license,
            picture=picture,
            missing=self.missing_parts,
        )  # fmt: skip

    @property
    def missing_parts(self) -> list[str]:
        """The names of components without which no image can be made from a label or prompt."""
        missing = {
            "vae": self.picture_shape[0] not in (1, 3),
            "text_encoder": self.takes_prompts and self.text_encoder is None,
        }
        return [name for name, is_missing in missing.items() if is_missing]

    def vae_facts(self) -> dict[str, Any]:
        """The VAE's rows of the model card; {} in pixel space."""
        if self.vae is None:
            return {}
        (_, height, width), (factor, shift) = self.picture_shape, own_scaling(self.vae)
        return {
            "codes of": f"{type(self.vae).__name__}, for images of {height} x {width} pixels",
            "scaling factor of the codes": factor,
            "shift factor of the codes": shift,
        }

    def prompt_facts(self) -> dict[str, Any]:
        """The rows of the model card on prompts; {} if the flow takes none."""
        if not self.takes_prompts:
            return {}
        size = f"{self.flow.config.context_tokens} vectors of {self.flow.config.context_dim}"
        if self.text_encoder is None:
            return {"prompts": f"as prompt_embeds, {size}; there is no text encoder in it"}
        kind, layers = type(self.text_encoder).__name__, self.text_encoder.config.num_layers
        return {"prompts": f"read by a {kind} of {layers} layers, as {size}"}
