"""Scheduler classes of a user's own, and methods that were set on a scheduler by hand."""

import copy
import threading
import warnings

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from pipelines import oracle_pipeline

from fastsched.diffusers.applier import check_derived
from fastsched.diffusers.conventions import SCHEDULERS, describe
from fastsched.selection.starts import even_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Euler = diffusers.EulerDiscreteScheduler


class OtherSign(Euler):
    def step(self, model_output, *args, **kwargs):
        return super().step(-model_output, *args, **kwargs)


class OtherInput(Euler):
    def scale_model_input(self, sample, timestep):
        return 0.9 * super().scale_model_input(sample, timestep)


class OtherOutput(diffusers.DPMSolverMultistepScheduler):
    def convert_model_output(self, model_output, *args, sample, **kwargs):
        return super().convert_model_output(0.9 * model_output, *args, sample=sample, **kwargs)


class Noisy(Euler):
    def step(self, *args, return_dict=True, **kwargs):
        latents = super().step(*args, return_dict=False, **kwargs)[0]
        return (latents + 0.05 * torch.randn_like(latents),)


class Watched(Euler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class Exact(Euler):
    """A solver of its own: Euler's step in another form."""

    def step(self, model_output, timestep, sample, return_dict=True, **_):
        if self.step_index is None:
            self._init_step_index(timestep)
        now, then = self.sigmas[self.step_index : self.step_index + 2]
        self._step_index += 1
        denoised = sample - now * model_output
        latents = denoised + then / now * (sample - denoised)
        return (latents, denoised) if not return_dict else diffusers.schedulers.SchedulerOutput(latents)


class OfOneShape(diffusers.FlowMatchEulerDiscreteScheduler):
    """For latents in a sequence, as FLUX has them; OraclePipeline's are not."""

    def step(self, model_output, timestep, sample, **kwargs):
        _, _, _ = sample.shape
        return super().step(model_output, timestep, sample, **kwargs)


class Logging(Euler):
    """Holds what cannot be copied, as a log file does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock, self.seen = threading.Lock(), []

    def step(self, model_output, timestep, sample, **kwargs):
        with self.lock:
            self.seen.append(float(timestep))
        return super().step(model_output, timestep, sample, **kwargs)


def pipeline_of(scheduler):
    pipe = oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [OtherSign, OtherInput, OtherOutput, Noisy])
def test_a_class_that_does_not_step_as_its_base_is_refused(kind):
    pipe, base = pipeline_of(kind(**SD)), kind.__mro__[1].__name__
    told = f"{kind.__name__} does not scale the network's input, read its outputs or step as {base} does"
    with pytest.raises(ValueError, match=told):
        fs.diffusers.measure(pipe, levels=12, samples=1, progress=False)
    with pytest.raises(ValueError, match=told):
        fs.diffusers.apply(even_schedule(describe(pipe.scheduler).process, 4, "fitted"), pipe)


@pytest.mark.parametrize("kind", [Watched, Exact])
def test_a_class_that_steps_as_its_base_is_measured_alike(kind):
    one, other = (
        fs.diffusers.measure(pipeline_of(each(**SD)), levels=12, samples=1, progress=False) for each in (kind, Euler)
    )
    assert torch.equal(one.gram, other.gram)


def test_a_class_whose_steps_cannot_be_tried_is_measured_with_a_warning():
    pipe = pipeline_of(OfOneShape(shift=3.0))
    with pytest.warns(UserWarning, match=r"OfOneShape is measured as FlowMatchEuler.*too many values to unpack"):
        found = fs.diffusers.measure(pipe, levels=12, samples=1, progress=False)
    plain = pipeline_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(found.gram, fs.diffusers.measure(plain, levels=12, samples=1, progress=False).gram)


def test_a_scheduler_that_holds_what_cannot_be_copied_is_used_and_left_alone():
    pipe = pipeline_of(Logging(**SD))
    own = pipe.scheduler
    schedule = fs.diffusers.fit(pipe, 4, levels=12, samples=1, model_calls=100, progress=False)
    assert pipe.scheduler is own
    assert own.seen == []
    fs.diffusers.apply(schedule, pipe)
    pipe(num_inference_steps=4)
    assert len(pipe.scheduler.seen) == 4
    assert pipe.scheduler.lock is own.lock


@pytest.mark.filterwarnings("ignore:Should have tb:UserWarning")  # rounding in torchsde
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_class_that_changes_nothing_is_known_whatever_its_base(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="this class draws its noise by it")
    base = getattr(diffusers, name)
    check_derived(type("Mine", (base,), {})())


@pytest.mark.parametrize("name", ["step", "scale_model_input", "convert_model_output"])
def test_a_method_that_was_set_by_hand_is_not_left_out_of_a_measurement_without_a_word(name):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    own, called = getattr(copy.deepcopy(scheduler), name), []
    setattr(scheduler, name, lambda *args, **kwargs: called.append(1) or own(*args, **kwargs))
    pipe, schedule = pipeline_of(scheduler), even_schedule(describe(scheduler).process, 4, "dpmpp_2m")
    text = f"the {name} that was set on this DPMSolverMultistepScheduler object by hand is not used"
    for function, given in ((fs.diffusers.measure, {"levels": 12, "samples": 1}), (apply_to, {"schedule": schedule})):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(pipe, **given)
        assert any(text in str(each.message) for each in found)
    pipe(num_inference_steps=4)
    assert not called


def apply_to(pipe, schedule):
    fs.diffusers.apply(schedule, pipe)
