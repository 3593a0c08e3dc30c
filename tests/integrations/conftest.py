"""A stand-in of what ComfyUI gives its nodes: guider, samplers, progress bar, interrupt, folders, and a small model."""

import importlib.util
import math
import pathlib
import sys
import types

import pytest
import torch

import fastsched as fs

PACKAGE = pathlib.Path(__file__).parents[2] / "integrations" / "comfyui"
SHAPE = (1, 2, 3)


@pytest.fixture(scope="session")
def module_of():
    """Loads a file as a module of its own, as ComfyUI does with a file of nodes."""

    def load(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def table(zsnr=False):
    """A scaled-linear table of sigmas; of zero terminal SNR as ComfyUI has it."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    if zsnr:
        root = abar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        abar = root**2
        abar[-1] = 4.8973451890853435e-08
    return ((1 - abar) / abar).sqrt().float()


class Discrete:
    """Timesteps are rounded to the trained ones; states are ``x0 + sigma eps``."""

    def __init__(self, zsnr=False):
        self.sigmas = table(zsnr)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma):
        return (sigma.log()[None] - self.sigmas.log()[:, None]).abs().argmin(0)

    def noise_scaling(self, sigma, noise, latent):
        return noise * sigma + latent


class Continuous(Discrete):
    """Every sigma has its own timestep."""

    def __init__(self):
        self.sigmas = torch.logspace(math.log10(0.002), math.log10(80), 1000)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma):
        return 0.25 * sigma.log()


class Flow:
    """States are ``(1 - sigma) x0 + sigma eps``."""

    def __init__(self, shift=3.0):
        t = torch.arange(1, 1001) / 1000
        self.sigmas = shift * t / (1 + (shift - 1) * t)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma):
        return sigma * 1000

    def noise_scaling(self, sigma, noise, latent):
        return noise * sigma + latent * (1 - sigma)


class Network(torch.nn.Module):
    """``E[x0 | z]`` of a Gaussian mixture, by one layer that a cache may skip."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = torch.nn.Identity(), torch.nn.Identity()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.oracle = fs.oracles.GaussianMixture.random(6, 3, seed=0)
        self.calls = 0

    def forward(self, z, s):
        self.calls += len(z)
        found = self.oracle.denoise(self.layer(z).flatten(1).double(), s.double()).reshape(z.shape)
        return self.other(found * self.scale).float()


class Model:
    """A ModelPatcher."""

    def __init__(self, sampling=None):
        self.model = torch.nn.Module()
        self.model.diffusion_model = Network()
        self.model.model_sampling = sampling or Discrete()
        self.model_options = {"transformer_options": {}}
        self.patches, self.backup, self.wrappers = {}, {}, {}

    @property
    def calls(self):
        return self.model.diffusion_model.calls

    def get_model_object(self, name):
        return getattr(self.model, name)


class Guider:
    """ComfyUI's CFGGuider."""

    __module__ = "comfy.samplers"

    def __init__(self, model):
        self.model_patcher, self.model_options = model, model.model_options

    def set_conds(self, positive, negative):
        self.original_conds = {"positive": positive, "negative": negative}
        self.shifts = [float(cond[0][0].flatten()[0]) for cond in (positive, negative)]

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        self.inner_model = self.model_patcher.model
        options = {**self.model_options, "transformer_options": {**self.model_options["transformer_options"]}}
        options["transformer_options"]["sample_sigmas"] = sigmas
        given = {"model_options": options, "seed": seed}
        return sampler.sample(self, sigmas, given, callback, noise, latent_image, denoise_mask, disable_pbar)

    def __call__(self, x, sigma, model_options=None, seed=None):
        assert sigma.shape == (len(x),)
        assert model_options is not None
        sampling, network = self.inner_model.model_sampling, self.inner_model.diffusion_model
        level = sigma.double().reshape(-1, *[1] * (x.ndim - 1))
        if isinstance(sampling, Flow):
            s = (sigma.double() / (1 - sigma.double())).clamp(max=1e6)
            asked = lambda shift: clean_of(network, x.double() / level * s.reshape(level.shape), s, shift)
        elif not isinstance(sampling, Continuous):  # the noise prediction of the nearest trained level
            trained = sampling.sigmas[Discrete.timestep(sampling, sigma)].double()

            def asked(shift):
                scaled = x.double() * ((1 + trained.square()) / (1 + sigma.double().square())).sqrt().reshape(
                    level.shape
                )
                predicted = (scaled - clean_of(network, scaled, trained, shift)) / trained.reshape(level.shape)
                return x.double() - level * predicted
        else:
            asked = lambda shift: clean_of(network, x.double(), sigma.double(), shift)
        cond, uncond = asked(self.shifts[0]), asked(self.shifts[1])
        found = uncond + self.cfg * (cond - uncond)
        for patch in model_options.get("sampler_post_cfg_function", []):
            found = patch({"denoised": found, "sigma": sigma, "model_options": model_options})
        return found.float()


def clean_of(network, z, s, shift):
    """Data moved by a condition."""
    return network(z - shift, s[:1]).double() + shift


class KSampler:
    """What ComfyUI's KSAMPLER does with a function of k-diffusion's form."""

    def __init__(self, sampler_function, extra_options={}):  # noqa: B006 - as ComfyUI declares it
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(self, wrap, sigmas, extra_args, callback, noise, latent=None, denoise_mask=None, disable_pbar=False):
        x = noise * sigmas[0]
        told = lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1) if callback else None
        return self.sampler_function(wrap, x, sigmas, extra_args, told, True, **self.extra_options)


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """ComfyUI's euler, the only one of its own samplers that is run here."""
    for n in range(len(sigmas) - 1):
        denoised = model(x, sigmas[n] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": n, "sigma": sigmas[n], "sigma_hat": sigmas[n], "denoised": denoised})
        x = denoised + sigmas[n + 1] / sigmas[n] * (x - denoised)
    return x


class Interrupted(Exception):
    """ComfyUI's own exception."""


class Comfy:
    """The stand-in, and what it was told.

    Attributes:
        bars: Progress bars.
        interrupt_at: Progress at which the user interrupts.
        chosen: Names and options of ComfyUI's own samplers that were asked for.
        interrupted: The exception of an interrupt.
    """

    interrupted = Interrupted

    def __init__(self, home):
        self.bars, self.interrupt_at, self.chosen, self.home = [], math.inf, [], home

    def modules(self):
        stand = self

        class ProgressBar:
            def __init__(self, total):
                self.total, self.current, self.updates = total, 0, 0
                stand.bars.append(self)

            def update(self, count):
                self.update_absolute(self.current + count)

            def update_absolute(self, value, total=None, preview=None):
                self.current, self.updates = value, self.updates + 1

        def interrupted():
            if self.bars and self.bars[-1].current >= self.interrupt_at:
                raise Interrupted

        def own(name, options):
            self.chosen.append((name, options))
            return types.SimpleNamespace(name=name, options=options, sampler_function=euler, extra_options=options)

        folders = {"get_input_directory": "input", "get_output_directory": "output", "get_user_directory": "user"}
        samplers = types.SimpleNamespace(KSAMPLER=KSampler, CFGGuider=Guider, ksampler=own)
        return {
            "comfy": types.SimpleNamespace(samplers=samplers),
            "comfy.samplers": samplers,
            "comfy.sample": types.SimpleNamespace(fix_empty_latent_channels=lambda model, latent: latent),
            "comfy.utils": types.SimpleNamespace(ProgressBar=ProgressBar),
            "comfy.model_management": types.SimpleNamespace(throw_exception_if_processing_interrupted=interrupted),
            "folder_paths": types.SimpleNamespace(**{k: lambda v=v: str(self.home / v) for k, v in folders.items()}),
        }


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """The stand-in as modules, with folders of its own."""
    found = Comfy(tmp_path)
    for name, each in found.modules().items():
        monkeypatch.setitem(sys.modules, name, each)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, each)
    for name in ("input", "output", "user"):
        (tmp_path / name).mkdir()
    return found


@pytest.fixture
def package_folder():
    """Where the package's files are."""
    return PACKAGE


@pytest.fixture
def package(comfy):
    """The nodes' package, as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location("fastsched_nodes_under_test", PACKAGE / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in [name for name in sys.modules if name.startswith(spec.name) and name not in before]:
            del sys.modules[name]


@pytest.fixture
def given():
    """Arguments of Fit Schedule, as the server passes them."""

    def make(sampling=None, **changes):
        return {
            "model": Model(sampling),
            "positive": [[torch.full((1, 1), 0.3), {"pooled_output": torch.zeros(1, 2)}]],
            "negative": [[torch.full((1, 1), -0.2), {}]],
            "cfg": 1.5,
            "latent": {"samples": torch.zeros(2, *SHAPE)},
            "steps": 4,
            "sampler": "dpmpp_2m",
            "seed": 0,
            "samples": 2,
            "tuning_calls": 0,
            **changes,
        }

    return make


@pytest.fixture
def kinds():
    """Makers of noise processes, by kind."""
    return {"discrete": Discrete, "zero SNR": lambda: Discrete(zsnr=True), "continuous": Continuous, "flow": Flow}


@pytest.fixture
def guider():
    """Makes a guider of given arguments."""

    def make(arguments):
        found = Guider(arguments["model"])
        found.set_conds(arguments["positive"], arguments["negative"])
        found.set_cfg(arguments["cfg"])
        found.inner_model = arguments["model"].model
        return found

    return make
