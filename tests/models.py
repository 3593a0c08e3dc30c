"""Networks of every kind made from an oracle's exact denoiser, and runs of them, for tests."""

import torch

import fastsched as fs
from fastsched.fitting.rollouts import RecordingDenoiser, Rollout
from fastsched.sampling.random_streams import noise_of


def batch_shape(values, like):
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def vp_table(steps=1000, beta_min=0.1, beta_max=20.0):
    """Cumulative alphas of a linear VP process: s from about 0.014 to 157."""
    t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    return torch.exp(-0.5 * t**2 * (beta_max - beta_min) - t * beta_min)


def exact_denoiser(oracle, sigma_min=0.002, sigma_max=80.0):
    return fs.Denoiser.from_denoiser(oracle.denoise, sigma_min, sigma_max)


def exact_denoisers(oracle, table=None):
    """The oracle as each kind of network, over levels 0.02 to 80 or the nearest range of the process."""
    table = vp_table() if table is None else table
    trained = ((1 - table) / table).sqrt()

    def level_of(t):
        low = t.double().floor().clamp(0, len(table) - 2).long()
        part = t.double() - low
        return (trained[low].log() * (1 - part) + trained[low + 1].log() * part).exp()

    def vp_parts(x, t):
        s = level_of(t)
        alpha = (1 + s**2).rsqrt()
        x0 = oracle.denoise(x / batch_shape(alpha, x), s.to(x.dtype))
        a, sigma = batch_shape(alpha, x), batch_shape(s * alpha, x)
        return x0, (x - a * x0) / sigma, a, sigma

    def epsilon(x, t):
        return vp_parts(x, t)[1]

    def v(x, t):
        x0, eps, a, sigma = vp_parts(x, t)
        return a * eps - sigma * x0

    def velocity(x, t):
        tb = batch_shape(t, x)
        s = (t.double() / (1 - t.double())).clamp_max(1e9)
        x0 = oracle.denoise(x / batch_shape(1 / (1 + s), x), s.to(x.dtype))
        return (x - x0) / tb

    def edm(x, c_noise):
        s = (4 * c_noise.double()).exp()
        total = (s**2 + 0.25).sqrt()
        z = x * batch_shape(total, x)
        skip, out = batch_shape(0.25 / total**2, x), batch_shape(0.5 * s / total, x)
        return (oracle.denoise(z, s.to(x.dtype)) - skip * z) / out

    return {
        "x0": exact_denoiser(oracle, 0.02, 80.0),
        "edm": fs.Denoiser.from_edm(edm, sigma_min=0.02, sigma_max=80.0),
        "score": fs.Denoiser.from_score(oracle.score, 0.02, 80.0),
        "epsilon": fs.Denoiser.from_epsilon(epsilon, table),
        "v": fs.Denoiser.from_v(v, table),
        "velocity": fs.Denoiser.from_velocity(velocity, t_min=0.02 / 1.02),
    }


def gaussian(d, sigma_min=0.002, sigma_max=80.0):
    """Gaussian data of standard deviation 0.5, and its denoiser."""
    oracle = fs.oracles.Gaussian(0.5, (d,))
    return oracle, exact_denoiser(oracle, sigma_min, sigma_max)


def mixture(d=4, seed=0):
    return fs.oracles.GaussianMixture.random(d, 3, seed=seed)


def counted_denoiser(oracle, sigma_min, sigma_max):
    """An exact denoiser, and a list with the number of samples in each of its calls."""
    calls = []

    def network(z, s):
        calls.append(len(z))
        return oracle.denoise(z, s)

    return fs.Denoiser.from_denoiser(network, sigma_min, sigma_max), calls


def rollout_of(denoiser, stats, schedule):
    """A run of the sampler from the measured noises, with all evaluations of the network."""
    recorder = RecordingDenoiser.of(denoiser)
    ends = fs.sample(recorder, schedule, noise=noise_of(stats.seeds, stats.shape))
    return Rollout(ends, recorder.evaluations())


def told_lower(denoiser, steps=5, solver="ddim", decoupled="timestep"):
    """A schedule whose network is told levels between the states' and the next."""
    s = denoiser.levels(steps)
    told = torch.cat([s[:1], s[1:-1] ** 0.8 * s[2:] ** 0.2, s[-1:]])
    levels = torch.cat([s, s.new_zeros(1)])
    return fs.Schedule.from_levels(denoiser.process, levels, solver, network_levels=told, decoupled=decoupled)
