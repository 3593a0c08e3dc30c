import math

import numpy as np
import pytest
import torch
from models import counted_denoiser, exact_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs
from fastsched.measurement.measuring import with_increments
from fastsched.measurement.path_following import PATH_SOLVER
from fastsched.sampling.random_streams import noise_of, sample_seeds

C = 0.5


def gaussian_denoiser(shape=(16,), std=C):
    return exact_denoiser(fs.oracles.Gaussian(std, shape))


def measure(denoiser, shape=(16,), **options):
    return fs.measure(denoiser, shape, progress=False, **{"samples": 4, **options})


def test_path_follows_the_exact_flow():
    oracle = fs.oracles.Gaussian(C, (16,))
    stats = measure(gaussian_denoiser(), levels=64)
    noise = noise_of(stats.seeds, (16,))
    exact = oracle.flow(noise * 80.0, 80.0, 0.0)
    relative = (stats.ends - exact).norm() / exact.norm()
    assert float(relative) < 0.168**3  # third order in a step of 0.168
    assert stats.data_std == pytest.approx(float(exact.std()), rel=0.02)


def gram_error(levels):
    """Largest error of the increments' products against the exact flow, relative to the increments' sizes."""
    oracle = fs.oracles.Gaussian(C, (16,))
    stats = measure(exact_denoiser(oracle, 0.05, 80.0), levels=levels, responses=False)
    s, noise = stats.s, noise_of(stats.seeds, (16,)).double()
    denoised = torch.stack([oracle.denoise(oracle.flow(noise * 80.0, 80.0, float(v)), float(v)) for v in s])
    increments = denoised.diff(dim=0)
    exact = torch.einsum("pbd,qbd->bpq", increments, increments)
    scale = exact.diagonal(dim1=1, dim2=2).sqrt()
    return float(((stats.gram - exact).abs() / (scale[:, :, None] * scale[:, None, :])).max())


def test_gram_holds_the_increments():
    """To third order in the path's steps, 0.117 and 0.029; below, to float32's rounding of D at the lowest levels.

    There an increment is some 3e-4 of D and D is rounded to 6e-8 of itself, twice: 4e-4, over four samples the worst.
    """
    coarse, fine = gram_error(64), gram_error(256)
    assert coarse < 2 * 0.117**3
    assert fine < 1.5e-3


@pytest.mark.parametrize("gap", [1e-12, 1e-4])
def test_levels_that_are_nearly_equal_are_refused(gap):
    """As of two schedules that were joined."""
    levels = exact_denoiser(mixture()).levels(12)
    twice = torch.cat([levels[:6], levels[5:6] * (1 - gap), levels[6:]])
    with pytest.raises(ValueError, match=r"levels must be at least 0.1% apart, but levels\[6\] ="):
        measure(exact_denoiser(mixture()), (4,), levels=twice)


@pytest.mark.parametrize(
    "denoiser",
    [
        exact_denoiser(mixture(), 1.0, 1.0 + 1e-7),
        exact_denoiser(mixture(), 1.0, 1.0 + 1e-12),
        fs.Denoiser.from_v(lambda x, t: x, [0.5, 0.0]),
    ],
)
def test_too_narrow_a_process_is_refused(denoiser):
    with pytest.raises(ValueError, match="levels must be fewer than 48"):
        fs.measure(denoiser, (4,), progress=False)


@pytest.mark.parametrize("lowest", [0.2, 5.0])
def test_levels_that_end_far_above_the_lowest_are_warned_of(lowest):
    """The step from there to 0 jumps over most of what the denoiser does, and none of that is measured."""
    levels = torch.logspace(math.log10(80.0), math.log10(lowest), 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"the levels end at {lowest:g}, .* Add levels nearer to 0.002"):
        measure(gaussian_denoiser(), levels=levels)


def test_more_levels_than_memory_holds_are_refused():
    with pytest.raises(ValueError, match="levels must be at most 1,000,000"):
        measure(exact_denoiser(mixture()), (4,), levels=10**9)


def test_samples_whose_squares_exceed_float32_are_refused():
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: 1e20 * s.sin()[:, None] * z.tanh(), 0.002, 80.0)
    with pytest.raises(ValueError, match="squares exceed float32"):
        measure(denoiser, levels=16, checks=False)


def test_batches_do_not_change_the_samples():
    denoiser = exact_denoiser(mixture())
    whole = measure(denoiser, (4,), levels=16, samples=5)
    parts = measure(denoiser, (4,), levels=16, samples=5, batch_size=2)
    torch.testing.assert_close(whole.gram, parts.gram, rtol=1e-4, atol=1e-6)  # float32 states, other batch shapes
    torch.testing.assert_close(whole.response_gram, parts.response_gram, rtol=1e-3, atol=1e-6)
    first = measure(denoiser, (4,), levels=16, samples=2)
    torch.testing.assert_close(first.ends, whole.ends[:2], rtol=1e-4, atol=1e-5)


def test_same_seed_same_statistics():
    denoiser = exact_denoiser(mixture())
    one, two = (measure(denoiser, (4,), levels=16, seed=7) for _ in range(2))
    assert torch.equal(one.gram, two.gram)
    assert torch.equal(one.response_cross, two.response_cross)
    other = measure(denoiser, (4,), levels=16, seed=8)
    assert not torch.equal(one.gram, other.gram)


def test_seeds_of_different_measurements_do_not_meet():
    assert not set(sample_seeds(0, 10_000).tolist()) & set(sample_seeds(1, 10_000).tolist())
    with pytest.raises(ValueError, match="seed must be within"):
        sample_seeds(-1, 2)


def test_a_module_says_its_own_dtype():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, z, sigma):
            assert z.dtype == torch.bfloat16
            return z * self.scale / (1 + sigma.to(z.dtype).reshape(-1, 1) ** 2)

    stats = measure(fs.Denoiser.from_denoiser(Network(), 0.01, 10.0), (3,), levels=8)
    assert stats.gram.dtype == torch.float64


def test_no_gradients_are_taken():
    weight = torch.ones(3, requires_grad=True)
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: z * weight / (1 + s.reshape(-1, 1) ** 2), 0.01, 10.0)
    assert not measure(denoiser, (3,), levels=8).gram.requires_grad
    with torch.inference_mode():
        measure(denoiser, (3,), levels=8)


def test_flow_model_starts_from_pure_noise():
    stats = measure(exact_denoisers(mixture())["velocity"], (4,), levels=24)
    assert stats.s[0] == math.inf
    assert stats.sigmas[0] == 1.0
    assert bool(torch.isfinite(stats.gram).all())
    assert bool(torch.isfinite(stats.response_gram).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_output_names_the_level(bad):
    broken = fs.Denoiser.from_denoiser(lambda z, s: torch.where(s.reshape(-1, 1) < 1, bad, z), 0.1, 10.0)
    with pytest.raises(ValueError, match=r"NaN or inf at sigma = 0.719686.*\(level 4 of 8\)"):
        measure(broken, (3,), levels=8, checks=False)
    with pytest.raises(ValueError, match=r"NaN or inf at sigma = .*a call of checks=True"):
        measure(broken, (3,), levels=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"levels": 2}, "levels must be at least 3"), ({"samples": 0}, "samples must be at least 1"),
     ({"batch_size": 0}, "batch_size must be at least 1"),
     ({"levels": torch.tensor([1.0, 2.0, 3.0])}, "levels must strictly descend"),
     ({"levels": torch.tensor([2.0, 1.0, 0.0])}, "positive noise levels")],
)  # fmt: skip
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        measure(gaussian_denoiser(), **options)


@pytest.mark.parametrize("shape", [4, "abc", (), (3, 0)])
def test_bad_shape(shape):
    with pytest.raises((TypeError, ValueError), match="shape must"):
        measure(gaussian_denoiser(), shape)


def test_progress_is_shown_and_hidden(capsys):
    fs.measure(gaussian_denoiser(), (16,), levels=8, samples=1)
    assert "measuring" in capsys.readouterr().err
    measure(gaussian_denoiser(), levels=8)
    assert capsys.readouterr().err == ""


def increments_by_hand(denoiser, stats, shape):
    """``D_{q+1} - D_q`` in float64 at the states of the path, from its own solver run up to each level."""
    noise, process = noise_of(stats.seeds, shape).double(), denoiser.process
    states = [noise]
    for k in range(2, len(stats.s) + 1):
        sigmas = process.sampler_sigma(stats.s[:k])
        states.append(fs.sample(denoiser, sigmas, PATH_SOLVER, noise) / float(stats.s[k - 1]))
    denoised = [denoiser.denoise(y, float(s)) for y, s in zip(states, stats.s, strict=True)]
    return torch.stack(denoised).diff(dim=0).flatten(2).transpose(0, 1)


@pytest.mark.parametrize("kind", ["x0", "epsilon", "v", "velocity", "edm", "score"])
def test_kept_increments_are_those_of_the_path(kind):
    denoiser = exact_denoisers(mixture())[kind]
    stats = measure(denoiser, (4,), levels=12, samples=3, keep_increments=True)
    assert stats.increments.shape == (3, 11, 4)
    assert (stats.increments.dtype, stats.increments.device.type) == (torch.float32, "cpu")
    products = torch.einsum("bpd,bqd->bpq", stats.increments.double(), stats.increments.double())
    # both from float32 states, z = s y: an increment's rounding grows with the level
    size = stats.gram.diagonal(dim1=1, dim2=2).sqrt()
    rounding = 16 * torch.finfo(torch.float32).eps * stats.s[:-1].clamp(1.0, 200.0)
    bound = rounding * size[:, :, None] + rounding[:, None] * size[:, None, :]
    assert bool(((products - stats.gram).abs() <= bound).all())
    expected = increments_by_hand(denoiser, stats, (4,))
    torch.testing.assert_close(stats.increments.double(), expected, rtol=0, atol=2e-4)  # float32 states


def test_increments_sum_to_the_path():
    """``D_{N-1} - D_0``, and in batches, on images too."""
    denoiser = exact_denoiser(fs.oracles.Gaussian(C, (1, 2, 3)), 0.01, 20.0)
    stats = measure(denoiser, (1, 2, 3), levels=12, samples=5, batch_size=2, keep_increments=True)
    first = denoiser.denoise(noise_of(stats.seeds, (1, 2, 3)), 20.0)
    total = stats.increments.sum(1).reshape(stats.ends.shape)
    torch.testing.assert_close(total, stats.ends - first, rtol=0, atol=1e-5)
    assert measure(denoiser, (1, 2, 3), levels=12).increments is None


def test_model_calls_are_counted():
    denoiser, seen = counted_denoiser(fs.oracles.Gaussian(C, (3,)), 0.01, 10.0)
    stats = measure(denoiser, (3,), levels=16, samples=5, batch_size=2, checks=False)
    assert stats.model_calls == sum(seen) == 5 * (2 * 16 - 2)
    seen.clear()
    assert measure(denoiser, (3,), levels=16, responses=False, checks=False).model_calls == sum(seen) == 4 * 16
    seen.clear()
    checked = measure(denoiser, (3,), levels=16, samples=5, batch_size=2)
    assert checked.model_calls == sum(seen) == 5 * (2 * 16 - 2) + 6  # three elements are too few for one of the checks


def test_without_responses_there_are_none():
    stats = measure(gaussian_denoiser(), levels=8, responses=False)
    assert (stats.deviated, stats.response_cross, stats.response_gram) == ((), None, None)


def test_responses_of_a_gaussian_are_its_jacobian_times_the_deviation():
    """``D = J z`` is linear: the responses of the first path, ``J_k a_k``, by following it in closed form."""
    from fastsched.measurement.deviated_paths import asked_levels, positions

    levels, shape = 24, (6,)
    stats = measure(gaussian_denoiser(shape), shape, levels=levels, samples=2, keep_increments=True)
    jacobian = lambda s: C**2 / (C**2 + s**2)
    s, noise = stats.s.tolist(), noise_of(stats.seeds, shape).double()
    reference = [noise]
    for k in range(2, levels + 1):
        reference.append(fs.sample(gaussian_denoiser(shape), stats.s[:k], PATH_SOLVER, noise) / s[k - 1])
    y, answers, expected = noise, {0: jacobian(s[0]) * s[0] * noise}, []
    for k, used in enumerate([*stats.deviated[0].slopes(positions(stats.s)), []]):
        if k in asked_levels(levels):
            answers[k] = jacobian(s[k]) * s[k] * y
            expected.append(jacobian(s[k]) * s[k] * (y - reference[k]))
        if used:
            y = y + (1 / s[k + 1] - 1 / s[k]) * sum(weight * answers[level] for level, weight in used)
    found = stats.responses[:, : len(expected)].double()
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)  # float32 states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_are_measured_in_their_dtype(dtype):
    denoiser = gaussian_denoiser((64,))
    wide = measure(denoiser, (64,), levels=32)
    seen = set()

    def network(z, sigma):
        seen.add(z.dtype)
        return denoiser.network(z, sigma)

    half = measure(fs.Denoiser.from_denoiser(network, 0.002, 80.0), (64,), levels=32, dtype=dtype)
    assert seen == {dtype}
    # outputs are rounded to 2^-9 of themselves (bfloat16); the path's sum of increments is as large as they are
    torch.testing.assert_close(half.gram.sum((1, 2)), wide.gram.sum((1, 2)), rtol=0.02, atol=0)


@pytest.mark.parametrize("responses", [True, False])
def test_increments_of_a_measurement_can_be_had_later(responses):
    denoiser, seen = counted_denoiser(mixture(), 0.01, 20.0)
    kept = measure(denoiser, (4,), levels=12, samples=5, keep_increments=True, responses=responses)
    plain = measure(denoiser, (4,), levels=12, samples=5, responses=responses)
    seen.clear()
    found = with_increments(denoiser, plain, batch_size=2)
    assert sum(seen) == found.model_calls - plain.model_calls == (22 if responses else 12) * 5 + 1
    torch.testing.assert_close(found.increments, kept.increments, rtol=1e-3, atol=1e-5)  # other batch shapes
    assert torch.equal(found.gram, plain.gram)
    assert (found.responses is not None) == responses
    seen.clear()
    assert with_increments(denoiser, found) is found
    assert not seen
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        with_increments(denoiser, plain, batch_size=0)
    with pytest.raises(ValueError, match="another network"):
        with_increments(gaussian_denoiser((4,)), plain)


def test_outputs_of_several_dtypes_are_kept_in_the_widest():
    denoiser = gaussian_denoiser((64,))
    mixed = lambda z, s: denoiser.network(z, s).to(torch.bfloat16 if float(s[0]) > 1 else torch.float32)
    found = measure(fs.Denoiser.from_denoiser(mixed, 0.002, 80.0), (64,), levels=32)
    torch.testing.assert_close(
        found.gram[:, -8:, -8:], measure(denoiser, (64,), levels=32).gram[:, -8:, -8:], rtol=0.05, atol=1e-9
    )


def test_levels_of_whole_timesteps_are_those_of_the_table():
    table = vp_table(20)
    network = exact_denoisers(mixture(16), table)["epsilon"].network
    denoiser = fs.Denoiser.from_epsilon(network, table, integer_timesteps=True)
    known = denoiser.levels(12)
    stats = measure(denoiser, levels=known * 1.01, samples=2, checks=False)
    torch.testing.assert_close(stats.s, known, rtol=1e-12, atol=0.0)
    with pytest.raises(ValueError, match="levels must be at different integer timesteps"):
        measure(denoiser, levels=torch.tensor([1.0, 0.999, 0.5, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_levels_may_be_a_list(kind):
    denoiser = exact_denoiser(mixture(), 0.02, 80.0)
    levels = [80.0, 20.0, 5.0, 1.0, 0.2, 0.02]
    options = {"samples": 1, "progress": False}
    expected = fs.measure(denoiser, (4,), levels=torch.tensor(levels, dtype=torch.float64), **options)
    assert fs.measure(denoiser, (4,), levels=kind(levels), **options) == expected
    fitted = fs.fit(denoiser, (4,), steps=2, levels=kind(levels), model_calls=40, **options)
    assert fitted.origin.model_calls > 0
