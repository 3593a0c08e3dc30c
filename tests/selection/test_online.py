import copy
import math
import socket

import numpy as np
import pytest
import torch

import fastsched as fs
from fastsched.denoisers.level_grids import log_uniform
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


def test_costs_whose_sum_overflows_are_refused():
    adaptive = fs.AdaptiveSchedule([2.0, 1.0])
    adaptive.observe(torch.tensor([1e308], dtype=torch.float64))
    with pytest.raises(ValueError, match="costs must have finite sums"):
        adaptive.observe(torch.tensor([1e308], dtype=torch.float64))
    assert adaptive.update()


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


@pytest.mark.parametrize("levels", [[1e300, 1.0], [1.0, 1e-310]])
def test_levels_that_float32_cannot_hold_are_refused(levels):
    with pytest.raises(ValueError, match="s must be levels within 1e-30 and 1e\\+15"):
        fs.AdaptiveSchedule(levels)


def test_sums_of_another_shape_are_named():
    adaptive = fs.AdaptiveSchedule([8.0, 4.0, 2.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"sums and counts of 4 intervals, got shapes \(2, 2\) and \(4,\)"):
        adaptive.load_state_dict({**adaptive.state_dict(), "sums": torch.zeros(2, 2)})


def test_a_grid_that_is_set_is_checked_and_starts_anew():
    adaptive = fs.AdaptiveSchedule([4.0, 2.0, 1.0])
    adaptive.observe(torch.tensor([1.0, 3.0]))
    adaptive.s = [8.0, 4.0, 2.0, 1.0]
    assert math.isnan(adaptive.variation)
    adaptive.observe(torch.tensor([1.0, 1.0, 1.0]))
    assert adaptive.update()
    assert adaptive.s.tolist() == pytest.approx([8.0, 4.0, 2.0, 1.0])
    for name, value in (("s", [1.0, 2.0]), ("s", [2.0, 0.0]), ("s", [1e200, 1.0]), ("rate", 1.5), ("order", 2.5)):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
            setattr(adaptive, name, value)
    assert adaptive.s.tolist() == pytest.approx([8.0, 4.0, 2.0, 1.0])
