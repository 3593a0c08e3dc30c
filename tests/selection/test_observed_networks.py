"""What networks may do, and what they must not, where `AdaptiveSchedule.observe_denoiser` calls them."""

import warnings

import pytest
import torch
from models import exact_denoisers, vp_table
from test_online import _gaussian, _start

import fastsched as fs
from fastsched.denoisers.level_grids import log_uniform


class _Dropping(torch.nn.Module):
    """The exact denoiser, whose output is dropped at random in training mode, by a layer or by a function."""

    def __init__(self, layer):
        super().__init__()
        self.layer = torch.nn.Dropout(0.1) if layer else None

    def forward(self, z, s):
        x0 = _gaussian().denoise(z, s)
        return torch.nn.functional.dropout(x0, 0.1, self.training) if self.layer is None else self.layer(x0)


def test_a_network_that_writes_into_its_input_gives_the_same_costs():
    own, writing = fs.AdaptiveSchedule(_start()), fs.AdaptiveSchedule(_start())
    denoise, clean = _gaussian().denoise, torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    own.observe_denoiser(denoise, clean, generator=torch.Generator().manual_seed(1))
    spoiled = lambda z, s: (denoise(z, s), z.zero_())[0]
    writing.observe_denoiser(spoiled, clean, generator=torch.Generator().manual_seed(1))
    assert torch.equal(own.state_dict()["sums"], writing.state_dict()["sums"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_in_16_bits_give_the_costs_of_float32(dtype):
    clean, denoise = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).to(dtype), _gaussian().denoise
    costs = []
    for data in (clean.float(), clean):
        adaptive, asked = fs.AdaptiveSchedule(_start(33)), []
        answer = lambda z, s, asked=asked: (asked.append(z.dtype), denoise(z.float(), s))[1]
        adaptive.observe_denoiser(answer, data, generator=torch.Generator().manual_seed(1))
        assert set(asked) == {data.dtype}  # as the network is trained
        costs.append(adaptive.state_dict()["sums"])
    torch.testing.assert_close(*costs, rtol=0.05, atol=1e-3 * float(costs[0].max()))


@pytest.mark.parametrize("shared", [lambda s: s[0], lambda s: s.mean()], ids=["first", "mean"])
def test_one_level_for_the_whole_batch_is_noticed(shared):
    oracle = _gaussian()
    denoise = lambda z, s: oracle.denoise(z, shared(s).expand(len(z)))
    for seed in range(40):  # whichever intervals are drawn
        adaptive, generator = fs.AdaptiveSchedule(_start()), torch.Generator().manual_seed(seed)
        with pytest.warns(UserWarning, match="denoise must use the level of each sample"):
            adaptive.observe_denoiser(denoise, oracle.sample(8, seed=0), generator=generator)


def test_conditions_of_each_sample_give_no_warning_about_levels():
    oracle, labels = _gaussian(), torch.arange(8.0)[:, None]
    asked = []
    bound = lambda z, s: (asked.append(len(z)), oracle.denoise(z, s) + labels[: len(z)])[1]
    adaptive = fs.AdaptiveSchedule(_start())
    for _ in range(2):
        adaptive.observe_denoiser(bound, oracle.sample(8, seed=0))  # warnings are errors in tests
    assert asked == [8] * 5  # a third call the first time only
    fs.AdaptiveSchedule(_start()).observe_denoiser(bound, oracle.sample(1, seed=0))
    assert asked[5:] == [1, 1]


@pytest.mark.parametrize(
    ("denoise", "error"),
    [(lambda z, s: z[:, :1], ValueError), (lambda z, s: z[:1], ValueError), (lambda z, s: z.numpy(), TypeError)],
    ids=["a column", "a row", "numpy"],
)
def test_answers_of_another_kind_are_refused(denoise, error):
    with pytest.raises(error, match="the network returned"):
        fs.AdaptiveSchedule(_start()).observe_denoiser(denoise, torch.zeros(4, 16))


@pytest.mark.parametrize(
    ("denoise", "clean", "message"),
    [
        (lambda z, s: z * torch.nan, torch.ones(4, 2), r"^denoise returned NaN or inf, first at s = [124]00; skip"),
        (lambda z, s: z, torch.full((4, 2), torch.inf), "^clean must be finite"),
        (lambda z, s: z, torch.full((4, 2), 65504.0).half(), "^clean must be of a size that torch.float16"),
        (lambda z, s: z * 1e30, torch.ones(4, 2, dtype=torch.float64) * 1e150, "^denoise returned numbers so large"),
    ],
    ids=["answer", "data", "states", "squares"],
)
def test_the_cause_of_an_infinite_cost_is_named(denoise, clean, message):
    adaptive = fs.AdaptiveSchedule([400.0, 200.0, 100.0])
    with pytest.raises(ValueError, match=message):
        adaptive.observe_denoiser(denoise, clean, generator=torch.Generator().manual_seed(0))
    assert not adaptive.update()


def test_a_network_may_return_one_buffer_every_time():
    buffer, costs = torch.empty(64, 5), []
    clean = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    answer = lambda z, s: z / (1 + s.reshape(-1, 1) ** 2)
    for denoise in (answer, lambda z, s: buffer.copy_(answer(z, s))):
        adaptive = fs.AdaptiveSchedule(_start())
        adaptive.observe_denoiser(denoise, clean, generator=torch.Generator().manual_seed(2))
        costs.append(adaptive.state_dict()["sums"])
    torch.testing.assert_close(*costs)


@pytest.mark.parametrize("wrapped", [True, False], ids=["denoiser-object", "network"])
@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
def test_a_network_that_is_random_in_training_mode_is_warned_of(layer, wrapped):
    network, adaptive = _Dropping(layer), fs.AdaptiveSchedule(_start())
    denoise = fs.Denoiser.from_denoiser(network, 0.05, 20.0) if wrapped else network
    with pytest.warns(UserWarning, match=r"in training mode, and draws random numbers .* call eval\(\)"):
        adaptive.observe_denoiser(denoise, _gaussian().sample(64, seed=0))
    network.eval()
    adaptive.observe_denoiser(denoise, _gaussian().sample(64, seed=0))  # warnings are errors in tests
    without = torch.nn.Linear(16, 16).train()
    adaptive.observe_denoiser(lambda z, s: without(z), _gaussian().sample(64, seed=0))


def test_a_function_that_is_random_is_warned_of_and_not_of_levels():
    dropped = lambda z, s: torch.nn.functional.dropout(_gaussian().denoise(z, s), 0.5)
    with pytest.warns(UserWarning, match="the network draws random numbers: .* counted as cost") as told:
        fs.AdaptiveSchedule(_start()).observe_denoiser(dropped, _gaussian().sample(8, seed=0))
    assert len(told) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clean_samples_that_were_rounded_are_warned_of(dtype):
    oracle, generator = _gaussian(), torch.Generator().manual_seed(0)
    rounded = lambda z, s: oracle.denoise(z, s).to(dtype)
    combined = lambda z, s: z - s[:, None] * ((z - oracle.denoise(z, s)) / s[:, None]).to(dtype)  # as epsilon
    for denoise, harmful in ((oracle.denoise, False), (combined, False), (rounded, True)):
        for given in (denoise, fs.Denoiser.from_denoiser(denoise, 0.002, 80.0)):
            adaptive = fs.AdaptiveSchedule(log_uniform(80.0, 0.002, 33))
            adaptive.observe_denoiser(given, oracle.sample(256, seed=0), generator=generator)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert adaptive.update()
                adaptive.observe(torch.ones(32))  # what was rounded before the update counts no longer
                assert adaptive.update()
            assert len(said) == harmful


def test_a_network_of_integer_timesteps_is_observed_at_levels_that_it_knows():
    continuous = exact_denoisers(_gaussian(), vp_table(20))["epsilon"]  # 20 timesteps, a factor of 1.6 apart on average
    integer = fs.Denoiser.from_epsilon(
        lambda x, t: continuous.network(x, t.float()), vp_table(20), integer_timesteps=True
    )
    between = fs.baselines.exponential(5, 0.11, 90.0)[:-1]
    costs = []
    for denoiser, s in ((integer, between), (continuous, integer.process.nearest(between))):
        adaptive = fs.AdaptiveSchedule(s)
        adaptive.observe_denoiser(denoiser, _gaussian().sample(64, seed=1), generator=torch.Generator().manual_seed(0))
        costs.append(adaptive.state_dict()["sums"])
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-4, atol=0.0)


def _observed(denoise, clean):
    """Observe with a fixed generator; returns the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adaptive = fs.AdaptiveSchedule(_start())
        for seed in range(2):
            adaptive.observe_denoiser(denoise, clean, generator=torch.Generator().manual_seed(seed))
    return [str(each.message) for each in told]


@pytest.mark.parametrize("std", [1e-3, 0.1, 1.0, 2.0, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("batch", [8, 64])
def test_predictions_of_the_noise_or_the_score_are_no_samples(std, batch):
    """The costs that follow from them are those of no denoiser. A denoiser may come near its noise at one level."""
    oracle = fs.oracles.Gaussian(std, (16,))
    clean = oracle.sample(batch, seed=0, dtype=torch.float32)
    column = lambda s: s[:, None]
    assert not _observed(oracle.denoise, clean)
    assert not _observed(lambda z, s: 0.0 * z, clean)  # not trained yet
    if std < 1 or (std == 1 and batch == 64):  # the levels reach 20; few samples may miss the higher ones
        found = _observed(lambda z, s: (z - oracle.denoise(z, s)) / column(s), clean)
        assert [each.partition(", and")[0] for each in found] == [
            "denoise must return x0, but its answers are nearly the noise"
        ]
        assert "nearly the score" in " ".join(_observed(lambda z, s: oracle.score(z, s), clean))


def test_methods_of_a_denoiser_are_not_taken_for_it():
    """They take states of another scale."""
    denoiser = exact_denoisers(_gaussian())["x0"]
    adaptive, clean = fs.AdaptiveSchedule(_start()), torch.zeros(8, 16)
    for method in (denoiser.denoise, denoiser.raw_output):
        with pytest.raises(TypeError, match="denoise must be the Denoiser itself"):
            adaptive.observe_denoiser(method, clean)
    assert adaptive.observe_denoiser(denoiser.__call__, clean) > 0
