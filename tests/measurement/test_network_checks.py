"""Networks that are no denoisers are refused before they are measured; right ones are not."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import counted_denoiser, exact_denoisers, mixture, vp_table

import fastsched as fs
from benchmarks.quality.models import MODELS
from fastsched.measurement.checks.network import check_network, suspects
from fastsched.sampling.random_streams import noise_of

#: Structured data, as real data are: near a few points of 16 dimensions.
DATA = fs.oracles.GaussianMixture.random(16, 3, seed=0)
KINDS = exact_denoisers(DATA)
GAUSSIAN = exact_denoisers(fs.oracles.Gaussian(0.5, (16,)))


def check(denoiser, shape=(16,)):
    return check_network(denoiser, tuple(shape), torch.device("cpu"), torch.float32, denoiser.levels(3))


def measure(denoiser, samples=2, **options):
    return fs.measure(denoiser, (16,), levels=12, samples=samples, progress=False, **options)


RIGHT = {
    **{f"mixture {name}": (denoiser, (16,)) for name, denoiser in KINDS.items()},
    **{f"Gaussian {name}": (denoiser, (16,)) for name, denoiser in GAUSSIAN.items()},
    **{f"4 elements {name}": (denoiser, (4,)) for name, denoiser in exact_denoisers(mixture()).items()},
}


@pytest.mark.parametrize("name", RIGHT)
def test_exact_denoisers_pass(name):
    asked = check(*RIGHT[name])
    assert asked.model_calls <= 5


@pytest.mark.parametrize("name", MODELS)
def test_trained_networks_of_the_benchmark_pass(name):
    model = MODELS[name]()
    assert check(model.denoiser, model.shape).model_calls <= 5


@pytest.mark.parametrize("oracle", [fs.oracles.Gaussian(2.0, (16,)), fs.oracles.Gaussian(0.02, (16,), mean=0.5)])
def test_wide_and_narrow_data_pass(oracle):
    for denoiser in exact_denoisers(oracle).values():
        check(denoiser)


@pytest.mark.parametrize("kind", ["x0", "epsilon", "score"])
def test_data_of_two_values_pass(kind):
    """As of binary images, and bits. Two Euler steps end between the values, where no data are."""
    level = lambda z, s: torch.as_tensor(s).reshape(-1, 1).to(z)
    denoise = lambda z, s: torch.tanh(z / level(z, s).square())
    score = lambda z, s: (denoise(z, s) - z) / level(z, s).square()
    check(exact_denoisers(SimpleNamespace(denoise=denoise, score=score))[kind], (48,))


@pytest.mark.parametrize("turned", [torch.neg, lambda x0: x0.flip(1)], ids=["sign", "order"])
def test_clean_samples_that_are_turned_round_are_refused(turned):
    """Their rough samples, and those of more steps, may lie where turning them round changes little."""
    wrong = lambda z, s: turned(DATA.denoise(z, s))
    with pytest.raises(ValueError, match=r"at the lowest level .* this one moves it"):
        check(fs.Denoiser.from_denoiser(wrong, 0.02, 20.0))


def test_small_networks_in_the_plane_pass():
    """An error of 7% at sigma 157, as small networks make, is 11 in the denoised sample; two elements tell no size."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact = exact_denoisers(fs.oracles.Gaussian(0.2, (2,)), table)["epsilon"]
    off = lambda t, e: torch.where(t > 800, e, 0.0)[:, None]
    of_error = lambda e: replace(exact, network=lambda x, t: exact.network(x, t) + off(t, e))
    check(of_error(0.07), (2,))
    with pytest.raises(ValueError, match="Leave the last entries of the table out"):
        check(of_error(0.7), (2,))


@pytest.mark.parametrize("error", [0.3, 0.45])
def test_weakly_trained_networks_are_warned_of(error):
    """An error of 30% at sigma 157, more if guided, is 50 times the data; no wrong reading or table makes that."""
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact = exact_denoisers(DATA, table)["epsilon"]
    wrong = torch.randn(16, generator=torch.Generator().manual_seed(3))
    off = lambda t: torch.where(t > 900, error, 0.0)[:, None] * wrong
    weak = replace(exact, network=lambda x, t: exact.network(x, t) + off(t))
    with pytest.warns(UserWarning, match="Leave the last entries of the table out"):
        assert fs.measure(weak, (16,), levels=12, samples=1, progress=False).samples == 1


@pytest.mark.parametrize(("kind", "error"), [("v", 0.07), ("v", -0.07), ("epsilon", 0.02)])
def test_small_errors_of_networks_whose_rough_sample_is_small_pass(kind, error):
    """Data of deviation 0.5 lie along one direction, in which the noise of the rough sample has no part."""
    noise = noise_of(torch.tensor([0]), (64,))[0].double()
    along = 1 - noise * noise.sum() / noise.square().sum()
    along *= 4 / along.norm()
    denoise = lambda z, s: (along * (z.double() @ along / (16 + s.double() ** 2))[:, None]).to(z.dtype)
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    exact = exact_denoisers(SimpleNamespace(denoise=denoise, score=denoise), table)[kind]
    off = lambda x, t: error * (t > 800).float()[:, None] * x
    check(replace(exact, network=lambda x, t: exact.network(x, t) + off(x, t)), (64,))


def ring(modes, std, d=2):
    """Narrow modes on a circle, as toy data are: a rough sample lies between them."""
    angles = 2 * torch.pi * torch.arange(modes, dtype=torch.float64)[:, None] / modes
    means = torch.cat([angles.cos(), angles.sin()], 1)[:, :d]
    return fs.oracles.GaussianMixture(torch.ones(modes), means, std**2 * torch.eye(d).expand(modes, d, d))


@pytest.mark.parametrize("kind", ["x0", "epsilon", "score", "v", "velocity"])
@pytest.mark.parametrize("data", [ring(16, 0.03), ring(8, 0.05), ring(2, 1e-3, 1)])
def test_narrow_modes_in_the_plane_pass(kind, data):
    denoiser = exact_denoisers(data)[kind]
    fs.measure(denoiser, (data.means.shape[1],), samples=8, responses=False, progress=False)
    fs.measure(denoiser, (data.means.shape[1],), levels=8, samples=1, responses=False, progress=False)


@pytest.mark.parametrize("data", [ring(16, 0.03), ring(8, 0.05), mixture()])
def test_wrong_readings_in_the_plane_are_refused(data):
    kinds = exact_denoisers(data)
    for wrong in (minus(kinds["x0"]), *(replace(kinds[kind], prediction="x0") for kind in ("epsilon", "score"))):
        with pytest.raises(ValueError, match="predict the clean sample"):
            fs.measure(wrong, (data.means.shape[1],), levels=24, samples=4, responses=False, progress=False)


def digits():
    return MODELS["digits"]().denoiser


def flow(change, **options):
    network = KINDS["velocity"].network
    return fs.Denoiser.from_velocity(change(network), t_min=0.02, t_max=0.99, **options)


def not_cumulative(denoiser):
    table = torch.tensor(denoiser.process.alphas_cumprod, dtype=torch.float64)
    alphas = torch.cat([table[:1], table[1:] / table[:-1]])
    return replace(denoiser, process=replace(denoiser.process, alphas_cumprod=alphas))


def garbage_at_the_top():
    """A table that reaches sigma 19,250, where a noise prediction is 2% wrong, as any is."""
    table = torch.cat([vp_table(), vp_table()[-1:] * torch.tensor([1e-1, 1e-2, 1e-3, 6e-5])])
    exact = exact_denoisers(DATA, table)["epsilon"]
    wrong = torch.randn(16, generator=torch.Generator().manual_seed(3))
    return fs.Denoiser.from_epsilon(lambda x, t: exact.network(x, t) + 0.02 * wrong, table)


def minus(denoiser):
    return replace(denoiser, network=lambda x, t: -denoiser.network(x, t))


WRONG = {
    "F of wrong sign": (lambda: minus(digits()), "its sign"),
    "v of wrong sign": (lambda: minus(KINDS["v"]), "its sign"),
    "eps taken for v": (lambda: replace(KINDS["epsilon"], prediction="v"), "from_epsilon"),
    "v taken for eps": (lambda: replace(KINDS["v"], prediction="epsilon"), "from_v"),
    "eps taken for x0": (lambda: replace(KINDS["epsilon"], prediction="x0"), "predict the clean sample, or the noise"),
    "velocity of wrong sign": (lambda: flow(lambda f: lambda x, t: -f(x, t)), "sign"),
    "velocity of wrong time": (lambda: flow(lambda f: lambda x, t: -f(x, 1 - t)), "network's time"),
    "velocity of wrong time and sign": (lambda: flow(lambda f: lambda x, t: f(x, 1 - t)), "time"),
    "alphas that are not cumulative": (lambda: not_cumulative(KINDS["epsilon"]), "cumulative products"),
    "sigma 19,250": (garbage_at_the_top, "Leave the last entries of the table out"),
    "D taken for F": (
        lambda: fs.Denoiser.from_edm(lambda z, s: digits()(z, s.clamp_min(1e-3))),
        "returns the denoised",
    ),
    "F taken for D": (lambda: replace(digits(), prediction="x0"), "moves"),
    "x0 taken for a score": (lambda: replace(KINDS["x0"], prediction="score"), "score"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_readings_are_refused(name):
    build, message = WRONG[name]
    denoiser = build()
    shape = (1, 8, 8) if "F " in name or name.endswith("F") else (16,)
    with pytest.raises(ValueError, match=message):
        fs.measure(denoiser, shape, levels=12, samples=1, progress=False)
    assert fs.measure(denoiser, shape, levels=12, samples=1, progress=False, checks=False).samples == 1


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("samples", [1, 8])
def test_paths_of_exact_denoisers_raise_no_doubt(name, samples):
    denoiser, shape = RIGHT[name]
    fs.measure(denoiser, shape, levels=16, samples=samples, responses=False, progress=False)


#: Where a path's own error, one path's chance, or a trained network's error is nearly all that is seen.
UNLUCKY = [
    *(("flow", 12, 8, seed) for seed in range(6)),
    *(("flow", 12, 1, seed) for seed in (85, 109, 121)),
    *(("digits_vp", 24, 1, seed) for seed in (5, 8, 17, 20, 26)),
    *(("patches", 12, 1, seed) for seed in (73, 112)),
]


@pytest.mark.parametrize(
    ("name", "levels", "samples", "seed"), [*((name, 16, 4, seed) for name in MODELS for seed in (0, 1)), *UNLUCKY]
)
def test_paths_of_the_benchmark_s_networks_raise_no_doubt(name, levels, samples, seed):
    model = MODELS[name]()
    fs.measure(model.denoiser, model.shape, levels=levels, samples=samples, seed=seed, responses=False, progress=False)


def in_its_place(kind, table):
    """The exact network of a table, read with another one."""
    denoiser = KINDS[kind]
    return replace(denoiser, process=replace(denoiser.process, alphas_cumprod=table(vp_table())))


def timed(kind, time):
    """The exact network, given another time."""
    denoiser = KINDS[kind]
    return replace(denoiser, network=lambda x, t: denoiser.network(x, time(t)))


#: Readings whose ends look like samples, and whose answers at single levels are those of some denoiser.
PLAUSIBLE = {
    "1 - alphas_cumprod, backwards": lambda: in_its_place("epsilon", lambda table: (1 - table).flip(0)),
    "alphas_cumprod of every second step": lambda: in_its_place("epsilon", lambda table: table[::2]),
    "sqrt(alphas_cumprod), v": lambda: replace(in_its_place("epsilon", torch.sqrt), prediction="v"),
    "constant time": lambda: timed("epsilon", lambda t: 0 * t + 500),
    "time of a flow in thousandths": lambda: timed("velocity", lambda t: (1000 * t).clamp_max(0.999)),
    "noise given to from_velocity": lambda: fs.Denoiser.from_velocity(
        lambda x, t: KINDS["epsilon"].network(x, 1000 * t.clamp_max(0.999))
    ),
    "squared level": lambda: timed("x0", torch.square),
    "constant level": lambda: timed("x0", lambda s: 0 * s + 1),
}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_plausible_wrong_readings_are_refused_or_warned_of(name):
    with pytest.raises((ValueError, UserWarning), match=r"its table of levels|checks=False"):
        fs.measure(PLAUSIBLE[name](), (16,), levels=24, samples=8, responses=False, progress=False)


SIGNED = ("v", "edm")


def measured_signs(oracle, d, levels, sign, seed=0):
    for kind in SIGNED:
        right = exact_denoisers(oracle)[kind]
        measure = lambda denoiser: fs.measure(
            denoiser, (d,), levels=levels, samples=1, seed=seed, responses=False, progress=False
        )
        if sign > 0:
            measure(right)
        else:
            with pytest.raises(ValueError, match="its sign"):
                measure(minus(right))


@pytest.mark.parametrize("levels", [8, 12, 24])
@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_signs_are_refused_with_few_levels_and_elements(levels, seed):
    """D' = 2 a z - D is nearly a denoiser itself where data are alike in all directions; those of a mixture are not."""
    for d in (16, 64) if levels < 12 else (8, 16, 64):
        measured_signs(fs.oracles.GaussianMixture.random(d, 3, seed=1), d, levels, -1, seed)


@pytest.mark.parametrize("levels", [6, 8, 16])
def test_right_signs_pass_where_the_paths_of_few_levels_miss_thin_data(levels):
    for d in (4, 8, 16, 32):
        measured_signs(fs.oracles.GaussianMixture.random(d, 8, seed=d, std=0.05), d, levels, 1)


def guided(scale):
    """Towards two of eight modes, as guidance does it, with a scale of 1 and more."""
    whole = fs.oracles.GaussianMixture.random(16, 8, seed=0)
    part = fs.oracles.GaussianMixture(torch.tensor([1.0, 2.0]), whole.means[:2], whole.covariances[:2])
    network = lambda z, s: whole.denoise(z, s) + scale * (part.denoise(z, s) - whole.denoise(z, s))
    return fs.Denoiser.from_denoiser(network, 0.02, 80.0)


def test_guidance_is_no_wrong_reading():
    for scale in (1.0, 1.5):
        fs.measure(guided(scale), (16,), levels=24, samples=8, responses=False, progress=False)
    with pytest.warns(UserWarning, match="guided by more than its data allow"):
        fs.measure(guided(3.0), (16,), levels=24, samples=8, responses=False, progress=False)
    edm = exact_denoisers(SimpleNamespace(denoise=guided(5.0).network, score=len))["edm"]
    with pytest.warns(UserWarning, match="does not move against it.*guided by more than its data allow"):
        fs.measure(edm, (16,), levels=24, samples=1, responses=False, progress=False)


def test_the_checks_are_counted_and_cost_less_than_one_percent_of_a_default_measurement():
    denoiser, calls = counted_denoiser(DATA, 0.01, 20.0)
    checked, plain = (
        fs.measure(denoiser, (16,), progress=False, checks=checks).model_calls for checks in (True, False)
    )
    assert sum(calls) == checked + plain
    assert checked - plain == 7 <= 0.01 * plain
    assert len(calls) == 6 + 94 + 1 + 94


def test_a_constant_answer_is_doubtful():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fs.fit(
            fs.Denoiser.from_denoiser(lambda z, s: 0 * z, 0.01, 20.0),
            (5,),
            4,
            "fitted",
            model_calls=100,
            progress=False,
        )
    assert len(said) == 1  # none of NumPy
    assert "the same to every question" in str(said[0].message)


def test_clean_samples_that_do_not_change_along_a_path_are_doubtful():
    flat = fs.Denoiser.from_denoiser(lambda z, s: z.sign(), 0.01, 20.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fs.measure(flat, (12,), levels=16, samples=4, progress=False)
    assert any("did not change from level to level" in str(each.message) for each in told)


@pytest.mark.parametrize(
    "answer",
    [lambda z: 1e-12 * z, lambda z: (1e-8 * z).half(), lambda z: 0.3 + 1e-9 * z],
    ids=["tiny", "16 bits", "near"],
)
def test_a_clean_sample_that_is_constant_but_for_next_to_nothing_is_doubtful(answer):
    flat = fs.Denoiser.from_denoiser(lambda z, s: answer(z), 0.02, 40.0)
    with pytest.warns(UserWarning, match="the same to every question"):
        fs.measure(flat, (16,), levels=12, progress=False)


def test_data_as_small_as_the_lowest_level_raise_no_doubt():
    for std in (0.02, 2e-3):
        check(fs.Denoiser.from_denoiser(fs.oracles.Gaussian(std, (16,)).denoise, std, 40.0))


def test_a_network_of_one_sample_at_a_time_is_measured_so():
    network = lambda z, s: z / (1 + float(s) ** 2)
    denoiser = fs.Denoiser.from_denoiser(network, 0.01, 20.0)
    options = {"levels": 12, "samples": 2, "progress": False}
    assert fs.measure(denoiser, (8,), batch_size=1, **options).samples == 2
    with pytest.raises(ValueError, match=r"failed when called with x \(2, 8\).*or give batch_size=1"):
        fs.measure(denoiser, (8,), **options)


@pytest.mark.parametrize(("data_at", "sign"), [(0, 1), (0, -1), (1, 1), (1, -1)])
def test_a_flow_is_asked_for_the_other_time_and_sign(data_at, sign):
    denoiser = fs.Denoiser.from_velocity(lambda x, t: -sign * x, data_at=data_at, sign=sign)
    asked = suspects(denoiser)
    assert f"(data_at={1 - data_at})" in asked
    assert f"(sign={-sign})" in asked


@pytest.mark.parametrize(
    ("make", "change", "asked"),
    [
        (fs.Denoiser.from_velocity, lambda t: t / 1000, "times within [0, 1], not 1000 times as large?"),
        (fs.Denoiser.from_vp_score, lambda t: t / 999, "the time (VP) unscaled?"),
    ],
)
def test_a_network_of_times_in_thousands_is_asked_for_its_times(make, change, asked):
    """As transformers of diffusers and score networks of PyTorch are."""
    oracle, flow = fs.oracles.GaussianMixture.random(16, 4, seed=0), make == fs.Denoiser.from_velocity

    def network(x, t):
        t = change(t.double()).clamp(1e-5, 1 - 1e-5)[:, None]
        alpha = 1 - t if flow else torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
        sigma = t if flow else (1 - alpha**2).sqrt()
        denoised = oracle.denoise(x / alpha, (sigma / alpha).flatten())
        return (x - denoised) / t if flow else (alpha * denoised - x) / sigma**2

    check(make(lambda x, t: network(x, t / change(1))), (16,))
    with pytest.raises((ValueError, UserWarning), match=re.escape(asked)):  # or a warning, which is an error here
        check(make(network), (16,))


def test_where_to_cut_a_table_is_said():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    levels = ((1 - table) / table).sqrt()
    n = int((levels <= 20).sum())
    denoiser = exact_denoisers(fs.oracles.Gaussian(0.2, (8,)), table)["epsilon"]
    wrong = replace(denoiser, network=lambda x, t: denoiser.network(x, t) + torch.where(t > 800, 0.7, 0.0)[:, None])
    with pytest.raises(ValueError, match=rf"alphas_cumprod\[:{n}\] ends at sigma {float(levels[n - 1]):.3g}\."):
        check(wrong, (8,))
    steep = vp_table(beta_max=28.0)
    n = int((((1 - steep) / steep).sqrt() <= 160).sum())
    v = exact_denoisers(DATA, steep)["v"]
    untrained = replace(v, network=lambda x, t: v.network(x, t) + torch.where(t > 800, 0.9, 0.0)[:, None] * x)
    with pytest.raises(ValueError, match=rf"its sign .*badly trained there\? .*alphas_cumprod\[:{n}\]"):
        check(untrained)


def test_a_continuous_process_is_cut_by_its_time():
    network = lambda x, t: -x / 2 - (x + 3 * torch.ones_like(x)) * (t > 0.5)[:, None]
    with pytest.warns(UserWarning, match="Choose a lower t_max") as caught:
        check(fs.Denoiser.from_vp_score(network))
    assert "alphas_cumprod" not in str(caught[0].message)


def test_an_untrained_noise_prediction_is_asked_whether_it_is_trained():
    with pytest.raises(ValueError, match=r"returns \d+% of it, as its outputs are near 0 \(is it trained\?\)"):
        check(fs.Denoiser.from_epsilon(lambda x, t: 0.01 * x.cos(), vp_table()))
    with pytest.raises(ValueError, match=r"returns \d+% of it: does the network predict v"):
        check(replace(KINDS["v"], prediction="epsilon"))
