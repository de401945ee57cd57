"""Figures of features, against closed forms and torch-fidelity."""

import json
import math
from dataclasses import replace

import pytest
import torch
from fidelity import torch_fidelity
from tiny_extractor import TinyExtractor

from itarflow.evaluation.metrics.extractors import INCEPTION
from itarflow.evaluation.metrics.features import extract, frechet_distance
from itarflow.evaluation.metrics.reference import Origin, Reference
from itarflow.evaluation.metrics.scores import inception_score, kernel_distance, precision_recall, score


def features(count, size=6, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, size, generator=generator) + shift


def test_the_inception_score_of_certain_and_diverse_images_is_the_number_of_classes():
    certain = 100 * torch.eye(5).repeat(200, 1)
    assert inception_score(certain, splits=1) == pytest.approx((5, 0), rel=1e-6)
    assert inception_score(torch.zeros(50, 7)) == pytest.approx((1, 0), abs=1e-12)


def test_the_inception_score_of_two_kinds_of_images():
    p, q = (0.9, 0.1), (0.3, 0.7)
    logits = torch.tensor([p, q]).log().repeat(4, 1)
    divergence = sum(a * math.log(a / ((a + b) / 2)) for pair in (p, q) for a, b in [(pair[0], 1.2 - pair[0])]) / 2
    divergence += sum(a * math.log(a / ((a + b) / 2)) for pair in (p, q) for a, b in [(pair[1], 0.8 - pair[1])]) / 2
    assert inception_score(logits, splits=1).mean == pytest.approx(math.exp(divergence), rel=1e-6)


def test_the_inception_score_shuffles_what_comes_class_by_class():
    sorted_by_class = 100 * torch.eye(5).repeat_interleave(200, dim=0)
    assert inception_score(sorted_by_class).mean > 4.9


def test_the_inception_score_is_torch_fidelitys():
    fidelity = torch_fidelity()
    logits = features(123, size=20, scale=2)
    theirs = fidelity.metric_isc.isc_features_to_metric(logits)
    ours = inception_score(logits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_the_kernel_distance_of_two_points():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
    expected = (5 / 2 + 1) ** 3 + (9 / 2 + 1) ** 3 - 2 * (6 / 2 + 1) ** 3
    assert kernel_distance(x.expand(4, 2), y.expand(3, 2)) == pytest.approx((expected, 0), rel=1e-12)


def test_the_kernel_distance_is_the_unbiased_estimate():
    x, y = features(5, seed=1), features(5, seed=2, shift=0.3)

    def kernel(a, b):
        return (float(a.double() @ b.double()) / 6 + 1) ** 3

    within = sum(kernel(a[i], a[j]) for a in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    assert kernel_distance(x, y, subsets=2).mean == pytest.approx(within - 2 * across, rel=1e-5)


def test_kernel_distances_are_torch_fidelitys():
    fidelity = torch_fidelity()
    x, y = features(150, seed=1), features(120, seed=2, shift=0.2)
    theirs = fidelity.metric_kid.kid_features_to_metric(x, y, kid_subset_size=50, verbose=False)
    ours = kernel_distance(x, y, subset_size=50)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_samples_of_half_the_data_are_precise_but_recall_half():
    first, second = features(30), features(30, shift=1000.0)
    assert precision_recall(first, torch.cat([first, second])) == (1.0, 0.5)
    assert precision_recall(torch.cat([first, second]), second) == (0.5, 1.0)


def test_surroundings_reach_to_the_third_neighbour():
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0], [100.0]])  # reaching as far as 4, 3, 2, 4, 99 around them
    samples = torch.tensor([[-4.0], [-4.1], [8.0], [198.9], [199.1]])
    assert precision_recall(samples, real).precision == pytest.approx(3 / 5)


@pytest.mark.parametrize("rows", [7, 2048])
def test_precision_and_recall_are_torch_fidelitys(monkeypatch, rows):
    fidelity = torch_fidelity()
    monkeypatch.setattr("itarflow.evaluation.metrics.scores._ROWS", rows)
    samples, real = features(80, seed=1, scale=0.7, shift=20.0), features(60, seed=2, shift=20.0)
    theirs = fidelity.metric_prc.prc_features_to_metric(samples, real, verbose=False)
    ours = precision_recall(samples, real)
    assert 0 < ours.recall < ours.precision < 1
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 10"):
        inception_score(features(9))
    with pytest.raises(ValueError, match="2 or more"):
        kernel_distance(features(1), features(5))
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(features(3), features(5))


def extracted(extractor, count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return extract(extractor, [(torch.arange(count), images)], count)


def reference(extractor, **changes):
    found = extracted(extractor, 20, seed=1)
    origin = Origin("digits, split train", extractor.name, extractor.identity, 8, "center", 20)
    spatial = None if found.spatial is None else found.spatial.moments()
    return Reference(replace(origin, **changes), found.pool.moments(), spatial, found.kept.pool)


def test_scores_of_inception_have_the_names_of_the_field():
    extractor = TinyExtractor(INCEPTION, width=30)
    scores = score(extracted(extractor), reference(extractor), extractor)
    assert list(scores.figures) == ["fid", "sfid", "inception_score", "kid", "precision", "recall"]
    samples, real = extracted(extractor), reference(extractor)
    assert scores.figures["sfid"].value == frechet_distance(samples.spatial.moments(), real.spatial)
    assert scores.figures["kid"].value == kernel_distance(samples.kept.pool, real.features).mean
    assert "24 samples for 30 features" in scores.warnings[0]
    assert "20 real images for 30 features" in scores.warnings[1]


@pytest.mark.parametrize("extractor", [TinyExtractor(), TinyExtractor("inception-v3-compat of 12345678", width=6)])
def test_no_other_extractor_gives_a_figure_of_these_names(extractor):
    scores = score(extracted(extractor), reference(extractor), extractor)
    assert list(scores.figures) == ["frechet_distance", "kernel_distance", "precision", "recall"]
    titles = [figure.title for figure in scores.figures.values()]
    assert all(title.endswith(f" ({extractor.name})") for title in titles)
    assert not any(name in title for title in titles for name in ("FID", "KID", "Inception Score"))


def test_what_a_figure_depends_on_is_reported():
    extractor = TinyExtractor()
    known = reference(extractor, image_size=None, crop=None, count=None, broken=("2.png: cut short",))
    scores = score(extracted(extractor), replace(known, features=None), extractor, broken=2)
    assert list(scores.figures) == ["frechet_distance"]
    assert (scores.samples, scores.broken, scores.reference_images, scores.kept_images) == (24, 2, None, 0)
    warned = " ".join(scores.warnings)
    for words in (
        "2 samples have values that are not finite",
        "2.png",
        "no images",
        "the size of its images",
        "were cropped",
    ):
        assert words in warned
    assert "singular" not in warned
    assert "24 samples: published FIDs are of 50,000" in warned
    assert json.loads(json.dumps(scores.to_json()))["figures"]["frechet_distance"]["std"] is None


def test_features_of_two_extractors_are_not_compared():
    ours, theirs = TinyExtractor(), TinyExtractor(identity="2" * 64)
    with pytest.raises(ValueError, match="expected one extractor"):
        score(extracted(ours), reference(theirs), ours)
