import torch

from fastsched.ops import reference


def test_levels_and_increments_by_hand():
    R = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
    X = torch.tensor([[[10.0, 20.0]], [[30.0, 40.0]]])
    a, c = torch.tensor([0.5, 0.25]), torch.tensor([2.0, 3.0])
    u = [[[7.0, 14.0]], [[16.5, 25.0]]]
    assert reference.levels(R, X, a, c).tolist() == u
    assert reference.increments(R, X, a, c).tolist() == [[[7.0, 14.0]], [[9.5, 11.0]]]
    assert reference.increment_gram(R, X, a, c).tolist() == [[245.0, 220.5], [220.5, 211.25]]
    assert reference.squared_distances(reference.levels(R, X, a, c))[0, 1] == 211.25


def test_shared_states_are_states_repeated():
    generator = torch.Generator().manual_seed(1)
    R = torch.randn(3, 2, 5, generator=generator)
    X = torch.randn(2, 5, generator=generator)
    a, c = torch.tensor([0.1, 0.2, 0.4]), torch.ones(3)
    shared = reference.increment_gram(R, X, a, c, per_sample=True)
    assert torch.equal(shared, reference.increment_gram(R, X.expand(3, 2, 5), a, c, per_sample=True))
    assert torch.equal(reference.increment_gram(R, X, a, c), shared.mean(0))


def test_hutchinson_by_hand():
    v_jv, jv_jv = reference.hutchinson(torch.tensor([[1.0, -1.0]]), torch.tensor([[[2.0, 3.0]], [[0.5, 4.0]]]))
    assert v_jv.tolist() == [[-1.0], [-3.5]]
    assert jv_jv.tolist() == [[13.0], [16.25]]
