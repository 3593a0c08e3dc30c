import copy
import socket
import warnings

import numpy as np
import pytest
import torch
from models import exact_denoisers, vp_table

import fastsched as fs
from fastsched.denoisers.noise import log_uniform
from fastsched.selection.arc_length import equal_arc_length

STD = 0.5


def _gaussian(d=16):
    return fs.oracles.Gaussian(STD, (d,))


def _start(n=17):
    return log_uniform(20.0, 0.05, n)


def _exact_costs(s, d=16):
    return s[:-1] ** 2 * _gaussian(d).stein_corrector(s[:-1], s[1:])


def _spread(s):
    costs = _exact_costs(s)
    return float(costs.std(correction=0) / costs.mean())


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_an_update_goes_as_far_as_the_rate_towards_algorithm_1(rate):
    adaptive = fs.AdaptiveSchedule(_start(), rate=rate)
    costs = _exact_costs(_start())
    adaptive.observe(costs)
    assert adaptive.update()
    target = equal_arc_length(_start(), costs.sqrt(), 17)
    expected = (rate * target.log() + (1 - rate) * _start().log()).exp()
    torch.testing.assert_close(adaptive.s, expected, rtol=1e-12, atol=0.0)


def test_repr_shows_the_grid_and_the_updates():
    adaptive = fs.AdaptiveSchedule(_start())
    assert repr(adaptive) == "AdaptiveSchedule(17 levels from 20 to 0.05, order=2, 0 updates)"
    adaptive.observe(_exact_costs(_start()))
    adaptive.update()
    assert "1 updates" in repr(adaptive)


@pytest.mark.parametrize("exact", [True, False], ids=["denoiser-object", "function"])
def test_converges_to_equal_costs_from_batches(exact):
    oracle = _gaussian()
    denoise = fs.Denoiser.from_denoiser(oracle.denoise, 0.05, 20.0) if exact else oracle.denoise
    adaptive = fs.AdaptiveSchedule(_start(), rate=0.1)
    generator = torch.Generator().manual_seed(0)
    for batch in range(200):
        clean = oracle.sample(64, seed=batch)
        assert adaptive.observe_denoiser(denoise, clean, generator=generator) == (128 if batch else 192)
        assert adaptive.update()
    # An interval has 4 samples a batch and an update remembers about 2 / rate = 20 of them: 80 squares of 16 elements
    # leave sqrt(2 / 1280) = 4% of noise in a cost, and as much again where its neighbours pull on it.
    assert _spread(_start()) > 0.8
    assert _spread(adaptive.s) < 0.12
    assert adaptive.updates == 200
    assert adaptive.s[0] == 20.0
    assert float(adaptive.s[-1]) == pytest.approx(0.05)


def test_micro_batches_add_up():
    whole, parts = (fs.AdaptiveSchedule(_start(), rate=0.5) for _ in range(2))
    costs = torch.rand(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = torch.arange(48) % 16
    whole.observe(costs, intervals)
    for rows in range(0, 48, 8):
        parts.observe(costs[rows : rows + 8], intervals[rows : rows + 8])
    assert parts.variation == pytest.approx(whole.variation)
    assert whole.update()
    assert parts.update()
    torch.testing.assert_close(parts.s, whole.s)


def test_waits_until_every_interval_was_seen():
    adaptive = fs.AdaptiveSchedule(_start(4))
    adaptive.observe(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]))
    assert not adaptive.update()
    assert torch.equal(adaptive.s, fs.AdaptiveSchedule(_start(4)).s)
    adaptive.observe(torch.tensor([3.0]), torch.tensor([1]))
    assert adaptive.update()


def test_state_dict_goes_on_where_it_stopped(tmp_path):
    first = fs.AdaptiveSchedule(_start(), rate=0.3)
    first.observe(_exact_costs(_start()))
    first.update()
    first.observe(torch.ones(3), torch.tensor([1, 2, 3]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fs.AdaptiveSchedule(_start(5))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for schedule in (first, second):
        schedule.observe(torch.arange(16.0))
        schedule.update()
    assert torch.equal(first.s, second.s)
    assert (second.updates, second.rate) == (2, 0.3)
    assert torch.equal(copy.deepcopy(first).state_dict()["s"], first.s)
    with pytest.raises(ValueError, match="state lacks the entry 'rate'"):
        second.load_state_dict({"s": _start()})


def test_draws_follow_the_schedule_and_its_density():
    adaptive = fs.AdaptiveSchedule([10.0, 4.0, 3.9, 0.1])
    drawn = adaptive.draw(60_000, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    counts = torch.histc(drawn.log(), bins=1, min=float(torch.tensor(3.9).log()), max=float(torch.tensor(4.0).log()))
    # A third of 60,000: binomial deviation 115.
    assert float(counts) == pytest.approx(20_000, abs=4 * 115)
    grid = torch.linspace(-2.3025, 2.3025, 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(adaptive.density(grid.exp()), grid)) == pytest.approx(1.0, abs=2e-3)
    assert adaptive.density(torch.tensor([11.0, 0.05])).tolist() == [0.0, 0.0]


def _rank(rank, port, results):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    adaptive = fs.AdaptiveSchedule(_start(), rate=0.5)
    half = torch.arange(rank * 8, rank * 8 + 8)  # each rank sees half of the intervals
    moved = []
    for _ in range(3):
        adaptive.observe(_exact_costs(adaptive.s)[half], half)
        moved.append(adaptive.update())
    alike = copy.deepcopy(fs.AdaptiveSchedule(_start(), group=torch.distributed.group.WORLD)).group
    said = []
    for levels, rate in ((17 + rank, 0.5), (17, 0.5 + rank / 4), (17, 0.5)):
        other = fs.AdaptiveSchedule(_start(levels), rate=rate)
        if (levels, rate) == (17, 0.5) and rank == 0:
            other.load_state_dict(adaptive.state_dict())  # on one rank alone
        other.observe(torch.ones(len(other.s) - 1))
        try:
            other.update()
        except ValueError as error:
            said.append(str(error)[:38])
    results.put((rank, moved, adaptive.s.tolist(), said, alike is torch.distributed.group.WORLD))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without distributed")
def test_ranks_share_their_observations():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    outcomes = sorted(results.get() for _ in processes)
    alone = fs.AdaptiveSchedule(_start(), rate=0.5)
    for _ in range(3):
        alone.observe(_exact_costs(alone.s))
        alone.update()
    for _, moved, s, said, same_group in outcomes:
        assert moved == [True] * 3
        assert s == alone.s.tolist()
        assert said == ["the grid, rate and order of an Adaptiv"] * 3  # of other length, rate, or loaded by one alone
        assert same_group


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fs.AdaptiveSchedule([1.0, 2.0]), "s must strictly descend"),
        (lambda: fs.AdaptiveSchedule([1.0, 0.0]), r"s must be levels above 0 .* got 1 to 0; .* by s\[:-1\]"),
        (lambda: fs.AdaptiveSchedule([torch.inf, 1.0]), "s must be levels above 0 .* got inf to 1$"),
        (lambda: fs.AdaptiveSchedule([2.0, 1.0], rate=0.0), "rate must be within"),
        (lambda: fs.AdaptiveSchedule([2.0, 1.0]).observe(torch.ones(2)), "costs must have one value"),
        (lambda: fs.AdaptiveSchedule([2.0, 1.0]).observe(torch.tensor([torch.nan])), "costs must be finite"),
        (lambda: fs.AdaptiveSchedule([2.0, 1.0]).observe(torch.ones(1), torch.tensor([1])), "intervals must be"),
        (lambda: fs.AdaptiveSchedule([2.0, 1.0]).draw(0), "n must be at least 1"),
    ],
    ids=["rising", "zero", "infinite", "rate", "count", "nan", "interval", "draw"],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


def test_conditions_of_each_sample_and_noisy_networks_give_no_warning_about_levels():
    oracle, labels = _gaussian(), torch.arange(8.0)[:, None]
    asked = []
    bound = lambda z, s: (asked.append(len(z)), oracle.denoise(z, s) + labels[: len(z)])[1]
    dropped = lambda z, s: torch.nn.functional.dropout(oracle.denoise(z, s), 0.5)
    for denoise in (bound, dropped):
        adaptive = fs.AdaptiveSchedule(_start())
        for _ in range(2):
            adaptive.observe_denoiser(denoise, oracle.sample(8, seed=0))  # warnings are errors in tests
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
    ("changed", "error"),
    [
        ({"sums": None}, TypeError),
        ({"updates": "x"}, TypeError),
        ({"counts": torch.full((16,), torch.nan)}, ValueError),
        ({"counts": torch.full((16,), -1.0)}, ValueError),
        ({"sums": torch.full((16,), torch.inf)}, ValueError),
        ({"sums": torch.zeros(3)}, ValueError),
        ({"sums": torch.ones(16)}, ValueError),
    ],
)
def test_damaged_states_are_refused(changed, error):
    adaptive = fs.AdaptiveSchedule(_start())
    with pytest.raises(error, match="state"):
        adaptive.load_state_dict({**adaptive.state_dict(), **changed})


@pytest.mark.parametrize("shape", [(0,), (0, 16), ()])
def test_a_batch_without_samples_is_refused(shape):
    adaptive = fs.AdaptiveSchedule(_start())
    with pytest.raises(ValueError, match="clean must hold at least one sample"):
        adaptive.observe_denoiser(_gaussian().denoise, torch.zeros(shape))


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


def test_costs_whose_sum_overflows_are_refused():
    adaptive = fs.AdaptiveSchedule([2.0, 1.0])
    adaptive.observe(torch.tensor([1e308], dtype=torch.float64))
    with pytest.raises(ValueError, match="costs must have finite sums"):
        adaptive.observe(torch.tensor([1e308], dtype=torch.float64))
    assert adaptive.update()


def test_a_network_may_return_one_buffer_every_time():
    buffer, costs = torch.empty(64, 5), []
    clean = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    answer = lambda z, s: z / (1 + s.reshape(-1, 1) ** 2)
    for denoise in (answer, lambda z, s: buffer.copy_(answer(z, s))):
        adaptive = fs.AdaptiveSchedule(_start())
        adaptive.observe_denoiser(denoise, clean, generator=torch.Generator().manual_seed(2))
        costs.append(adaptive.state_dict()["sums"])
    torch.testing.assert_close(*costs)


def test_levels_never_meet():
    adaptive = fs.AdaptiveSchedule(_start(9), rate=1.0)
    costs = torch.full((8,), 1e-12, dtype=torch.float64)
    costs[3] = 1.0
    moved = []
    for _ in range(300):
        adaptive.observe(costs)
        moved.append(adaptive.update())
        assert bool((adaptive.s[1:] < adaptive.s[:-1]).all())
    assert moved[0]
    assert not moved[-1]


@pytest.mark.parametrize("flat", [slice(0, 4), slice(4, 8), slice(2, 5)])
def test_intervals_without_cost_get_no_inner_levels(flat):
    s = torch.logspace(2, -2, 9, dtype=torch.float64)
    lengths = torch.ones(8, dtype=torch.float64)
    lengths[flat] = 0.0
    found = equal_arc_length(s, lengths, 9)
    first, last = s[flat.start], s[flat.stop]
    inside = ((found < 0.999 * first) & (found > 1.001 * last))[1:-1]
    assert not bool(inside.any())


@pytest.mark.parametrize("loaded", [False, True])
def test_a_schedule_observed_in_inference_mode_is_updated_outside_of_it(loaded):
    with torch.inference_mode():
        adaptive = fs.AdaptiveSchedule([10.0, 1.0, 0.1])
        adaptive.observe(torch.tensor([1.0, 3.0]))
        if loaded:
            adaptive.load_state_dict(adaptive.state_dict())
    adaptive.observe(torch.tensor([1.0, 3.0]))
    assert adaptive.update()
    with torch.inference_mode():
        adaptive.observe(torch.tensor([2.0, 2.0]))
        assert adaptive.update()
    adaptive.observe(torch.tensor([2.0, 2.0]))
    assert adaptive.update()


@pytest.mark.parametrize("order", [np.int64(4), torch.tensor(4)])
def test_the_state_holds_plain_numbers_that_load_as_weights_do(order, tmp_path):
    adaptive = fs.AdaptiveSchedule([4.0, 2.0, 1.0], rate=np.float32(0.5), order=order)
    torch.save(adaptive.state_dict(), tmp_path / "state.pt")
    resumed = fs.AdaptiveSchedule([2.0, 1.0])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (resumed.order, resumed.rate) == (4, 0.5)
    assert type(adaptive.order) is int


class _Dropping(torch.nn.Module):
    """The exact denoiser, whose output is dropped at random in training mode, by a layer or by a function."""

    def __init__(self, layer):
        super().__init__()
        self.layer = torch.nn.Dropout(0.1) if layer else None

    def forward(self, z, s):
        x0 = _gaussian().denoise(z, s)
        return torch.nn.functional.dropout(x0, 0.1, self.training) if self.layer is None else self.layer(x0)


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


@pytest.mark.parametrize("levels", [[1e300, 1.0], [1.0, 1e-310]])
def test_levels_that_float32_cannot_hold_are_refused(levels):
    with pytest.raises(ValueError, match="s must be levels within 1e-30 and 1e\\+15"):
        fs.AdaptiveSchedule(levels)


def test_sums_of_another_shape_are_named():
    adaptive = fs.AdaptiveSchedule([8.0, 4.0, 2.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"sums and counts of 4 intervals, got shapes \(2, 2\) and \(4,\)"):
        adaptive.load_state_dict({**adaptive.state_dict(), "sums": torch.zeros(2, 2)})
