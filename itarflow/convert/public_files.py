"""The public checkpoints of this family: where they are, and what their files don't say, as their owners publish it.

What the owners don't say is None, and a comment says so. Sources: the README and sample.ipynb of apple/ml-tarflow
(commit 313120e), the README and configs of apple/ml-starflow (e565a46) and its model card on the Hub, the README of
encoreus/GS-Jacobi_for_TarFlow (f28319b; arXiv 2505.12849).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from itarflow.flow.tarflow import TARFlow
from itarflow.inverse.guidance import Guidance

Preset = Literal["afhq256", "gsj_afhq256", "gsj_imagenet64_uncond", "gsj_imagenet64", "gsj_imagenet128", "starflow_3b"]
"""Names of the public files."""


@dataclass(frozen=True, kw_only=True)
class License:
    """Of weights, and what has to be said where they are passed on."""

    name: str | None
    """An identifier of the Hub; None = the owners name none for the weights."""
    notice: str
    """For the card of a converted file."""
    kept: bool = False
    """Whether a converted file stays under it, so that another name on its card is refused."""
    text: str | None = None
    """Where the agreement is, a copy of which goes with the weights."""


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A checkpoint that anybody can download."""

    file: str
    """Its name."""
    source: str
    """The address of the file, or its repository on the Hub."""
    architecture: Mapping[str, Any]
    """Arguments of `TARFlow` that its tensors must have. What tensors don't say is the default of `load_official`."""
    noise_std: float
    """Standard deviation of the noise that it was trained with."""
    guidance: Guidance
    """As in the owners' own sampling."""
    denoise_factor: float = 1.0
    """Factor on the one Tweedie step sigma^2 score (self_denoising_lr): 1 = by the book."""
    fid: float | None = None
    """Of 50,000 samples, as the owners report it for their sequential sampling; None = they report none."""
    class_names: tuple[str, ...] | None = None
    """Of the labels, in order; None = no labels, or ImageNet's thousand in the order of their WordNet ids."""
    vae: str | None = None
    """Of the codes that it models; None = it models pixels."""
    text_encoder: str | None = None
    """Of its prompts; None = it has labels, or nothing."""
    license: License

    @property
    def t_max(self) -> float:
        """The noise level with which one Tweedie step is denoise_factor times that of noise_std.

            x0 = x + denoise_factor noise_std^2 score = x + t_max^2 score

        The flow has no noise level for an input, so that nothing else depends on it.
        """
        return self.noise_std * math.sqrt(self.denoise_factor)

    def check(self, name: str, flow: TARFlow, asked: Collection[str] = ()) -> None:
        """Refuse a flow that is not this file's.

        Args:
            name: of this preset.
            flow: as it was read.
            asked: what was asked for besides, and may differ: of a STARFlow image_size.

        Raises:
            ValueError: naming what differs.
        """
        free = {"image_size"} & set(asked) if flow.config.rotary_side else set()
        for key, (found, expected) in self._differences(flow).items():
            if key not in free:
                raise ValueError(
                    f"the file has {key} {found}, but the preset {name} is for {self.file} of {self.source}, which "
                    f"has {expected}. Choose the file's own preset, or leave --preset out."
                )

    def _differences(self, flow: TARFlow) -> dict[str, tuple[Any, Any]]:
        """(found, expected) of each argument that a flow has not as this file."""
        pairs = {key: (getattr(flow.config, key), expected) for key, expected in self.architecture.items()}
        return {
            key: (found, expected) for key, (found, expected) in pairs.items() if _plain(found) != _plain(expected)
        }


def likely_presets(flow: TARFlow) -> list[Preset]:
    """The presets whose files have the architecture of a flow."""
    return [name for name, public in PUBLIC_FILES.items() if not public._differences(flow)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


_APPLE_CODE = License(
    name=None,
    notice="Apple names no licence for these weights; the code that they were published with, apple/ml-tarflow, has "
    "Apple's sample code licence. Ask Apple before you pass them on.",
)
_APPLE_RESEARCH = License(
    name="apple-amlr",
    notice="Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License "
    "Agreement. These weights are a Model Derivative of it, for non-commercial research alone.",
    kept=True,
    text="https://github.com/apple/ml-starflow/blob/main/LICENSE_MODEL",
)
_GS_JACOBI = License(
    name="apache-2.0",
    notice="The authors of GS-Jacobi_for_TarFlow (B. Liu and Z. Qin, arXiv 2505.12849) trained these weights; their "
    "repository is under the Apache License 2.0.",
)
_AFHQ = ("cat", "dog", "wild")  # the folders of the data set, sorted
_HUB = "https://huggingface.co/encoreus/Transformer_Autoregressive_Flow/resolve/main/"


def _tarflow(image_size: int, patch_size: int, channels: int, num_classes: int) -> dict[str, Any]:
    """P-Ch-T-K of TARFlow's table 7, with T = K = 8 in all public files."""
    return {
        "image_size": image_size,
        "in_channels": 3,
        "patch_size": patch_size,
        "channels": channels,
        "num_layers": (8,) * 8,
        "num_classes": num_classes,
        "noise_conditioned": False,
    }


PUBLIC_FILES: dict[Preset, PublicFile] = {
    "afhq256": PublicFile(
        file="afhq_model_8_768_8_8_0.07.pth",
        source="https://ml-site.cdn-apple.com/models/tarflow/afhq256/afhq_model_8_768_8_8_0.07.pth",
        architecture=_tarflow(256, 8, 768, 3),
        noise_std=0.07,
        # sample.ipynb shows weights 0 and 1, the same for all tokens; no FID of this file is published.
        guidance=Guidance(weight=1.0, rule="log_scale", schedule="constant"),
        class_names=_AFHQ,
        license=_APPLE_CODE,
    ),
    "gsj_afhq256": PublicFile(
        file="afhq_model_8_768_8_8_0.07.pth",
        source=f"{_HUB}afhq_model_8_768_8_8_0.07.pth",
        architecture=_tarflow(256, 8, 768, 3),
        noise_std=0.07,
        guidance=Guidance(weight=3.4, rule="log_scale", schedule="linear"),
        denoise_factor=1.4,
        fid=13.60,
        class_names=_AFHQ,
        license=_GS_JACOBI,
    ),
    "gsj_imagenet64_uncond": PublicFile(
        file="imagenet64_model_2_768_8_8_0.05.pth",
        source=f"{_HUB}imagenet64_model_2_768_8_8_0.05.pth",
        architecture=_tarflow(64, 2, 768, 0),
        noise_std=0.05,
        guidance=Guidance(weight=0.2, rule="log_scale", schedule="linear", temperature=0.3),
        denoise_factor=0.9,
        fid=14.67,
        license=_GS_JACOBI,
    ),
    "gsj_imagenet64": PublicFile(
        file="imagenet_model_4_1024_8_8_0.05.pth",
        source=f"{_HUB}imagenet_model_4_1024_8_8_0.05.pth",
        architecture=_tarflow(64, 4, 1024, 1000),
        noise_std=0.05,
        guidance=Guidance(weight=2.0, rule="log_scale", schedule="linear"),
        fid=4.42,
        license=_GS_JACOBI,
    ),
    "gsj_imagenet128": PublicFile(
        file="imagenet_model_4_1024_8_8_0.15.pth",
        source=f"{_HUB}imagenet_model_4_1024_8_8_0.15.pth",
        architecture=_tarflow(128, 4, 1024, 1000),
        noise_std=0.15,
        guidance=Guidance(weight=1.5, rule="log_scale", schedule="linear"),
        denoise_factor=0.97,
        fid=5.06,
        license=_GS_JACOBI,
    ),
    "starflow_3b": PublicFile(
        file="starflow_3B_t2i_256x256.pth",
        source="https://huggingface.co/apple/starflow/resolve/main/starflow_3B_t2i_256x256.pth",
        architecture={
            "image_size": 32,
            "in_channels": 4,
            "patch_size": 1,
            "channels": 3072,
            "num_layers": (2, 2, 2, 2, 2, 24),
            "num_classes": 0,
            "context_dim": 2048,
            "context_tokens": 128,
            "context_blocks": 1,
            "start_token": True,
            "final_norm": True,
        },
        noise_std=0.3,
        # scripts/test_sample_image.sh. Its FID is published for MS-COCO captions, not with a command for this file.
        guidance=Guidance(weight=3.6, rule="gaussian", schedule="constant", blocks=1),
        vae="stabilityai/sd-vae-ft-ema",
        text_encoder="google/flan-t5-xl",
        license=_APPLE_RESEARCH,
    ),
}
"""By the name that `itarflow convert --preset` takes. All blocks are guided, but for STARFlow's, whose first is."""
