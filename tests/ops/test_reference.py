import math

import pytest
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


# The known answers that come with Random123, the generator's own distribution.
@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, block):
    assert reference.philox_4x32(counter, key) == block


def test_min_plus_by_hand():
    first = torch.tensor([math.nan, 1.0, 4.0, 10.0])
    cost = torch.full((4, 4, 4), math.inf)
    cost[0, 1, 2], cost[0, 1, 3], cost[0, 2, 3], cost[1, 2, 3] = 1.0, 6.0, 3.0, 2.0
    totals, paths = reference.second_order_min_plus(first, cost, 4)
    assert totals == [10.0, 7.0, 4.0, math.inf]
    # 0 1 3 and 0 2 3 both cost 7: the smaller last-but-one level wins.
    assert paths == [[0, 3, -1, -1, -1], [0, 1, 3, -1, -1], [0, 1, 2, 3, -1], [-1] * 5]


def test_hutchinson_by_hand():
    v_jv, jv_jv = reference.hutchinson(torch.tensor([[1.0, -1.0]]), torch.tensor([[[2.0, 3.0]], [[0.5, 4.0]]]))
    assert v_jv.tolist() == [[-1.0], [-3.5]]
    assert jv_jv.tolist() == [[13.0], [16.25]]
