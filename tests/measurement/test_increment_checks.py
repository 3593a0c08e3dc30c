"""Networks whose outputs jump from level to level, at low levels alone."""

import pytest
import torch
from models import exact_denoisers, vp_table
from test_network_checks import DATA, KINDS

import fastsched as fs
from benchmarks.quality.models import MODELS
from fastsched.measurement.checks.increments import FOURTH, ROUGH, WINDOW, _cosines


def drawn(generator, like, s, below):
    """Noise from a network's own generator, at levels below one."""
    return torch.randn(like.shape, generator=generator) * (s < below).reshape(-1, 1)


@pytest.mark.filterwarnings("ignore:(at level|when noise)")
@pytest.mark.parametrize("levels", [24, 48])
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_numbers_from_a_generator_of_its_own_at_low_levels_are_refused(levels, size):
    generator = torch.Generator().manual_seed(0)
    noisy = lambda z, s: DATA.denoise(z, s) + size * drawn(generator, z, s, 0.3)
    with pytest.raises(ValueError, match="different outputs for the same input around level 0"):
        fs.measure(fs.Denoiser.from_denoiser(noisy, 0.02, 40.0), (16,), levels=levels, samples=4, progress=False)
    fs.measure(fs.Denoiser.from_denoiser(noisy, 0.02, 40.0), (16,), levels=8, samples=1, checks=False, progress=False)


@pytest.mark.parametrize("name", [*MODELS, *KINDS])
def test_increments_of_right_networks_are_smooth(name):
    model = MODELS[name]() if name in MODELS else None
    denoiser, shape = (KINDS[name], (16,)) if model is None else (model.denoiser, model.shape)
    stats = fs.measure(denoiser, shape, samples=2, progress=False)
    assert stats.model_calls <= 2 * 94 + 7  # so no question more
    assert float(_cosines(stats.gram).unfold(0, WINDOW, 1).mean(1).min()) > 2 * ROUGH


def test_networks_of_integer_timesteps_may_be_rough():
    """An error of its own at each timestep, as from an embedding of each: no question more, and no refusal."""
    generator, table = torch.Generator().manual_seed(0), vp_table(1000)
    errors = 0.05 * torch.randn(1000, 16, generator=generator)
    exact = exact_denoisers(DATA, table)["epsilon"].network
    rough = lambda x, t: exact(x, t.float()) + errors[t]
    denoiser = fs.Denoiser.from_epsilon(rough, table, integer_timesteps=True)
    stats = fs.measure(denoiser, (16,), samples=2, progress=False)
    assert float(_cosines(stats.gram).unfold(0, WINDOW, 1).mean(1).min()) < ROUGH
    assert stats.model_calls <= 2 * 94 + 7


class Off:
    """Answers as the exact denoiser but for some of its calls."""

    def __init__(self, which, answer):
        self.which, self.answer, self.calls, self.last = which, answer, 0, None

    def __call__(self, z, s):
        self.calls += 1
        own = DATA.denoise(z, s)
        if self.which(self.calls) and self.last is not None and self.last.shape == own.shape:
            own = self.answer(own, self.last)
        self.last = own.clone()
        return own


# other checks notice some of these networks too
@pytest.mark.filterwarnings("ignore:(at level .* the (denoised|network's outputs)|when noise)")
@pytest.mark.parametrize("answer", [lambda own, last: last, lambda own, last: 0.97 * own], ids=["earlier", "smaller"])
@pytest.mark.parametrize("which", [lambda n: n % 16 == 0, lambda n: n % 21 == 0, lambda n: n == 35])
def test_a_wrong_output_at_one_level_is_warned_of(which, answer):
    denoiser = fs.Denoiser.from_denoiser(Off(which, answer), 0.02, 40.0)
    with pytest.warns(UserWarning, match="may keep a state between its calls"):
        fs.measure(denoiser, (16,), samples=2, progress=False)


@pytest.mark.filterwarnings("ignore:(at level .* the network's outputs|when noise)")
@pytest.mark.parametrize("kept", [1.0, 0.5], ids=["wholly", "by half"])
@pytest.mark.parametrize("levels", [24, 48])
@pytest.mark.parametrize("odd", [0, 1])
def test_networks_that_keep_each_output_for_the_next_call_are_refused(kept, levels, odd):
    """No repeated call of the other checks shows it if an even number of calls is between the two."""
    denoiser = fs.Denoiser.from_denoiser(
        Off(lambda n: n % 2 == odd, lambda own, last: kept * last + (1 - kept) * own), 0.02, 40.0
    )
    with pytest.raises(ValueError, match=r"keeps a state|same output for different states|mixes the samples"):
        fs.measure(denoiser, (16,), levels=levels, samples=4, progress=False)


@pytest.mark.filterwarnings("ignore:(at level .* the network's outputs|when noise)")
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", ["epsilon", "velocity"])
def test_networks_that_reuse_outputs_while_their_input_changes_little_are_refused(name, batch_size):
    exact = KINDS[name]
    kept = {}

    def network(x, t):
        if kept and kept["x"].shape == x.shape and float((x - kept["x"]).norm()) < 0.1 * float(kept["x"].norm()):
            return kept["output"]
        kept.update(x=x.clone(), output=exact.network(x, t))
        return kept["output"]

    measure = lambda used: fs.measure(
        fs.Denoiser(used, exact.process, exact.prediction), (16,), samples=4, batch_size=batch_size, progress=False
    )
    assert measure(exact.network).model_calls == 4 * 94 + 7
    with pytest.raises(ValueError, match="keeps a state"):
        measure(network)


def test_errors_of_the_network_at_one_level_are_not_warned_of():
    """An error of its own at one timestep, whenever it is asked."""
    exact, table = exact_denoisers(DATA, vp_table(1000))["epsilon"].network, vp_table(1000)
    known = fs.Denoiser.from_epsilon(exact, table)
    off = float(known.process.timestep(known.levels(48)[20]))
    rough = lambda x, t: exact(x, t) * (1 + 0.05 * ((t - off).abs() < 1e-3)).reshape(-1, 1)
    denoiser = fs.Denoiser.from_epsilon(rough, table)
    stats = fs.measure(denoiser, (16,), samples=2, progress=False)
    assert stats.model_calls == 2 * 94 + 7 + 2 * len(FOURTH)


def test_errors_of_the_network_in_one_path_are_not_warned_of():
    """At one timestep the network fails in a region that one of eight paths is in, as small trained networks do."""
    exact, table = exact_denoisers(DATA, vp_table(1000))["epsilon"].network, vp_table(1000)
    known, inside = fs.Denoiser.from_epsilon(exact, table), []
    off = float(known.process.timestep(known.levels(48)[20]))

    def network(x, t):
        fails = ((t - off).abs() < 1e-3) & (x[:, 0] > 1.8)
        inside.append(int(fails.sum()))
        return exact(x, t) + 3.0 * fails.reshape(-1, 1)

    fs.measure(fs.Denoiser.from_epsilon(network, table), (16,), samples=8, progress=False)
    assert max(inside) == 1
