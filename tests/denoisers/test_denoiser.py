import pytest
import torch
from models import exact_denoisers, mixture, vp_table

import fastsched as fs

ORACLE = mixture(d=4)
KINDS = exact_denoisers(ORACLE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_exact_denoiser(kind):
    denoiser = KINDS[kind]
    s = denoiser.levels(12)
    s = s[s.isfinite()]
    z = s[:, None] * torch.randn(len(s), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = ORACLE.denoise(z, s)
    # the network is told its timestep or c_noise in float64 for float64 states; interpolated levels agree to 1e-9
    torch.testing.assert_close(denoiser(z, s), exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_recombine_the_raw_output(kind):
    denoiser = KINDS[kind]
    s = torch.tensor([0.7], dtype=torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, c = denoiser.coefficients(s)
    alpha = denoiser.process.alpha(s)
    recombined = a * x + c * denoiser.raw_output(x, s)
    torch.testing.assert_close(recombined, ORACLE.denoise(x / alpha, s), rtol=1e-7, atol=1e-7)


def test_denoiser_reads_pure_noise():
    y = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at_noise = KINDS["velocity"].denoise(y, float("inf"))
    mean = (ORACLE.weights[:, None] * ORACLE.means).sum(0).double()
    torch.testing.assert_close(at_noise, mean.expand(3, 4), rtol=1e-5, atol=1e-5)


def test_parameters_that_are_kept_in_8_bits_do_not_say_what_a_network_computes_in():
    """As those of layerwise casting, beside which norms stay as they are."""
    kept = torch.nn.Linear(3, 3).to(torch.float8_e4m3fn)
    computing = torch.nn.LayerNorm(3).to(torch.bfloat16)
    of = lambda *layers: fs.Denoiser.from_denoiser(torch.nn.Sequential(*layers), 0.1, 10.0).dtype
    assert (of(kept, computing), of(kept), of(computing)) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_get_their_dtype_and_a_wide_condition(dtype):
    seen = {}

    def network(x, t):
        seen.update(x=x.dtype, t=t.dtype)
        return torch.zeros_like(x)

    fs.Denoiser.from_epsilon(network, vp_table()).denoise(torch.zeros(2, 3), 1.0, dtype=dtype)
    assert seen == {"x": dtype, "t": torch.float32}


def test_integer_networks_get_integers():
    seen = []

    def network(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    fs.Denoiser.from_epsilon(network, vp_table(), integer_timesteps=True).denoise(torch.zeros(2, 3), 1.0)
    assert seen[0].dtype == torch.int64


def test_wrong_output_shape_is_named():
    doubled = fs.Denoiser.from_denoiser(lambda z, s: torch.cat([z, z], 1), 0.1, 1.0)
    with pytest.raises(ValueError, match=r"shape \(2, 6\) for a state of shape \(2, 3\); .*variance"):
        doubled(torch.zeros(2, 3), 0.5)


def test_output_that_is_no_tensor_is_named():
    wrapped = fs.Denoiser.from_denoiser(lambda z, s: (z,), 0.1, 1.0)
    with pytest.raises(TypeError, match="returned tuple"):
        wrapped(torch.zeros(2, 3), 0.5)


def test_network_must_be_callable():
    with pytest.raises(TypeError, match="fn must be a function"):
        fs.Denoiser.from_denoiser(3, 0.1, 1.0)


def test_epsilon_of_zero_terminal_snr_is_refused():
    table = torch.cat([vp_table()[:-1], torch.zeros(1)])
    with pytest.raises(ValueError, match="zero terminal SNR"):
        fs.Denoiser.from_epsilon(lambda x, t: x, table)
    assert fs.Denoiser.from_v(lambda x, t: x, table).process.s_max == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma_min": 0, "sigma_max": 1}, "sigma_min must be positive"), ({"sigma_max": float("nan")}, "sigma_max"),
     ({"sigma_data": 0}, "sigma_data must be positive"), ({"sigma_data": -1}, "sigma_data must be positive")],
)  # fmt: skip
def test_edm_settings_given_are_checked_not_replaced(options, message):
    with pytest.raises(ValueError, match=message):
        fs.Denoiser.from_edm(lambda x, c_noise: x, **options)


def test_nan_of_an_integer_network_is_named():
    broken = fs.Denoiser.from_epsilon(lambda x, t: x * float("nan"), vp_table(), integer_timesteps=True)
    with pytest.raises(ValueError, match=r"NaN or inf at sigma = .*\(timestep 999\)"):
        fs.measure(broken, (4,), levels=12, progress=False)


def test_a_subclass_that_answers_by_itself_is_asked():
    """Measurement, checks and sampling ask it, whoever copies the answer."""
    asked = []

    class Counted(fs.Denoiser):
        def raw_output(self, x, s, *, dtype=None):
            asked.append(len(x))
            return super().raw_output(x, s, dtype=dtype)

    plain = fs.Denoiser.from_denoiser(lambda z, s: z / (1 + s.reshape(-1, 1) ** 2), 0.02, 20.0)
    counted = Counted(plain.network, plain.process, "x0")
    stats = fs.measure(counted, (4,), samples=2, levels=12, progress=False)
    assert sum(asked) == stats.model_calls
    assert stats == fs.measure(plain, (4,), samples=2, levels=12, progress=False)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    fs.sample(counted, fs.baselines.karras(5, 0.02, 20.0, spare_last=True), "dpmpp_2m", noise)
    assert sum(asked) == stats.model_calls + 5 * 3


@pytest.mark.parametrize("s", [0.0, -1.0, float("inf"), torch.tensor([1.0, 0.0])])
def test_a_call_needs_a_positive_finite_level(s):
    with pytest.raises(ValueError, match="s must be positive and finite"):
        KINDS["x0"](torch.zeros(2, 4), s)


def test_levels_of_any_shape_are_one_for_each_sample():
    z, s = torch.randn(3, 4), torch.tensor([0.1, 1.0, 10.0])
    torch.testing.assert_close(KINDS["epsilon"](z, s[:, None]), KINDS["epsilon"](z, s))


@pytest.mark.parametrize("dtype", [torch.int32, "float32", float, torch.complex64, torch.float8_e4m3fn])
def test_what_a_network_is_to_compute_in_is_checked(dtype):
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype"):
        KINDS["x0"].raw_output(torch.zeros(2, 4), 1.0, dtype=dtype)


@pytest.mark.parametrize("states", [torch.zeros(2, 4, dtype=torch.int64), [[0.0] * 4], None])
def test_states_must_be_floating_point(states):
    with pytest.raises(TypeError, match="z must be a floating-point tensor"):
        KINDS["x0"](states, 1.0)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        KINDS["x0"].raw_output(states, 1.0)


def test_states_must_be_a_batch():
    with pytest.raises(ValueError, match=r"z must be \[B, \*shape\]"):
        KINDS["x0"](torch.tensor(1.0), 1.0)


def test_a_large_network_is_shown_in_one_line():
    denoiser = fs.Denoiser.from_velocity(torch.nn.Sequential(*map(torch.nn.Identity, range(20))))
    assert repr(denoiser) == f"Denoiser(process={denoiser.process!r}, prediction='velocity', sigma_data=0.5)"
