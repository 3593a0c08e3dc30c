"""The nodes of ComfyUI, against a stand-in of its contract."""

import dataclasses
import inspect
import math
import os
import sys

import pytest
import torch

import fastsched as fs
from fastsched.metrics import power_mean
from fastsched.sampling.random_streams import noise_of

NODES = ("Fit", "FitGuider", "Load", "Save", "Inspect", "StepsNeeded")


def fit(package, arguments):
    node = package.NODE_CLASS_MAPPINGS["FastschedFit"]()
    return getattr(node, node.FUNCTION)(**arguments)


def node(package, name):
    return package.NODE_CLASS_MAPPINGS[f"Fastsched{name}"]


def independent(guider, kind, sampling):
    """The guided model in fastsched's own parameterisation, from its noise predictions or velocities."""
    ask = lambda z, sigma: guider(z, sigma.float(), model_options={})
    if kind == "flow":
        return fs.Denoiser.from_velocity(
            lambda x, t: (x - ask(x, t)) / t.reshape(-1, 1, 1, 1).to(x), t_min=float(sampling.sigma_min)
        )
    if kind == "continuous":
        return fs.Denoiser.from_denoiser(ask, float(sampling.sigma_min), float(sampling.sigma_max))
    trained = sampling.sigmas.double()

    def epsilon(x, t):
        s = trained[t.long()].reshape(-1, 1, 1, 1)
        z = x.double() * (1 + s**2).sqrt()
        return ((z - ask(z.float(), s.flatten())) / s).float()

    return fs.Denoiser.from_epsilon(epsilon, 1 / (1 + trained**2), integer_timesteps=True)


def test_the_nodes_follow_comfyui_s_contract(package, comfy):
    assert set(package.NODE_DISPLAY_NAME_MAPPINGS) == set(package.NODE_CLASS_MAPPINGS)
    assert {"FastschedScheduleLoader", "FastschedFittedLoader"} < set(package.NODE_CLASS_MAPPINGS)
    for name in NODES:
        each = node(package, name)
        inputs = each.INPUT_TYPES()
        names = [*inputs["required"], *inputs.get("optional", {})]
        assert list(inspect.signature(getattr(each(), each.FUNCTION)).parameters) == names
        assert len(each.RETURN_NAMES) == len(each.RETURN_TYPES)
        assert each.CATEGORY == "sampling/fastsched"
        for method in ("VALIDATE_INPUTS", "IS_CHANGED"):
            if hasattr(each, method):
                assert set(inspect.signature(getattr(each, method)).parameters) <= set(names)
    assert not hasattr(node(package, "Load"), "DEPRECATED")
    assert node(package, "ScheduleLoader").DEPRECATED


@pytest.mark.parametrize("kind", ["discrete", "zero SNR", "continuous", "flow"])
def test_a_fit_is_that_of_fastsched_on_the_guided_model(package, given, kinds, guider, kind):
    arguments = given(kinds[kind](), tuning_calls=0)
    sigmas, _, text, found = fit(package, arguments)
    denoiser = independent(guider(arguments), kind, arguments["model"].model.model_sampling)
    stats = fs.measure(denoiser, (1, 2, 3), samples=2, checks=False, progress=False)
    torch.testing.assert_close(found.stats.gram, stats.gram, rtol=1e-3, atol=1e-3 * float(stats.gram.abs().max()))
    expected = fs.optimal_schedule(stats, 4, "dpmpp_2m").sigmas
    trained = getattr(denoiser.process, "trained_levels", None)
    if trained is not None:
        assert bool(torch.isin(sigmas[:-1], arguments["model"].model.model_sampling.sigmas).all())
        assert "on trained levels" in text
    # the nearest trained level is off by up to half of the widest gap, a factor of 1.19 at the lowest
    tolerance = {"rtol": 0.2, "atol": 0.0} if trained is not None else {"rtol": 2e-2, "atol": 0.0}
    torch.testing.assert_close(sigmas.double(), expected.clamp(max=float(sigmas[0])), **tolerance)
    assert float(sigmas[0]) == pytest.approx(float(arguments["model"].model.model_sampling.sigma_max))


@pytest.mark.parametrize(("kind", "sampler"), [("discrete", "dpmpp_3m"), ("flow", "dpmpp_2m"), ("flow", "fitted")])
def test_sigmas_and_sampler_give_the_images_of_fastsched(package, given, kinds, guider, kind, sampler):
    arguments = given(kinds[kind](), sampler=sampler, tuning_calls=60)
    sigmas, chosen, _, found = fit(package, arguments)
    asked, steps = guider(arguments), []
    noise = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    callback = lambda i, denoised, x, total: steps.append((i, total, denoised.shape, x.shape))
    images = chosen.sample(asked, sigmas, {"model_options": {}}, callback, noise)
    denoiser = independent(asked, kind, arguments["model"].model.model_sampling)
    shown = dataclasses.replace(found.schedule, sigmas=sigmas.double(), timesteps=None)
    torch.testing.assert_close(images, fs.sample(denoiser, shown, noise=noise), rtol=1e-4, atol=1e-4)
    assert steps == [(n, 4, noise.shape, noise.shape) for n in range(4)]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc", "fitted"])
@pytest.mark.parametrize("kind", ["discrete", "continuous", "flow"])
@torch.no_grad()
def test_decoupled_levels_give_the_images_of_fastsched(package, given, kinds, guider, kind, sampler):
    if (kind, sampler) in {("discrete", "dpmpp_2m"), ("continuous", "dpmpp_2m")}:
        pytest.skip("the stand-in has no dpmpp_2m of ComfyUI")
    arguments = given(kinds[kind](), sampler=sampler, tuning_calls=120, decoupled=True, save_as="told")
    sigmas, chosen, text, found = fit(package, arguments)
    assert found.schedule.decoupled == "denoiser"
    assert "with decoupled levels" in text
    asked = guider(arguments)
    noise = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    images = chosen.sample(asked, sigmas, {"model_options": {}}, lambda *_: None, noise)
    denoiser = independent(asked, kind, arguments["model"].model.model_sampling)
    shown = dataclasses.replace(found.schedule, sigmas=sigmas.double(), timesteps=None)
    torch.testing.assert_close(images, fs.sample(denoiser, shown, noise=noise), rtol=1e-4, atol=1e-4)
    coupled = fs.sample(denoiser, dataclasses.replace(shown, network_sigmas=None), noise=noise)
    assert float((coupled - images).norm()) > 1e-3 * float(images.norm())
    load = node(package, "Load")()
    (name,) = [name for name in load.INPUT_TYPES()["required"]["file"][0] if "told" in name]
    again_sigmas, again, *_ = load.load(name, arguments["model"])
    torch.testing.assert_close(again.sample(asked, again_sigmas, {"model_options": {}}, lambda *_: None, noise), images)
    with pytest.raises(ValueError, match=r"none of the schedule's|sigmas must be those"):
        again.sample(asked, 0.9 * again_sigmas, {"model_options": {}}, lambda *_: None, noise)


@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_the_measured_error_is_that_of_the_sigmas_that_are_given(package, given, kinds, guider, kind):
    arguments = given(kinds[kind](), tuning_calls=60)
    _, _, _, found = fit(package, arguments)
    denoiser = independent(guider(arguments), kind, arguments["model"].model.model_sampling)
    noise = noise_of(found.stats.seeds, (1, 2, 3))
    images = fs.sample(denoiser, dataclasses.replace(found.schedule, timesteps=None), noise=noise)
    distances = (images - found.stats.ends).double().square().flatten(1).sum(1)
    assert found.schedule.measured_error == pytest.approx(float(power_mean(distances)), rel=0.02)
    assert found.schedule.measured_error <= fit(package, {**arguments, "tuning_calls": 20})[3].schedule.measured_error


def test_images_with_conditions_of_their_own_are_measured_and_run_with_those_of_the_first(package, given, guider):
    """With six at once, samples 3 to 5 would be measured as rows 3 to 5, and in the first runs be rows 0 to 2."""
    move = lambda x: x + torch.arange(len(x)).reshape(-1, 1, 1, 1)
    arguments = given(tuning_calls=60, samples=6, sampler="euler", latent={"samples": torch.zeros(6, 1, 2, 3)})
    arguments["model"].model_options["sampler_post_cfg_function"] = [lambda found: move(found["denoised"])]
    with pytest.warns(UserWarning, match="conditions differ from image to image"):
        _, _, text, found = fit(package, arguments)
    assert "warning: the conditions differ from image to image" in text
    schedule, stats = vars(found).values()
    asked = guider(arguments)
    ask = lambda z, s: asked(z, s.float(), model_options={})  # the first row is not moved
    denoiser = fs.Denoiser.from_denoiser(ask, float(schedule.sigmas[-2]), float(schedule.sigmas[0]))
    images = fs.sample(denoiser, schedule.sigmas, "ddim", noise_of(stats.seeds, (1, 2, 3)))
    distances = (images - stats.ends).double().square().flatten(1).sum(1)
    assert schedule.measured_error == pytest.approx(float(power_mean(distances)), rel=0.02)


def test_progress_ends_at_its_total_and_shows_every_call(package, comfy, given):
    arguments = given(tuning_calls=60)
    fit(package, arguments)
    (bar,) = comfy.bars
    assert bar.current == bar.total
    assert bar.updates > 100
    # cond and uncond are two calls of the network; repeats are asked one by one
    assert arguments["model"].calls / 2 <= bar.total


def test_an_interrupt_stops_at_once_and_leaves_nothing(package, comfy, given):
    comfy.interrupt_at = 50
    arguments = given()
    with pytest.raises(comfy.interrupted):
        fit(package, arguments)
    assert arguments["model"].calls / 2 <= 50 + 4
    comfy.interrupt_at = math.inf
    assert "remembered" not in fit(package, arguments)[2]


def counting(calls):
    def patch(told):
        calls.append(1)
        return told["denoised"] * (1.0 if len(calls) % 2 else 1.3)

    return patch


def by_step(told):
    run = told["model_options"]["transformer_options"]["sample_sigmas"]
    step = int((run - float(told["sigma"][0])).abs().argmin())
    return told["denoised"] * (1.2 if step == 3 else 1.0)


def in_the_first_step(told):
    """As guidance that begins with the second step."""
    second = told["model_options"]["transformer_options"]["sample_sigmas"][1]
    return told["denoised"] * (0.0 if float(told["sigma"][0]) > float(second) else 1.0)


def at_the_largest_sigma(told):
    """All runs begin there."""
    first = told["model_options"]["transformer_options"]["sample_sigmas"][0]
    return told["denoised"] * (0.0 if float(told["sigma"][0]) > 0.999 * float(first) else 1.0)


@pytest.mark.parametrize("patch", ["counts its calls", "a step's number", "the first step", "random"])
def test_what_depends_on_the_step_is_refused(package, given, patch):
    arguments = given()
    patches = {
        "counts its calls": counting([]),
        "a step's number": by_step,
        "the first step": in_the_first_step,
        "random": lambda told: told["denoised"] + 0.1 * torch.randn_like(told["denoised"]),
    }
    arguments["model"].model_options["sampler_post_cfg_function"] = [patches[patch]]
    with pytest.raises(ValueError, match="two answers to the same question"):
        fit(package, arguments)


def test_a_patch_of_the_noise_level_alone_is_measured(package, given):
    window = lambda told: told["denoised"] * (1.1 if 1.0 < float(told["sigma"][0]) < 3.0 else 1.0)
    for patch in (window, at_the_largest_sigma):
        arguments = given()
        arguments["model"].model_options["sampler_post_cfg_function"] = [patch]
        assert len(fit(package, arguments)[0]) == 5


def test_a_cache_that_skips_layers_is_refused(package, given):
    arguments = given()
    network = arguments["model"].model.diffusion_model
    whole = type(network).forward

    class Skipping(type(network)):
        def forward(self, z, s):
            if self.calls > 200:  # as caches do where the steps are close
                self.calls += len(z)
                return self.oracle.denoise(z.flatten(1).double(), s.double()).reshape(z.shape).float()
            return whole(self, z, s)

    network.__class__ = Skipping
    with pytest.raises(ValueError, match="layers in one call"):
        fit(package, arguments)
    assert not network.layer._forward_hooks
    assert not network._forward_hooks


def test_known_caches_windows_and_masks_are_refused(package, given):
    arguments = given()
    arguments["model"].model_options["transformer_options"]["easycache"] = object()
    with pytest.raises(ValueError, match=r"cache \(easycache\)"):
        fit(package, arguments)
    arguments = given()
    arguments["model"].wrappers["diffusion_model"] = {"TeaCache": [print]}
    with pytest.raises(ValueError, match=r"cache \(TeaCache\)"):
        fit(package, arguments)
    arguments = given()
    arguments["model"].model_options["context_handler"] = object()
    with pytest.raises(ValueError, match="context windows"):
        fit(package, arguments)
    arguments = given()
    arguments["latent"]["noise_mask"] = torch.ones(1, 1, 16, 16)
    with pytest.raises(ValueError, match="noise mask"):
        fit(package, arguments)
    with pytest.raises(ValueError, match="one tensor"):
        fit(package, given(latent={"samples": [torch.zeros(1, 1, 2, 3)]}))
    with pytest.raises(ValueError, match=r"one tensor of images, .* got Tensor of shape \(0, 1, 2, 3\)"):
        fit(package, given(latent={"samples": torch.zeros(0, 1, 2, 3)}))


def test_the_timesteps_are_those_of_comfyui(package, given, kinds):
    """Distilled models know 50 levels, whose timesteps are not 0 to 49."""

    class Distilled(kinds["discrete"]):
        def __init__(self):
            super().__init__()
            self.sigmas = self.sigmas[19::20].clone()
            self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

        def timestep(self, sigma):
            return super().timestep(sigma) * 20 + 19

    arguments = given(Distilled(), tuning_calls=0)
    _, _, _, found = fit(package, arguments)
    sampling = arguments["model"].model.model_sampling
    assert float(found.schedule.timesteps[0]) == 999
    assert torch.equal(found.schedule.timesteps, sampling.timestep(found.sigmas()[:-1]).double())
    assert bool(torch.isin(found.sigmas()[:-1], sampling.sigmas).all())


def test_unknown_noise_is_refused(package, given, kinds):
    class Odd(kinds["continuous"]):
        def noise_scaling(self, sigma, noise, latent):
            return noise * sigma**2 + latent

    with pytest.raises(ValueError, match=r"in a way that fastsched does not know \(Odd"):
        fit(package, given(Odd()))
    for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW"):
        images = type(name, (kinds["continuous"],), {})()
        with pytest.raises(ValueError, match="turns one image into another"):
            fit(package, given(images))


def test_it_works_in_inference_mode(package, given):
    with torch.inference_mode():
        sigmas, _, _, found = fit(package, given(sampler="fitted", steps=3, tuning_calls=30))
        image, _ = node(package, "Inspect")().inspect(found, 3)
        fit(package, given(steps=2, tuning_calls=30))
    assert len(sigmas) == 4
    assert bool(image.isfinite().all())


def test_an_empty_latent_is_measured_at_the_size_that_is_sampled(package, given, monkeypatch):
    def half(model, latent_image, downscale_ratio_spacial=None):
        """As newer versions of ComfyUI do for a model whose latents are smaller than those of the LATENT."""
        return latent_image[..., :1] if downscale_ratio_spacial == 8 else latent_image

    monkeypatch.setattr(sys.modules["comfy.sample"], "fix_empty_latent_channels", half)
    latent = {"samples": torch.zeros(2, 1, 6, 2), "downscale_ratio_spacial": 8, "batch_index": [0, 1]}
    assert fit(package, given(latent=latent))[3].stats.shape == (1, 6, 1)


def test_sigmas_that_are_none_are_told(package, given, kinds):
    sampling = kinds["flow"]()
    sampling.sigma_max = torch.tensor(math.nan)
    with pytest.raises(ValueError, match=r"sigmas must be from one number up to a larger one, got .* to nan"):
        fit(package, given(sampling))


def test_an_answer_of_another_shape_is_refused(package, given):
    arguments = given()
    arguments["model"].model_options["sampler_post_cfg_function"] = [lambda told: told["denoised"][:1]]
    with pytest.raises(ValueError, match=r"answered with a tensor of shape \(1, 1, 2, 3\) about one of shape \(2,"):
        fit(package, arguments)


def test_out_of_memory_is_told_as_comfyui_knows_it(package, given):
    arguments, calls = given(), []

    def full(told):
        calls.append(1)
        if len(calls) > 30:
            raise torch.cuda.OutOfMemoryError("Allocation on device")
        return told["denoised"]

    arguments["model"].model_options["sampler_post_cfg_function"] = [full]
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Allocation on device"):
        fit(package, arguments)


def test_inspect_draws_the_schedule_and_its_curve(package, given):
    found = fit(package, given())[3]
    image, text = node(package, "Inspect")().inspect(found, 5)
    assert image.ndim == 4
    assert (image.shape[0], image.shape[-1], image.dtype) == (1, 3, torch.float32)
    assert 0 <= float(image.min()) < 0.3 < float(image.max()) <= 1
    assert "predicted error" in text
    alone, _ = node(package, "Inspect")().inspect(dataclasses.replace(found, stats=None))
    assert alone.shape[2] < image.shape[2]


def test_steps_needed_are_those_of_fastsched(package, given):
    found = fit(package, given())[3]
    steps, text = node(package, "StepsNeeded")().needed(found, "karras", 4)
    assert steps == fs.steps_needed(found.stats, "dpmpp_2m", target=("karras", 4))
    assert text == f"{steps} fitted steps of dpmpp_2m are as good as 4 of karras"
    own = fit(package, given(sampler="fitted"))[3]
    assert node(package, "StepsNeeded")().needed(own, "karras", 4)[1].endswith("as good as 4 of karras with dpmpp_2m")
    with pytest.raises(ValueError, match="must come from Fit Schedule"):
        node(package, "StepsNeeded")().needed(dataclasses.replace(found, stats=None), "karras", 4)


def test_what_is_saved_is_listed_and_loads_the_same(package, comfy, given, kinds):
    for kind in ("discrete", "zero SNR", "flow"):
        sigmas, _, _, found = fit(package, given(kinds[kind]()))
        file = node(package, "Save")().save(found, "mine")["result"][0]
        assert file in node(package, "Load").INPUT_TYPES()["required"]["file"][0]
        assert node(package, "Load").VALIDATE_INPUTS(file) is True
        again, _, text, _ = node(package, "Load")().load(file)
        assert torch.equal(again, sigmas)
        assert "dpmpp_2m, 4 steps" in text
        kept = fs.Schedule.load(comfy.home / "output" / "fastsched" / file.removesuffix(" [output]"))
        assert math.isinf(float(kept.sigmas[0])) == (kind == "zero SNR")
    names = sorted(os.listdir(comfy.home / "output" / "fastsched"))
    assert names == ["mine.json", "mine_00002.json", "mine_00003.json"]


def test_fit_saves_under_a_plain_name_only(package, comfy, given):
    text = fit(package, given(save_as="by fit"))[2]
    assert "saved as by fit.json [output]" in text
    for name in ("../x", "a/b", ".hidden", "", " ", "a\\b", "x" * 200, "a\0b", None, 3):
        if isinstance(name, str) and name.strip():
            with pytest.raises(ValueError, match="must be of letters"):
                fit(package, given(save_as=name))
        if name is not None:
            assert "must be of letters" in node(package, "Save").VALIDATE_INPUTS(name)
    for name, reason in (("NUL", "device"), ("com1", "device"), ("aux.a", "device"), ("\u65e5" * 90, "270; shorten")):
        assert reason in node(package, "Save").VALIDATE_INPUTS(name)
    assert node(package, "Save").VALIDATE_INPUTS("console") is True
    assert node(package, "Save").VALIDATE_INPUTS("\u65e5" * 80) is True
    assert node(package, "Save").VALIDATE_INPUTS(None) is True
    assert sorted(path.name for path in comfy.home.rglob("*.json") if "user" not in path.parts) == ["by fit.json"]


def test_a_fit_that_cannot_be_saved_is_not_lost(package, comfy, given):
    (comfy.home / "output").mkdir(exist_ok=True)
    (comfy.home / "output" / "fastsched").write_text("a file where the folder should be")
    sigmas, _, text, _ = fit(package, given(save_as="mine"))
    assert len(sigmas) == 5
    assert "warning: not saved" in text
