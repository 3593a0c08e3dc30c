"""The code of the documents runs: whole programs in the gallery, and block after block in the guides."""

import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch

import fastsched as fs

DOCS = Path(__file__).parents[1] / "docs"
#: Guides that tests of other files run.
ELSEWHERE = {"diffusers.md", "fitted.md", "serving.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: Third-party packages that a block may need.
LIBRARIES = ("diffusers", "flow_matching", "k_diffusion", "smalldiffusion", "torchdiffeq")


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def imported(code):
    """The third-party packages that a block imports."""
    return [name for name in LIBRARIES if re.search(rf"^(?:import|from) {name}\b", code, re.MULTILINE)]


def installed(library):
    return importlib.util.find_spec(library) is not None


def programs():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    return list(zip(titles, blocks("gallery.md"), strict=True))


@pytest.mark.parametrize(("title", "code"), programs(), ids=[title for title, _ in programs()])
def test_a_program_of_the_gallery_runs(title, code, tmp_path, monkeypatch):
    for library in imported(code):
        if not installed(library):
            pytest.skip(f"needs {library}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, f"gallery.md: {title}", "exec"), {"__name__": "__main__"})


def shaped(value, x):
    return value.reshape(-1, *[1] * (x.ndim - 1))


ALPHAS = torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)


def epsilon(x, t):
    """The noise in ``x = alpha x0 + sigma eps`` of data with unit deviation: ``sigma x``."""
    low = t.long().clamp(max=998)
    bar = ALPHAS[low] + (t - low) * (ALPHAS[low + 1] - ALPHAS[low])
    return shaped((1 - bar).sqrt(), x).to(x) * x


def x0_network(x, t):
    low = t.long().clamp(max=998)
    bar = ALPHAS[low] + (t - low) * (ALPHAS[low + 1] - ALPHAS[low])
    return shaped(bar.sqrt(), x).to(x) * x


def trigonometric(x, t):
    """The velocity of data of deviation 0.5, whose alpha is ``sin(pi t / 2)``."""
    alpha, sigma = (shaped(each, x) for each in ((torch.pi / 2 * t).sin(), (torch.pi / 2 * t).cos()))
    return torch.pi / 2 * (0.25 - 1) * alpha * sigma / (0.25 * alpha**2 + sigma**2) * x


def denoise(z, s):
    return z / (1 + shaped(s, z) ** 2)


def velocity(x, t):
    t = shaped(torch.as_tensor(t), x)
    return (t - (1 - t)) / (t**2 + (1 - t) ** 2) * x


class Edm(torch.nn.Module):
    sigma_data, sigma_min, sigma_max = 0.5, 0.002, 80.0

    def forward(self, x, c_noise):
        return 0.01 * x  # almost nothing: EDM's c_skip alone is the denoiser of Gaussian data


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, z, s):
        return self.weight * denoise(z, s)


class Step:
    def zero_grad(self):
        pass

    step = zero_grad


def pipeline():
    import pipelines
    from diffusers import EulerDiscreteScheduler

    class Pipeline(pipelines.OraclePipeline):
        def __call__(self, prompt=None, guidance_scale=1.0, num_inference_steps=50, sigmas=None):
            return types.SimpleNamespace(images=list(super().__call__(prompt, num_inference_steps, sigmas=sigmas)))

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    return Pipeline(pipelines.OracleUNet().answer_for(scheduler, oracle), scheduler)


def names():
    """What the guides take as given, in small; ``measure`` follows few paths of whatever shape a guide says."""
    given = {"unet": epsilon, "alphas_cumprod": ALPHAS, "model": denoise, "net": Edm(), "velocity_model": velocity}
    weight = torch.ones(1, requires_grad=True)
    given |= {"loader": [torch.zeros(4, 1, 2, 2)], "optimizer": Step(), "network": Network()}
    given |= {"flow_network": lambda x, t: weight * velocity(x, 1 - t)}
    given |= {"mlp": lambda xt: velocity(xt[:, :-1], xt[:, -1]), "unet_model": lambda t, x: velocity(x, t)}
    given |= {"x0_network": x0_network, "trigonometric": trigonometric}
    return given | {"shape": (4,)}  # not fastsched and torch: a guide imports what it uses


GUIDES = [
    "index.md",
    "start.md",
    "choosing.md",
    "k_diffusion.md",
    "flow_matching.md",
    "edm.md",
    "training.md",
    "repositories.md",
]


@pytest.mark.parametrize("page", [*GUIDES, "large_models.md"])
def test_the_code_of_a_guide_runs(page, tmp_path, monkeypatch):
    run_guide(page, tmp_path, monkeypatch, installed)


def test_the_wrappers_of_torchcfms_networks_take_one_time_or_one_a_sample(tmp_path, monkeypatch):
    found = run_guide("flow_matching.md", tmp_path, monkeypatch, lambda library: False)
    x, t = torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    for name in ("of_mlp", "of_unet"):
        assert torch.equal(found[name](x, t), velocity(x, t))
        assert torch.equal(found[name](x, t[1]), velocity(x, t[1].expand(3)))


def test_the_trigonometric_velocity_of_the_guide_is_made_a_denoiser(tmp_path, monkeypatch):
    found = run_guide("repositories.md", tmp_path, monkeypatch, installed)
    z, s = torch.randn(3, 4), torch.tensor([0.01, 1.0, 50.0])
    assert torch.allclose(found["denoise"](z, s), 0.25 / (0.25 + shaped(s, z) ** 2) * z, atol=1e-5)


@pytest.mark.parametrize("page", ["flow_matching.md", "k_diffusion.md"])
def test_a_guide_runs_without_the_libraries_that_it_is_for(page, tmp_path, monkeypatch):
    run_guide(page, tmp_path, monkeypatch, lambda library: False)


def run_guide(page, tmp_path, monkeypatch, has):
    """Run the blocks of a page one after the other, but those that import a library that is not there."""
    monkeypatch.chdir(tmp_path)
    given = names()
    denoiser = fs.Denoiser.from_denoiser(denoise, 0.1, 10.0)
    given["denoiser"] = denoiser
    measure = fs.measure

    def measured(model, shape, **options):  # two paths of it, over few levels
        return measure(model, shape, progress=False, **{"levels": 16, **options, "samples": 2})

    monkeypatch.setattr(fs, "measure", measured)
    if page == "choosing.md":
        fs.measure(denoiser, (4,), levels=24).save("stats.safetensors")
    if page == "start.md":
        pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")
        given["pipe"] = pipeline()
        fit = fs.diffusers.fit
        monkeypatch.setattr(fs.diffusers, "fit", lambda pipe, **options: fit(pipe, levels=16, samples=1, **options))
    for code in blocks(page):
        if all(map(has, imported(code))):
            exec(compile(code, page, "exec"), given)
    return given


def test_every_page_with_code_is_run():
    with_code = {path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8"))}
    # shell.md shows a file of the reader's own, which the tests of the shell stand in for
    assert with_code - ELSEWHERE - {"shell.md", "gallery.md", "comfyui.md"} == {*GUIDES, "large_models.md"}


def test_levels_for_training_are_drawn_where_the_data_are():
    """On the CPU, where the guides are run, a level drawn elsewhere would go unseen."""
    texts = [(DOCS / page).read_text(encoding="utf-8") for page in ("training.md", "gallery.md")]
    for text in [*texts, fs.AdaptiveSchedule.__doc__]:
        drawn = re.findall(r"adaptive\.draw\(len\(clean\)(.*?)\)", text)
        assert drawn
        assert set(drawn) == {", device=clean.device"}
