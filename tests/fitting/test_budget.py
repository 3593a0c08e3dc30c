"""How a fit divides its calls: plans, and samples of few elements, which are measured without responses."""

import pytest
import torch

import fastsched as fs
from fastsched.fitting.budget import PLANS, measuring_calls, planned
from fastsched.fitting.denoiser_fit import fit_report
from fastsched.measurement.deviated_paths import deviated_paths, queries, query_count


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("levels", [None, 16, 64])
def test_a_measurement_takes_what_its_plan_does(plan, levels):
    """Without responses there are twice as many samples, if the total allows."""
    wanted = measuring_calls(plan.levels, plan.samples)
    count, samples = planned(plan.total, 8, levels)
    of_one = measuring_calls(count, 1)
    assert samples == 1 or wanted - of_one < samples * of_one <= wanted
    few, more = planned(plan.total, 8, levels, responses=False)
    assert few == count
    assert more == 2 * samples or more == max(1, (plan.total - 14) // count)
    assert more == 1 or more * count + 14 <= plan.total


@pytest.mark.parametrize("given", [{}, {"levels": 16, "samples": 3}])
@pytest.mark.parametrize("elements", [1, 4, 5])
def test_samples_of_few_elements_are_measured_without_responses(elements, given):
    denoiser, calls = _counting(elements)
    report = fit_report(denoiser, (elements,), 4, model_calls=400, progress=False, **given)
    few = elements <= 4
    assert (report.stats.response_gram is None) == few
    assert report.stats.samples == (3 if given else 8 if few else 4)
    assert sum(calls) == report.model_calls <= 400


@pytest.mark.parametrize("solver", ["fitted", "unipc"])
@pytest.mark.parametrize(("total", "samples"), [(60, 3), (80, 3), (100, 4), (200, 4), (300, 6)])
def test_small_fits_of_few_elements_keep_to_their_calls(total, samples, solver):
    denoiser, calls = _counting(2)
    report = fit_report(denoiser, (2,), 4, solver, model_calls=total, progress=False)
    assert report.stats.samples == samples
    assert report.stats.response_gram is None
    assert sum(calls) == report.model_calls <= total


@pytest.mark.parametrize(("solver", "samples"), [("fitted", 16), ("dpmpp_2m", 8)])
def test_large_fits_of_few_elements_go_without_responses_for_the_fitted_solver_alone(solver, samples):
    denoiser, calls = _counting(2)
    report = fit_report(denoiser, (2,), 4, solver, model_calls=1500, progress=False)
    assert (report.stats.response_gram is None) == (solver == "fitted")
    assert report.stats.samples == samples
    assert sum(calls) == report.model_calls <= 1500


def _counting(elements):
    """A denoiser of independent Gaussian elements, and the batch sizes of its calls."""
    calls = []

    def network(z, s):
        calls.append(len(z))
        variances = torch.linspace(0.1, 1.0, elements) ** 2
        return z * variances / (variances + s.reshape(-1, *(1,) * (s.ndim > 0)) ** 2)

    return fs.Denoiser.from_denoiser(network, 0.01, 20.0), calls


def test_absurd_numbers_of_levels_and_steps_are_refused_before_they_fill_the_memory():
    for levels in (3, 4, 47, 48):
        for paths in ((), deviated_paths(levels)):
            assert query_count(levels, paths) == len(queries(levels, paths))
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z / 2, 0.01, 20.0)
    for name in ("levels", "steps"):
        with pytest.raises(ValueError, match=f"^{name} must be at most"):
            fs.fit(denoiser, (5,), **{"steps": 4, name: 2**31 - 1})
