"""Runs of a pipeline from given noise, where the pipeline reads its scheduler's sigmas or copies its scheduler."""

import copy
import functools

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
}


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


def fitted(pipe, steps=5, **options):
    return fs.diffusers.fit(pipe, steps, levels=16, samples=2, model_calls=150, progress=False, **options)


@functools.cache
def usual(name, steps, solver):
    """The schedule of a pipeline with the usual loop."""
    return fitted(oracle_pipeline(SCHEDULERS[name](), mixture()), steps, solver=solver)


def check_same(found, expected):
    torch.testing.assert_close(found.sigmas, expected.sigmas, rtol=5e-3, atol=0.0)  # sigmas and timesteps are rounded
    assert found.measured_error == pytest.approx(expected.measured_error, rel=0.02)


class BySigmas(OraclePipeline):
    """Tells its network the level by ``scheduler.sigmas``, as Cosmos does."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent"):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(self.scheduler.timesteps):
            sigma = self.scheduler.sigmas[i]
            convention = self.unet.convention
            self.told.append((float(sigma), float(convention.process.sampler_sigma(convention.levels(t)))))
            told = sigma * 1000 if convention.process.kind == "flow" else t
            given = self.scheduler.scale_model_input(latents, t) if convention.scaled else latents
            latents = self.scheduler.step(self.unet(given, told)[0], t, sample=latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize(
    ("name", "solver", "steps"), [*((name, None, 5) for name in SCHEDULERS), ("flow heun", "fitted", 4)]
)
def test_a_pipeline_that_reads_the_sigmas_is_run_at_the_right_levels(name, solver, steps):
    scheduler = SCHEDULERS[name]()
    pipe = BySigmas(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    pipe.told = []
    found = fitted(pipe, steps, solver=solver)
    assert pipe.told
    for sigma, of_timestep in pipe.told:
        assert sigma == pytest.approx(of_timestep, rel=2e-3)
    check_same(found, usual(name, steps, solver))


class Listing(OraclePipeline):
    """Makes a list with an entry for each of its steps, as Ideogram4 does, and gives its scheduler a list of sigmas."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", listed=True):
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        self.scheduler.set_timesteps(**({"sigmas": sigmas} if listed else {"num_inference_steps": num_inference_steps}))
        scales = [1.0] * num_inference_steps
        latents = torch.randn(images, *SHAPE)
        for i, t in enumerate(self.scheduler.timesteps):
            output = scales[i] * self.unet(latents, t)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        assert i == len(scales) - 1
        return latents


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("solver", [None, "fitted"])
def test_a_pipeline_may_make_a_list_by_its_number_of_steps(listed, solver):
    scheduler = SCHEDULERS["flow euler"]()
    pipe = Listing(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    found = fitted(pipe, solver=solver, listed=listed)
    check_same(found, usual("flow euler", 5, solver))


class UncopiedUNet(OracleUNet):
    def __deepcopy__(self, memo):
        raise AssertionError("a network is copied with the scheduler")


class WithSound(OraclePipeline):
    """Steps a second part of its sample by a copy of its scheduler, made before or after ``set_timesteps``.

    Attributes:
        starts: What both parts were after their first step.
    """

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", late=False):
        both = {"image": self.scheduler}
        if not late:
            both["sound"] = copy.deepcopy(self.scheduler)
        for scheduler in both.values():
            scheduler.set_timesteps(num_inference_steps)
        if late:
            both["sound"] = copy.deepcopy(self.scheduler)
        latents = {name: torch.randn(images, *SHAPE) for name in both}
        for i, t in enumerate(self.scheduler.timesteps):
            outputs = {name: self.unet(part, t)[0] for name, part in latents.items()}
            for name, scheduler in both.items():
                latents[name] = scheduler.step(outputs[name], t, latents[name], return_dict=False)[0]
            if i == 0:
                self.starts.append(latents.copy())
        return latents["image"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("solver", [None, "fitted"])
def test_a_pipeline_may_copy_its_scheduler(late, solver):
    scheduler = SCHEDULERS["flow euler"]()
    pipe = WithSound(UncopiedUNet().answer_for(scheduler, mixture()), scheduler)
    pipe.starts = []
    found = fitted(pipe, solver=solver, late=late)
    check_same(found, usual("flow euler", 5, solver))
    measured = pipe.starts[:2]  # of two samples each
    for start in pipe.starts[2:]:  # both parts begin where they were measured
        which = next(known for known in measured if torch.equal(known["image"], start["image"]))
        assert torch.equal(which["sound"], start["sound"])
        assert not torch.equal(start["sound"], start["image"])


class Interruptible(OraclePipeline):
    """Ends its loop early or changes its latents, as diffusers' pipelines do where a callback asks them to."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, images=2, output_type="latent", change=None, stop=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(images, *SHAPE)
        for i, t in enumerate(self.scheduler.timesteps):
            if stop is not None and stop(i):
                continue
            latents = self.scheduler.step(self.unet(latents, t)[0], t, latents, return_dict=False)[0]
            if change is not None:
                latents = change(i, latents)
        return latents


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        ({"change": lambda i, latents: 1.2 * latents if i == 2 else latents}, "changed the latents between steps 2"),
        ({"change": lambda i, latents: latents + (i == 3)}, "changed the latents between steps 3 and 4"),
        ({"stop": lambda i: i == 2}, "timestep|with 1 of its steps left"),
        ({"stop": lambda i: i > 2}, "ended its run with 3 of its steps left"),
        ({"stop": lambda i: True}, "ended its run with all of its steps left"),
    ],
)
def test_a_callback_of_which_the_statistics_do_not_tell_is_noticed(callback, reason):
    scheduler = SCHEDULERS["flow euler"]()
    pipe = Interruptible(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    stats = fs.diffusers.measure(pipe, levels=16, keep_increments=True, progress=False)
    options = {"stats": stats, "model_calls": 60, "progress": False}
    assert fs.diffusers.fit(pipe, 5, **options, change=lambda i, latents: latents).steps == 5
    with pytest.raises(ValueError, match=reason):
        fs.diffusers.fit(pipe, 5, **options, **callback)
