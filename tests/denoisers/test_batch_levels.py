"""A batch has one noise level for all samples, or one for each; what else is given is named."""

import numpy as np
import pytest
import torch
from models import gaussian

X = torch.ones(2, 4)


@pytest.mark.parametrize("one", [2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([[2.0]]), [2.0]])
def test_one_level_is_that_of_all_samples(one):
    _, denoiser = gaussian(4)
    assert torch.equal(denoiser(X, one), denoiser(X, torch.tensor([2.0, 2.0])))


def test_levels_of_each_sample_may_have_the_shape_of_a_factor():
    _, denoiser = gaussian(4)
    assert torch.equal(denoiser(X, torch.tensor([[1.0], [2.0]])), denoiser(X, [1.0, 2.0]))


@pytest.mark.parametrize("s", [torch.ones(3), torch.ones(0), [1.0, 2.0, 3.0], torch.ones(2, 4)])
def test_levels_of_another_number_are_named(s):
    with pytest.raises(ValueError, match="s must be one level, or one for each of 2 samples"):
        gaussian(4)[1](X, s)


@pytest.mark.parametrize("s", ["1", None, True])
def test_what_is_no_level_is_named(s):
    with pytest.raises(TypeError, match="s must be a tensor or a list of numbers"):
        gaussian(4)[1](X, s)
