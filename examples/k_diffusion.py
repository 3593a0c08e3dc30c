"""Use a schedule with a sampler of k-diffusion: ``python examples/k_diffusion.py``.

The samplers of k-diffusion take ``schedule.sigmas`` as it is. `sample_dpmpp_2m` below has the signature and the steps
of the function of that name in k-diffusion's ``sampling.py``, so that the example runs without k-diffusion. If it is
installed, import the function from there. A schedule of the fitted solver is used by a function of fastsched with the
same signature. The model is the exact denoiser of a mixture of Gaussians.
"""

import torch

import fastsched as fs
from fastsched.sampling.k_diffusion import sample_fitted


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++(2M) in the form of k-diffusion: ``model(x, sigma)`` is the denoised image, ``sigmas`` end in 0."""
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    old_denoised = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        if old_denoised is None or sigmas[i + 1] == 0:
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * denoised
        else:
            r = (t + sigmas[i - 1].log()) / h
            x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * ((1 + 1 / (2 * r)) * denoised - old_denoised / (2 * r))
        old_denoised = denoised
    return x


def main() -> None:
    """Sample in 8 steps by two measured schedules and by karras, and compare with the converged samples."""
    oracle = fs.oracles.GaussianMixture.random(16, 5, seed=0)
    denoiser = fs.Denoiser.from_denoiser(oracle.denoise, sigma_min=0.002, sigma_max=80.0)
    stats = fs.measure(denoiser, shape=(16,), progress=False)
    schedule = fs.optimal_schedule(stats, steps=8, solver="dpmpp_2m")
    fitted = fs.optimal_schedule(stats, steps=8, solver="fitted")
    noise = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    converged = fs.sample(denoiser, fs.baselines.exponential(300, 0.002, 80.0), "heun", noise)
    karras = fs.baselines.karras(8, 0.002, 80.0)
    # The calls are the same with k-diffusion's own functions.
    found = {
        "fastsched": sample_dpmpp_2m(oracle.denoise, noise * schedule.sigmas[0], schedule.sigmas),
        "karras": sample_dpmpp_2m(oracle.denoise, noise * karras[0], karras),
        "fitted": sample_fitted(oracle.denoise, noise * fitted.sigmas[0], fitted, disable=True),
    }
    for name, samples in found.items():
        typical = (samples - converged).square().sum(1).log().mean().exp()
        print(f"{name:10s} typical squared distance to the converged samples: {typical:.2g}")


if __name__ == "__main__":
    main()
