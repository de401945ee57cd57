"""Fixtures: tiny flows, their inputs, and what every test wants of its surroundings."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
if os.environ.get("ITARFLOW_TEST_CUDA", "") in ("", "0"):
    # Results are compared to the last bit, and several processes share the device: both are promises of CPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from command_line import refused, run, save  # noqa: F401
from tiny_flows import TINY, VARIANTS, randomise
from torch import Tensor

from itarflow.codec import Vae
from itarflow.data import sources
from itarflow.flow import TARFlow
from itarflow.runtime.recording import release_recordings

torch.set_num_threads(1)  # on tensors this small, threads only cost time


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where none is seen."""
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: ITARFLOW_TEST_CUDA=1 pytest -m cuda -n 0")


def pytest_collection_finish() -> None:
    """What has been imported is never garbage: a training, which looks for some at its end, need not go through it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _digits_are_encoded_once() -> Iterator[None]:
    """The data set of most tests, which never changes: 1,797 PNGs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_digits", functools.cache(sources._digits))
        yield


@pytest.fixture(autouse=True)
def _recordings_of_other_tests_are_gone() -> None:
    """What flows of other tests still hold would be given back, and tried again, before a batch is halved."""
    release_recordings()


few_variants = pytest.mark.parametrize("variant", ["unconditional", "all_at_once"], indirect=True)
"""For what does not depend on the flow's mathematics: a flow with nothing, and one with everything."""


class Inputs(NamedTuple):
    """What a flow takes, in the order of its arguments."""

    images: Tensor
    labels: Tensor | None
    noise_level: Tensor | None


@pytest.fixture(name="randomise")
def _randomise() -> Callable[..., None]:
    return randomise


@pytest.fixture
def make_flow() -> Callable[..., TARFlow]:
    """make_flow(**changes): a tiny flow with random weights; fresh=True leaves it as its constructor does."""

    def make(*, fresh: bool = False, seed: int = 0, **changes: Any) -> TARFlow:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            flow = TARFlow(**TINY | changes)
        if not fresh:
            randomise(flow, seed)
            if flow.config.volume_preserving:
                variance = torch.rand(flow.z_shape, generator=torch.Generator().manual_seed(seed))
                flow.prior_variance.copy_(0.5 + variance)
        return flow

    return make


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    """make_inputs(flow): images, labels and noise levels that suit it; the second image has no label."""

    def make(flow: TARFlow, batch_size: int = 3, seed: int = 1) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch_size, *flow.image_shape, generator=generator).to(flow.dtype)
        labels, levels = torch.arange(batch_size) % flow.config.num_classes if flow.config.num_classes else None, None
        if labels is not None and batch_size > 1:
            labels[1] = flow.null_label
        if flow.config.noise_conditioned:
            levels = torch.linspace(0.1, 0.5, batch_size, dtype=flow.dtype)
        return Inputs(images, labels, levels)

    return make


def tiny_vae(kind: str = "AutoencoderKL", seed: int = 0, **config: Any) -> Vae:
    """An autoencoder with random weights; of stride 2 and for grey images by default, but for an AutoencoderRAE."""
    sizes: dict[str, Any] = {"in_channels": 1, "out_channels": 1}
    if kind == "AutoencoderKL":
        sizes |= {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 0.4, "shift_factor": 0.1}
        sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    elif kind == "AutoencoderKLFlux2":  # patches of 2 x 2 of latents of stride 1
        sizes |= {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 32}
        sizes |= {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    elif kind == "AutoencoderDC":
        sizes = {"in_channels": 1, "latent_channels": 4, "attention_head_dim": 4}
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_block_out_channels": (8, 8), f"{part}_layers_per_block": (1, 1)}
            sizes |= {f"{part}_qkv_multiscales": ((), ())}
    elif kind == "AutoencoderRAE":  # RGB images of 8 x 8 pixels, codes of 64 x 2 x 2
        sizes = {"encoder_hidden_size": 64, "encoder_input_size": 28, "encoder_num_hidden_layers": 1, "patch_size": 4}
        sizes |= {"decoder_hidden_size": 32, "decoder_intermediate_size": 48, "decoder_num_hidden_layers": 1}
        sizes |= {"decoder_num_attention_heads": 2, "latents_mean": [[[0.1]]] * 64, "latents_std": [[[0.8]]] * 64}
    else:
        sizes |= {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
        sizes |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = getattr(diffusers, kind)(**sizes | config).eval().requires_grad_(False)
        if kind == "AutoencoderKLFlux2":
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
        return vae


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments, one after another, of every kind of flow."""
    return VARIANTS[request.param]


@pytest.fixture
def flow(variant: dict[str, Any], make_flow: Callable[..., TARFlow]) -> TARFlow:
    """A tiny flow of every kind, with random weights, in float32."""
    return make_flow(**variant)
