"""What a scheduler of diffusers means, where no other test tells."""

import warnings

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import SHAPE, OraclePipeline, OracleUNet, oracle_pipeline

from fastsched.diffusers.conventions import describe

SETTINGS = {"levels": 12, "samples": 2, "progress": False}


def mixture():
    return fs.oracles.GaussianMixture.random(8, 3, seed=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_that_are_not_multiplied(shift):
    """ACE-Step and Stable Audio 3 have ``num_train_timesteps=1``: the network is given the flow time itself."""
    usual = oracle_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), mixture())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=shift)
    pipe = oracle_pipeline(scheduler, mixture())
    stats, wanted = (fs.diffusers.measure(each, **SETTINGS) for each in (pipe, usual))
    torch.testing.assert_close(stats.s, wanted.s, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.gram, wanted.gram, rtol=1e-4, atol=1e-5 * float(wanted.gram.abs().max()))
    schedule = fs.diffusers.fit(pipe, 4, stats=stats, model_calls=40, progress=False)
    assert fs.diffusers.apply(schedule, pipe).exact
    pipe.scheduler.set_timesteps(9)
    torch.testing.assert_close(pipe.scheduler.timesteps.double(), schedule.sigmas[:-1], rtol=1e-6, atol=0)


class ToldLate(diffusers.FlowMatchEulerDiscreteScheduler):
    """Tells the network other times than its sigmas."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.timesteps = self.timesteps * 0.95


def test_other_times_than_those_of_the_sigmas_are_noticed():
    scheduler = ToldLate(num_train_timesteps=1)
    schedule = fs.Schedule(torch.tensor([1.0, 0.7, 0.3, 0.0]), "ddim", "flow")
    with pytest.raises(ValueError, match="ToldLate does not step through its sigmas"):
        fs.diffusers.export(schedule, scheduler)


class Combined(diffusers.DiffusionPipeline):
    """Calls a pipeline made of the same components, as KandinskyV22CombinedPipeline does."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.decoder_pipe = OraclePipeline(unet, scheduler)

    def __call__(self, num_inference_steps=50):
        return self.decoder_pipe(num_inference_steps=num_inference_steps)


def test_a_combined_pipeline_is_refused_with_the_name_of_its_part():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = Combined(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    schedule = schedule_for(scheduler)
    for function in (lambda of: fs.diffusers.apply(schedule, of), lambda of: fs.diffusers.measure(of, **SETTINGS)):
        with pytest.raises(ValueError, match=r"Combined calls pipelines that have .*, pipe\.decoder_pipe"):
            function(pipe)
        assert function(pipe.decoder_pipe) is not None
    assert pipe(num_inference_steps=9).shape == (2, *SHAPE)
    assert len(pipe.decoder_pipe.scheduler.timesteps) == 3


class Wrapper:
    """Calls a pipeline that it wraps."""

    def __init__(self, pipe):
        self.module = pipe

    def __call__(self, num_inference_steps=50):
        return self.module(num_inference_steps=num_inference_steps)


class HandsOn(Wrapper):
    def __getattr__(self, name):
        return getattr(self.module, name)


class ReadOnly(Wrapper):
    @property
    def scheduler(self):
        return self.module.scheduler


class Replaceable(Wrapper):
    @property
    def scheduler(self):
        return self.module.scheduler

    @scheduler.setter
    def scheduler(self, scheduler):
        self.module.scheduler = scheduler


class HoldsToo(Wrapper):
    def __init__(self, pipe):
        super().__init__(pipe)
        self.scheduler = pipe.scheduler


def schedule_for(scheduler):
    process = describe(scheduler).process
    levels = process.nearest(process.levels(3))
    return fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "ddim")


@pytest.mark.parametrize("kind", [HandsOn, ReadOnly])
def test_a_wrapper_whose_scheduler_is_another_object_s_is_refused(kind):
    """A schedule that is set on it would not be used."""
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(), mixture())
    wrapper = kind(pipe)
    for use in (
        lambda: fs.diffusers.apply(schedule_for(pipe.scheduler), wrapper),
        lambda: fs.diffusers.measure(wrapper),
    ):
        with pytest.raises(TypeError, match=r"pass the pipeline that it wraps, pipe\.module"):
            use()


def test_a_wrapper_beside_whose_scheduler_another_is_used_is_told_so():
    pipe = oracle_pipeline(diffusers.DDIMScheduler(clip_sample=False), mixture())
    wrapper = HoldsToo(pipe)
    with pytest.warns(UserWarning, match=r"apply the schedule to pipe\.module"):
        fs.diffusers.apply(schedule_for(pipe.scheduler), wrapper)
    with pytest.raises(ValueError, match=r"does it call another pipeline.* Pass that one"):
        fs.diffusers.measure(wrapper, **SETTINGS)


@pytest.mark.filterwarnings("ignore:no call of the pipeline's networks is seen")
def test_a_wrapper_that_lets_its_pipeline_s_scheduler_be_replaced_is_used_and_left_as_it_was():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(), mixture())
    own, wrapper = pipe.scheduler, Replaceable(pipe)
    fs.diffusers.measure(wrapper, **SETTINGS)
    assert pipe.scheduler is own
    fs.diffusers.apply(schedule_for(own), wrapper)
    assert len(wrapper(num_inference_steps=9)) == 2
    assert len(pipe.scheduler.timesteps) == 3


class WithAnother(OraclePipeline):
    """Has a loop of its own, and holds a pipeline of another model, as for upscaling."""

    def __init__(self, unet, scheduler):
        super().__init__(unet, scheduler)
        self.upscaler = oracle_pipeline(diffusers.DDIMScheduler(clip_sample=False), mixture())


def test_a_pipeline_that_also_holds_another_is_measured():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = WithAnother(OracleUNet().answer_for(scheduler, mixture()), scheduler)
    assert fs.diffusers.measure(pipe, **SETTINGS).samples == 2


def test_a_setting_that_was_changed_since_the_scheduler_was_made_is_kept():
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**settings)
    scheduler.register_to_config(prediction_type="flow_prediction")
    usual = diffusers.UniPCMultistepScheduler(**settings, prediction_type="flow_prediction")
    stats, right = (
        fs.diffusers.measure(oracle_pipeline(each, mixture()), levels=12, samples=2) for each in (scheduler, usual)
    )
    assert torch.equal(stats.gram, right.gram)


class Clamped(diffusers.DPMSolverMultistepScheduler):
    def convert_model_output(self, *args, **kwargs):
        return super().convert_model_output(*args, **kwargs).clamp(-1, 1)


class Copied(diffusers.EulerDiscreteScheduler):
    def scale_model_input(self, *args, **kwargs):
        return super().scale_model_input(*args, **kwargs).clone()


class Counted(diffusers.DDIMScheduler):
    def step(self, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "method"), [(Clamped, "convert_model_output"), (Copied, "scale_model_input"), (Counted, None)]
)
def test_a_class_of_the_users_own_is_measured_as_its_base_with_a_warning(kind, method):
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.register_to_config(clip_sample=False)
    pipe = oracle_pipeline(scheduler, mixture())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        fs.diffusers.measure(pipe, levels=8, samples=1, progress=False)
    found = [str(each.message) for each in caught if "has its own" in str(each.message)]
    assert len(found) == (method is not None)
    if method is not None:
        assert found[0].startswith(f"{kind.__name__} has its own {method}, but is measured as {kind.__base__.__name__}")


@pytest.mark.parametrize("train_steps", [1000, 1])
def test_an_inverted_scheduler_is_refused_with_an_advice_that_works(train_steps):
    oracle = fs.oracles.GaussianMixture.random(8, 3, seed=0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_steps, invert_sigmas=True)

    def network(x, timestep):
        """``dx / d(1 - t)``, which is ``x0 - eps``."""
        time = (1 - timestep[:1].double() / train_steps).clamp(1e-6, 1 - 1e-6)
        return ((oracle.denoise(x.double() / (1 - time), time / (1 - time)) - x) / time).to(x)

    with pytest.raises(ValueError, match=r"invert_sigmas=True .* measure its network") as refused:
        describe(scheduler)
    advice = str(refused.value).split("network, ")[1].split(", by")[0]
    denoiser = eval(advice, {"fastsched": fs, "network": network})
    schedule = fs.optimal_schedule(fs.measure(denoiser, (8,), levels=12, samples=2), 4, "ddim")
    scheduler.set_timesteps(sigmas=schedule.sigmas[:-1].tolist())
    noise = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.reshape(1)), t, x).prev_sample
    torch.testing.assert_close(x, fs.sample(denoiser, schedule, noise=noise), rtol=1e-4, atol=1e-4)  # float32
