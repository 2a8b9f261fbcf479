"""Distances of hidden states, and where projections start."""

import pytest
import torch

from parallel.hidden_states import distance_of, initial_projection


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_distance_is_zero_of_equal_vectors_and_the_same_at_every_size(distance):
    hidden, target = torch.randn(4, 3, 32), torch.randn(4, 3, 32)
    assert distance_of(target, target, distance).abs().max() < 1e-6
    apart = distance_of(hidden, target, distance)
    assert apart.shape == (4, 3) and apart.min() > 0.1
    torch.testing.assert_close(distance_of(100 * hidden, 100 * target, distance), apart)


def test_projections_keep_the_size_of_what_they_multiply_and_differ():
    first, second = initial_projection(1, 0, (512, 64)), initial_projection(1, 1, (512, 64))
    hidden = torch.randn(100, 64)
    assert (hidden @ first.t()).square().mean() == pytest.approx(float(hidden.square().mean()), rel=0.1)
    assert not torch.equal(first, second)
    assert torch.equal(first, initial_projection(1, 0, (512, 64)))
