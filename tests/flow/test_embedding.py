import math

import pytest
import torch

from itarflow.flow.embedding import (
    NULL_LABEL,
    ClassEmbedding,
    NoiseLevelEmbedding,
    PositionEmbedding,
    fourier_features,
)


@pytest.mark.parametrize("channels", [2, 7, 8])
def test_fourier_features_are_sines_then_cosines_of_falling_frequencies(channels):
    x = torch.tensor([-4.6, 0.0, 1.3], dtype=torch.float64)
    half = channels // 2
    expected = [
        [f(value * 10000 ** (-i / half)) for f in (math.sin, math.cos) for i in range(half)] + [0.0] * (channels % 2)
        for value in x.tolist()
    ]
    torch.testing.assert_close(fourier_features(x, channels), torch.tensor(expected, dtype=x.dtype))


def test_noise_level_is_embedded_in_its_own_precision_before_weights_in_bfloat16():
    embedding = NoiseLevelEmbedding(64).bfloat16()
    close = torch.tensor([0.1, 0.1002])  # one number in bfloat16
    assert embedding.mlp[0].weight.dtype == torch.bfloat16
    seen = []
    embedding.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedding(close)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_class_embedding_has_a_vector_for_each_class_and_their_mean_for_none():
    embedding = ClassEmbedding(num_classes=4, channels=5).double()
    expected = torch.stack([embedding.weight[3], sum(embedding.weight) / 4, embedding.weight[0]])
    torch.testing.assert_close(embedding(torch.tensor([3, NULL_LABEL, 0])), expected)


def test_the_null_label_trains_all_classes_alike():
    embedding = ClassEmbedding(num_classes=4, channels=5)
    embedding(torch.tensor([NULL_LABEL])).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.full((4, 5), 0.25))


@pytest.mark.parametrize("reverse", [False, True])
def test_positions_in_windows_are_those_of_the_whole_in_the_blocks_order(reverse):
    embedding = PositionEmbedding(num_tokens=5, channels=3)
    windows = [embedding(start, stop, reverse) for start, stop in ((0, 2), (2, 3), (3, 5))]
    order = [4, 3, 2, 1, 0] if reverse else [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat(windows), embedding.weight[order])
