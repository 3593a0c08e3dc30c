"""A table of square roots is refused without a call; no right table is."""

import pytest
import torch
from diffusers import DDPMScheduler

import fastsched as fs
from fastsched.denoisers.noise import VarianceExploding, VariancePreserving
from fastsched.measurement.checks.tables import check_table

FAMILIES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
]
OTHERS = [{"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}, {**FAMILIES[1], "rescale_betas_zero_snr": True}]


def table(timesteps, family):
    return DDPMScheduler(timesteps, **family).alphas_cumprod


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("timesteps", [50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_square_roots_of_a_table_are_refused(family, timesteps, dtype):
    root = table(timesteps, family).to(dtype).sqrt()
    with pytest.raises(ValueError, match="alphas_cumprod seem to be square roots"):
        check_table(VariancePreserving(root))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("timesteps", [20, 1000, 4000])
def test_a_table_is_accepted_and_so_are_other_powers_of_it(family, timesteps):
    abar = table(timesteps, family).double()
    for power in (1, 2, 0.25):
        check_table(VariancePreserving(abar**power))


def test_parts_of_tables_and_tables_of_no_family_are_accepted():
    abar = table(1000, FAMILIES[0])
    for right in (abar[::10], abar[:10], abar[200:], torch.linspace(0.999, 0.001, 1000)):
        check_table(VariancePreserving(right))
        check_table(VariancePreserving(right.double().sqrt()[:19]))
    check_table(VarianceExploding(0.02, 80.0))


def test_a_measurement_refuses_square_roots_before_its_first_call_unless_checks_are_off():
    asked = []

    def network(x, t):
        asked.append(len(x))
        return x * 0.5

    denoiser = fs.Denoiser.from_epsilon(network, table(1000, FAMILIES[1]).sqrt())
    with pytest.raises(ValueError, match="squares of sqrt_alphas_cumprod"):
        fs.measure(denoiser, (4,), levels=12, samples=1)
    assert not asked
    fs.measure(denoiser, (4,), levels=12, samples=1, checks=False)
