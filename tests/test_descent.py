from fastsched.descent import coordinate_descent


def test_coordinate_descent_finds_a_convex_minimum():
    target = [0, 7, 11, 30, 41, 60]
    found = coordinate_descent(lambda nodes, n: (nodes[n] - target[n]) ** 2, [0, 1, 2, 3, 4, 60])
    assert found == target
