"""Networks, and readings of one, are told apart by their answers to one question."""

from dataclasses import replace

import pytest
import torch
from models import exact_denoisers, vp_table

import fastsched as fs


@pytest.mark.parametrize(("data", "other"), [(0.25, 0.5), (0.5, 0.8)])
def test_networks_that_predict_the_noise_are_told_apart(data, other):
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    one, two = (exact_denoisers(fs.oracles.Gaussian(std, (64,)), table)["epsilon"] for std in (data, other))
    options = {"levels": 16, "samples": 2, "progress": False}
    stats = fs.measure(one, (64,), **options)
    with pytest.raises(ValueError, match="another network"):
        stats.merge(fs.measure(two, (64,), seed=1, **options))
    with pytest.raises(ValueError, match="another network"):
        fs.audition(two, stats, 4, progress=False)
    assert stats.merge(fs.measure(one, (64,), seed=1, **options)).samples == 4


def test_another_parameterisation_is_another_measurement(tmp_path):
    file, table = tmp_path / "v.safetensors", vp_table()
    network = exact_denoisers(fs.oracles.Gaussian(0.5, (64,)), table)["v"].network
    options = {"levels": 16, "samples": 2, "progress": False}
    stats = fs.measure(fs.Denoiser.from_v(network, table), (64,), checkpoint=file, **options)
    corrected = fs.Denoiser.from_epsilon(network, table)
    with pytest.raises(ValueError, match="the network is another one"):
        fs.measure(corrected, (64,), checkpoint=file, checks=False, **options)
    with pytest.raises(ValueError, match="with another parameterisation or dtype"):
        fs.fit(corrected, (64,), 4, stats=stats, progress=False)
    earlier = replace(stats, fingerprint=stats.fingerprint[:16])  # as files had it: of the network alone
    with pytest.warns(UserWarning, match="was measured with another parameterisation"):
        assert fs.fit(corrected, (64,), 4, stats=earlier, model_calls=40, progress=False).steps == 4


def test_a_network_that_was_not_checked_is_known_when_it_is_resumed(tmp_path):
    right = fs.oracles.Gaussian(0.5, (8,)).denoise
    in_twos = lambda z, s: right(z, s) if len(z) == 2 else z[:, :2]  # fails for one sample
    options = {"levels": 8, "batch_size": 2, "checks": False, "progress": False}
    for name, network in {"right": right, "in twos": in_twos}.items():
        file, denoiser = tmp_path / f"{name}.safetensors", fs.Denoiser.from_denoiser(network, 0.02, 20.0)
        assert fs.measure(denoiser, (8,), samples=2, checkpoint=file, **options).samples == 2
        assert fs.measure(denoiser, (8,), samples=4, checkpoint=file, **options).samples == 4
    other = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.7, (8,)).denoise, 0.02, 20.0)
    with pytest.raises(ValueError, match="the network is another one"):
        fs.measure(other, (8,), samples=6, checkpoint=tmp_path / "right.safetensors", **options)


def test_a_network_that_draws_random_numbers_and_is_not_checked_is_resumed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noisy = lambda z, s: z / (1 + s.reshape(-1, 1) ** 2) * (1 + 0.05 * torch.randn(z.shape, generator=generator))
    denoiser, file = fs.Denoiser.from_denoiser(noisy, 0.02, 20.0), tmp_path / "noisy.safetensors"
    options = {"levels": 8, "checks": False, "progress": False, "checkpoint": file}
    assert fs.measure(denoiser, (8,), samples=2, **options).fingerprint is None
    assert fs.measure(denoiser, (8,), samples=4, **options).samples == 4


def test_a_merge_says_if_the_networks_are_not_known():
    options = {"levels": 8, "checks": False, "progress": False}
    networks = (lambda z, s: z / (1 + s.reshape(-1, 1) ** 2), lambda z, s: 0.1 * z / (0.1 + s.reshape(-1, 1) ** 2))
    denoisers = [fs.Denoiser.from_denoiser(each, 0.01, 20.0) for each in networks]
    # Batches of one measurement are merged without the warning.
    one = fs.measure(denoisers[0], (4,), samples=2, batch_size=1, **options)
    two = fs.measure(denoisers[1], (4,), samples=range(2, 4), **options)
    with pytest.warns(UserWarning, match="without knowing whether both statistics are of one network"):
        assert one.merge(two).samples == 4
