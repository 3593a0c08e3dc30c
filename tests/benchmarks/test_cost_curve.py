"""The cost curve's ratios, from rows written out by hand."""

import pytest

from benchmarks.quality.cost_curve import best_stock, over_cells, ratios

QUALITY = [
    {"method": "fit", "solver": "ddim", "denoiser": "a", "seed": "0", "calls": "5", "typical_error": "4.0"},
    {"method": "fit", "solver": "unipc", "denoiser": "a", "seed": "0", "calls": "5", "typical_error": "2.0"},
    {"method": "fit", "solver": "fitted", "denoiser": "a", "seed": "0", "calls": "5", "typical_error": "0.1"},
    {"method": "gits", "solver": "unipc", "denoiser": "a", "seed": "0", "calls": "5", "typical_error": "0.5"},
    {"method": "fit", "solver": "ddim", "denoiser": "a", "seed": "1", "calls": "5", "typical_error": "1.0"},
]


def test_errors_are_against_the_best_stock_solver_of_the_same_seed():
    best = best_stock(QUALITY)
    assert best == {("a", "0", "5"): 2.0, ("a", "1", "5"): 1.0}
    curve = [
        {"denoiser": "a", "solver": "fitted", "seed": seed, "calls": "5", "total": "100", "typical_error": error}
        for seed, error in (("0", "1.0"), ("1", "8.0"), ("2", "9.0"))  # seed 2 has nothing to be compared with
    ]
    found = ratios([*curve, curve[0] | {"solver": "ddim", "typical_error": "1e9"}], best)
    assert found == {("a", "5"): {100: pytest.approx((0.5 * 8.0) ** 0.5)}}


def test_cells_are_averaged_geometrically_and_the_worst_is_named():
    found = {("a", "5"): {100: 2.0}, ("a", "8"): {100: 0.5}, ("b", "5"): {100: 8.0}}
    assert over_cells(found, {"a"})[100] == pytest.approx((1.0, 2.0))
    assert over_cells(found, {"a", "b"})[100] == pytest.approx((2.0, 8.0))
