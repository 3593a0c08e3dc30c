import warnings

import numpy as np
import pytest
import torch
from models import exact_denoiser, mixture

import fastsched as fs
from fastsched.sampling.sampler import answered, integration, nodes_of
from fastsched.sampling.solvers import SOLVERS, get_solver

DENOISER = exact_denoiser(mixture(d=3))
NOISE = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def test_schedule_brings_its_solver():
    schedule = fs.Schedule(torch.tensor([80.0, 1.0, 0.0]), "heun")
    torch.testing.assert_close(
        fs.sample(DENOISER, schedule, noise=NOISE), fs.sample(DENOISER, [80.0, 1.0, 0.0], "heun", NOISE)
    )


def test_one_step_returns_the_denoised_noise():
    torch.testing.assert_close(fs.sample(DENOISER, [80.0, 0.0], "ddim", NOISE), DENOISER(80 * NOISE, 80.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_minus_zero_is_zero(solver):
    found = fs.sample(DENOISER, [80.0, 5.0, 1.0, -0.0], solver, NOISE)
    assert torch.equal(found, fs.sample(DENOISER, [80.0, 5.0, 1.0, 0.0], solver, NOISE))
    assert str(fs.Schedule([80.0, 1.0, -0.0], solver)) == str(fs.Schedule([80.0, 1.0, 0.0], solver))


def test_stopping_short_returns_the_state():
    gaussian = fs.oracles.Gaussian(0.5, (3,))
    sigmas = torch.logspace(1.9, 0, 2001, dtype=torch.float64)
    noise = NOISE.double()
    z = fs.sample(exact_denoiser(gaussian), sigmas, "heun", noise)
    exact = gaussian.flow(noise * sigmas[0], float(sigmas[0]), float(sigmas[-1]))
    torch.testing.assert_close(z, exact, rtol=1e-5, atol=0)  # second order: (4.4 / 2000)^2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_output_names_the_level(bad):
    broken = fs.Denoiser.from_denoiser(lambda z, s: torch.where(s.reshape(-1, 1) < 1, bad, z), 0.01, 80.0)
    with pytest.raises(ValueError, match=r"NaN or inf at sigma = 0\.5"):
        fs.sample(broken, [80.0, 2.0, 0.5, 0.1, 0.0], "ddim", NOISE)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [([1.0, 2.0, 0.0], r"sigmas must strictly descend, but sigmas\[1\] = 2 follows 1"), ([1.0], "at least two"),
     ([2.0, 1.0, 1.0], "strictly descend"), ([2.0, -1.0], "non-negative"), ([2.0, float("nan")], "non-negative")],
)  # fmt: skip
def test_bad_sigmas(sigmas, message):
    with pytest.raises(ValueError, match=message):
        fs.sample(DENOISER, sigmas, "ddim", NOISE)


def test_solver_and_noise_are_needed():
    with pytest.raises(ValueError, match="solver must be given"):
        fs.sample(DENOISER, [1.0, 0.0], noise=NOISE)
    with pytest.raises(ValueError, match="noise must be given"):
        fs.sample(DENOISER, [1.0, 0.0], "ddim")


@pytest.mark.parametrize("name", SOLVERS)
def test_integration_of_many_schedules_is_that_of_each(name):
    """Nodes of arrays, one entry a schedule: each row as if it were alone."""
    process, levels = DENOISER.process, torch.tensor([[9.0, 3.0, 1.0, 0.2, 0.0], [9.0, 5.0, 0.7, 0.1, 0.0]]).double()
    denoise = lambda y, s: np.tanh(y) + 0.1 * np.asarray(s)  # any function serves, broadcasting over [.., 2]
    start = np.array([0.3, -1.1])
    alone = [nodes_of(process, row) for row in levels]
    together = nodes_of(process, levels)
    method = get_solver(name)
    column = lambda value: np.asarray(value)[..., None]
    queries = integration(together, method, np.tile(start, (2, 1)), s=list(levels.T.numpy()), number=column)
    found = answered(queries, lambda y, s: denoise(y, s[:, None]))
    for n, nodes in enumerate(alone):
        expected = answered(integration(nodes, method, start, s=levels[n].numpy()), denoise)
        np.testing.assert_allclose(found[n], expected, rtol=1e-13, atol=1e-13)


def test_euler_by_hand():
    nodes = nodes_of(DENOISER.process, torch.tensor([9.0, 3.0, 1.0, 0.5]))
    s = [9.0, 3.0, 1.0, 0.5]
    end = answered(integration(nodes, get_solver("ddim"), 0.0, s=s), lambda y, s: 0.0 * y + s)
    # y gains (rho_k - rho_j) D_j, D = s: (1/3 - 1/9) 9 + (1 - 1/3) 3 + (2 - 1) 1
    assert end == pytest.approx(2 + 2 + 1, rel=1e-12)


def test_a_stop_iteration_of_the_network_is_an_error():
    nodes = nodes_of(DENOISER.process, torch.tensor([9.0, 3.0, 0.0]))
    with pytest.raises(StopIteration):
        answered(integration(nodes, get_solver("ddim"), 0.0, s=[9.0, 3.0]), lambda y, s: next(iter([])))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "ancestral"])
def test_timesteps_in_place_of_sigmas_are_warned_of(solver):
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.001, 1000))  # s up to 31.6
    noise = torch.ones(1, 2)
    with pytest.warns(UserWarning, match=r"sigmas start at 999, far above 31\.6.*are they timesteps"):
        fs.sample(denoiser, [999.0, 500.0, 1.0, 0.0], solver, noise)
    fs.sample(denoiser, [40.0, 5.0, 1.0, 0.0], solver, noise)  # a warning is an error in this suite
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.01, 20.0)
    fs.sample(denoiser, [80.0, 1.0, 0.0], solver, noise)
    with pytest.warns(UserWarning, match=r"sigmas start at 999, far above 20.*are they timesteps"):
        fs.sample(denoiser, [999.0, 500.0, 1.0, 0.0], solver, noise)


@pytest.mark.parametrize("decoupled", ["denoiser", "timestep"])
def test_timesteps_in_place_of_network_sigmas_are_warned_of(decoupled):
    denoiser = fs.Denoiser.from_epsilon(lambda x, t: 0.1 * x, torch.linspace(0.999, 0.001, 1000))  # s up to 31.6
    wrong, right = (
        fs.Schedule([20.0, 5.0, 0.0], "ddim", "vp", network_sigmas=told, decoupled=decoupled)
        for told in ([980.0, 700.0], [40.0, 4.0])
    )
    with pytest.warns(UserWarning, match=r"network_sigmas start at 980, far above 31\.6.*are they timesteps"):
        fs.sample(denoiser, wrong, noise=torch.ones(1, 2))
    fs.sample(denoiser, right, noise=torch.ones(1, 2))  # a warning is an error in this suite


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ancestral"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_a_network_computes_in_its_own_dtype_unless_another_is_asked_for(kind, solver):
    network, given = torch.nn.Linear(4, 4, dtype=kind), []
    told = lambda x, _: given.append(x.dtype) or (network(x) if x.dtype == kind else x)
    noise = torch.ones(2, 4)
    wrapped = torch.nn.Module()
    wrapped.inner, wrapped.forward = network, told
    for asked in (None, torch.float16):
        given.clear()
        end = fs.sample(fs.Denoiser.from_edm(wrapped), [80.0, 5.0, 0.0], solver, noise, dtype=asked)
        assert (set(given), end.dtype) == ({asked or kind}, torch.float32)
    given.clear()
    fs.sample(fs.Denoiser.from_edm(lambda x, c: told(x, c)), [80.0, 5.0, 0.0], solver, noise.double())
    assert set(given) == {torch.float64}  # a function may compute in any


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_noise_that_is_scaled_already_is_warned_of(solver):
    denoiser, sigmas = exact_denoiser(mixture(), 0.02, 20.0), [20.0, 3.0, 0.5, 0.0]
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="noise must be standard normal, but its root mean square is"):
        fs.sample(denoiser, sigmas, solver, sigmas[0] * noise)
    fs.sample(denoiser, sigmas, solver, noise)
    fs.sample(denoiser, sigmas[2:], solver, 9 * noise)  # a noisy sample, divided by its low level


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_noise_that_is_uniform_is_warned_of(solver):
    denoiser, sigmas = exact_denoiser(mixture(), 0.02, 20.0), [20.0, 3.0, 0.5, 0.0]
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match=r"is 0\.5.*torch\.randn draws such noise, torch\.rand does not"):
        fs.sample(denoiser, sigmas, solver, torch.rand(64, 4, generator=generator))
    fs.sample(denoiser, sigmas, solver, 0.667 * torch.randn(64, 4, generator=generator))
    fs.sample(denoiser, sigmas, solver, 0.1 * torch.randn(4, 4, generator=generator))  # as a few numbers may be


@pytest.mark.parametrize("solver", SOLVERS)
def test_nearly_equal_sigmas_of_a_multistep_solver_are_warned_of(solver):
    """As of one level in float32 and in float64. UniPC had 10^5 times the size of its samples in error."""
    sigmas, method = [80.0, 10.0, 1.0, 0.3, 0.1, 0.0], get_solver(solver)
    extrapolates = method.order > 1 and method.stage is None
    for gap in (0.1, 0.01, 1e-4, 1e-8):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fs.sample(DENOISER, [*sigmas[:3], 1 - gap, *sigmas[3:]], solver, NOISE)
        assert ["nearly equal" in str(each.message) for each in told] == [True] * (extrapolates and gap < 1e-3)


def test_nearly_equal_sigmas_of_a_flow_are_named_as_they_were_given():
    flow = fs.Denoiser.from_velocity(lambda x, t: x)
    with pytest.warns(UserWarning, match=r"sigmas 0.5 and 0.49999 are nearly equal"):
        fs.sample(flow, [0.9, 0.5, 0.49999, 0.2, 0.0], "unipc", NOISE)


def test_sigmas_too_low_for_float32_are_named():
    with pytest.raises(ValueError, match=r"sigmas must be 0 or at least 1e-30, .*1e-300"):
        fs.sample(DENOISER, [80.0, 1e-300, 0.0], "ddim", NOISE)
