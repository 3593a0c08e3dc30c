"""A scheduler with an applied schedule: copied, pickled, asked to start midway, given lists."""

import contextlib
import copy
import inspect
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from applied_schedules import SCHEDULERS, SD, STEPS, Pipe, applied_to, uneven

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.schedulers.exporter import plain_copy
from fastsched.diffusers.schedulers.overrides import Timesteps
from fastsched.diffusers.schedulers.probe import oracle_network, scales, states_of
from fastsched.sampling.origin import Origin


def sampled(scheduler):
    """The states of a sampling loop, whose network is the exact denoiser of a Gaussian."""
    scheduler.set_timesteps(30)
    convention = describe(scheduler)
    network = oracle_network(convention, lambda y, s: 0.49 * s * y / (0.49 + s**2) if s < 1e6 else 0 * y)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = convention.process.level(fs.Schedule.from_levels(convention.process, top(convention), "ddim").sigmas[:1])
    at = lambda x, t: network(x, convention.levels(torch.as_tensor(t).reshape(1)))
    return list(states_of(scheduler, at, float(scales(convention, first)[1]) * noise))


def top(convention):
    return torch.tensor([convention.process.s_max, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))], ids=["deepcopy", "pickle"]
)
def test_a_copy_keeps_the_schedule_and_samples_alike(kind, duplicate):
    name, config = SCHEDULERS[kind]
    scheduler, _ = applied_to(getattr(diffusers, name)(**config))
    before = duplicate(scheduler)  # never used
    states = sampled(scheduler)
    for other in (before, duplicate(scheduler)):  # and in the midst of a run
        assert type(other) is type(scheduler)
        assert inspect.signature(other.set_timesteps) == inspect.signature(
            getattr(diffusers, name)(**config).set_timesteps
        )
        again = sampled(other)
        assert len(again) == len(states)
        assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
        assert torch.equal(torch.as_tensor(other.timesteps), torch.as_tensor(scheduler.timesteps))
    scheduler.set_timesteps(7)  # the copies do not share state with it
    assert len(other.timesteps) == len(scheduler.timesteps)


def test_saving_says_that_the_schedule_is_not_saved(tmp_path):
    name, config = SCHEDULERS["assigned"]
    scheduler, _ = applied_to(getattr(diffusers, name)(**config))
    with pytest.warns(UserWarning, match=f"{name} is saved without the schedule"):
        scheduler.save_pretrained(tmp_path)
    read = getattr(diffusers, name).from_pretrained(tmp_path)
    for each in (scheduler, read):
        each.set_timesteps(STEPS)
    assert not torch.equal(read.sigmas, scheduler.sigmas)  # what the warning is about


@pytest.mark.parametrize("kind", ["assigned", "stepped", "arguments", "flow"])
def test_a_step_that_was_set_by_hand_is_not_left_out_without_a_word(kind):
    """Many programs wrap ``pipe.scheduler.step``, to look at the latents or to change them."""
    name, config = SCHEDULERS[kind]
    own, called = getattr(diffusers, name)(**config), []
    schedule, pipe = uneven(describe(own).process), Pipe(own)

    def wrapped(scheduler):
        step = scheduler.step
        scheduler.step = lambda *args, **kwargs: called.append(1) or step(*args, **kwargs)

    def warned(function, *arguments):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            result = function(*arguments)
        return result, any(f"set on this {name} object by hand is not used" in str(each.message) for each in found)

    wrapped(own)
    assert warned(fs.diffusers.apply, schedule, pipe)[1]
    right, again = warned(sampled, pipe.scheduler)
    assert not again
    wrapped(pipe.scheduler)
    states, again = warned(sampled, pipe.scheduler)
    assert again
    assert not called
    assert all(torch.equal(a, b) for a, b in zip(states, right, strict=True))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_whose_attributes_are_saved_and_restored_at_each_step_samples_alike(kind):
    """As StableDiffusionPanoramaPipeline does, for each of its views."""
    name, config = SCHEDULERS[kind]
    plain, restored = (applied_to(getattr(diffusers, name)(**config))[0] for _ in range(2))
    plain.set_timesteps(STEPS)
    restored.set_timesteps(STEPS)
    first = last = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in plain.timesteps:
        vars(restored).update(copy.deepcopy(vars(restored)))
        inputs = [first, last]
        if hasattr(plain, "scale_model_input"):
            inputs = [plain.scale_model_input(first, t), restored.scale_model_input(last, t)]
        assert torch.equal(*inputs)
        first, last = plain.step(inputs[0], t, first).prev_sample, restored.step(inputs[1], t, last).prev_sample
        vars(restored).update(copy.deepcopy(vars(restored)))
        assert torch.equal(first, last)


def test_timesteps_are_plain_but_for_a_start_midway():
    plain = torch.arange(8, 0, -1)
    timesteps = Timesteps.of(plain, lambda index: torch.tensor([index]))
    assert torch.equal(timesteps[20:], torch.tensor([20]))
    assert torch.equal(timesteps[-20:], torch.tensor([-20]))
    assert not timesteps.compared
    for result in (timesteps[:3], timesteps[0:], timesteps[2], timesteps[1:3], timesteps + 0, timesteps < 3):
        assert type(result) is torch.Tensor
    assert timesteps.compared
    assert [int(t) for t in timesteps] == plain.tolist()
    assert len(timesteps) == 8
    for copied in (copy.deepcopy(timesteps), pickle.loads(pickle.dumps(timesteps))):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, plain)


def test_a_loop_over_all_timesteps_but_the_last_makes_every_step():
    """Loops of LTX leave out the timestep of sigma 0, which their scheduler lists and an applied schedule does not."""
    pipe = SimpleNamespace(scheduler=diffusers.LTXEulerAncestralRFScheduler())
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    fs.diffusers.apply(fs.Schedule(sigmas, "ddim", "flow"), pipe)
    scheduler, given = pipe.scheduler, []
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])
    x, data = torch.randn(1, 4, 8, 8), torch.full((1, 4, 8, 8), 0.5)
    for t in scheduler.timesteps[:-1]:
        given.append(float(t))
        x = scheduler.step((x - data) / (t / 1000), t, x, return_dict=False)[0]
    assert given == pytest.approx([1000, 800, 500, 200])
    assert torch.allclose(x, data, atol=1e-5)  # float32


def test_a_loop_that_rounds_the_first_timestep_is_told_so_at_the_next():
    """UniPC takes an unknown first timestep for the last one, and fails at the second step (SkyReels V2)."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe = SimpleNamespace(scheduler=diffusers.UniPCMultistepScheduler(**config))
    fs.diffusers.apply(fs.Schedule([1.0, 0.8, 0.5, 0.2, 0.0], "unipc", "flow"), pipe)
    pipe.scheduler.set_timesteps(4)
    x = pipe.scheduler.step(torch.ones(1, 4, 2, 2), 999, torch.ones(1, 4, 2, 2), return_dict=False)[0]
    with pytest.raises(ValueError, match=r"timestep 999, which is none of the applied schedule's.*round the timesteps"):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[1], x)


def midway_timesteps(scheduler, steps, start):
    """What the network is given when a pipeline starts at index ``start`` of ``steps``."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return timesteps


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(("steps", "start"), [(50, 20), (50, 45), (8, 3), (STEPS, 1)])
def test_a_start_midway_is_where_the_scheduler_itself_would_start(kind, steps, start):
    """Its own level first, then the schedule's levels below it, to sigma 0; states follow them."""
    name, config = SCHEDULERS[kind]
    plain = getattr(diffusers, name)(**config)
    scheduler, schedule = applied_to(plain)
    own = plain_copy(plain)
    own.set_timesteps(steps)
    index = start * scheduler.order
    timesteps = midway_timesteps(scheduler, steps, index)
    expected = float(own.timesteps[index])
    assert float(timesteps[0]) == pytest.approx(expected, rel=1e-4)  # Heun interpolates sigma linearly
    convention = describe(plain)
    level = float(convention.levels(own.timesteps[index].reshape(1)))
    if kind not in ("stepped", "angles"):  # which keep no sigmas
        used = torch.unique_consecutive(torch.as_tensor(scheduler.sigmas).double())
        start_sigma = float(convention.process.sampler_sigma(torch.tensor([level], dtype=torch.float64)))
        assert float(used[0]) == pytest.approx(start_sigma, rel=1e-4)
        wanted = schedule.sigmas[schedule.sigmas < start_sigma].tolist()
        assert len(wanted) - 1 <= len(used) - 1 <= len(wanted)  # a level next to the start is left out
        assert used[1:].tolist() == pytest.approx(wanted[-(len(used) - 1) :], rel=1e-4, abs=1e-4)
    # The states from the start on are exact for data without spread, however far apart the levels are.
    network = oracle_network(convention, lambda y, s: torch.ones_like(y))
    alpha, sigma = (float(scale) for scale in scales(convention, torch.tensor([level], dtype=torch.float64)))
    x = alpha + sigma * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        s = convention.levels(torch.as_tensor(t).reshape(1))
        x = scheduler.step(network(scaled, s), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, torch.ones_like(x), rtol=2e-3, atol=2e-3)
    # The next call from the beginning uses the whole schedule again.
    scheduler.set_timesteps(steps)
    whole = torch.unique_consecutive(torch.as_tensor(scheduler.timesteps).double())
    assert len(whole) >= STEPS


def loop_states(scheduler, slices):
    """The last state of a user's own loop over the timesteps that ``slices`` makes of the scheduler's."""
    scheduler.set_timesteps(STEPS)
    convention = describe(scheduler)
    network = oracle_network(convention, lambda y, s: 0.49 * s * y / (0.49 + s**2) if s < 1e6 else 0 * y)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * getattr(scheduler, "init_noise_sigma", 1)
    for t in slices(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        s = convention.levels(torch.as_tensor(t).reshape(1))
        x = scheduler.step(network(scaled, s), t, x, return_dict=False)[0]
    return x


def in_two_parts(timesteps):
    yield from timesteps[:2]
    yield from timesteps[2:]


def with_the_next(timesteps):
    for t, _ in zip(timesteps, [*timesteps[1:], 0], strict=False):
        yield t


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_loop_may_go_on_with_a_slice_and_is_told_to_copy_what_it_slices_before_it_starts(kind):
    name, config = SCHEDULERS[kind]
    scheduler, _ = applied_to(getattr(diffusers, name)(**config))
    expected = loop_states(scheduler, lambda timesteps: timesteps)
    for slices in (in_two_parts, lambda timesteps: with_the_next(timesteps.clone())):
        assert torch.equal(loop_states(scheduler, slices), expected)
    with pytest.raises(ValueError, match=r"slice of (scheduler\.|its )timesteps"):
        loop_states(scheduler, with_the_next)
    assert torch.equal(loop_states(scheduler, lambda timesteps: timesteps), expected)


def test_a_timestep_that_is_not_the_schedule_s_and_one_beyond_its_end_are_named():
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    scheduler, _ = applied_to(diffusers.UniPCMultistepScheduler(**flow))
    with pytest.raises(ValueError, match=r"timestep 921, which is none of the applied schedule's: \[.* 921\.\d"):
        loop_states(scheduler, lambda timesteps: timesteps.long()[1:])
    scheduler.set_timesteps(50)
    with pytest.raises(IndexError, match=f"the applied schedule has {STEPS}; pass num_inference_steps={STEPS}"):
        loop_states(scheduler, lambda timesteps: (timesteps[n] for n in range(50)))


def test_strength_0_leaves_no_steps_as_without_a_schedule():
    scheduler, _ = applied_to(diffusers.DPMSolverMultistepScheduler(**SD))
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps[50:]) == 0


def test_a_start_beyond_the_schedule_names_the_argument():
    scheduler, _ = applied_to(diffusers.DPMSolverMultistepScheduler(**SD))
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="num_inference_steps=6"):
        scheduler.set_begin_index(20)


@contextlib.contextmanager
def warned_of(name):
    """There is a warning that a list of the call's own is not used; others are diffusers'."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    text = f"{name} of this call is not used, because a schedule of {STEPS} steps"
    assert any(text in str(each.message) for each in said)


def test_a_start_counted_from_the_end_is_among_the_steps_that_were_asked_for():
    plain = diffusers.DPMSolverMultistepScheduler(**SD)
    scheduler, schedule = applied_to(plain)
    own = plain_copy(plain)
    own.set_timesteps(20)
    scheduler.set_timesteps(20)
    assert float(scheduler.timesteps[-10:][0]) == float(own.timesteps[-10])
    scheduler.set_timesteps(20)
    assert torch.equal(scheduler.timesteps[-20:], scheduler.timesteps.plain)  # and from the beginning
    with warned_of("timesteps"):
        scheduler.set_timesteps(timesteps=own.timesteps.tolist())  # of a list a pipeline counts what it got
    strength = 0.5  # which is read from here
    assert float(scheduler.timesteps[-int(STEPS * strength) :][0]) == pytest.approx(float(own.timesteps[10]))
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps[-30:]) == schedule.steps


@pytest.mark.parametrize("name", ["sigmas", "timesteps"])
def test_a_list_of_the_call_s_own_is_not_left_out_without_a_word(name):
    scheduler, schedule = applied_to(diffusers.EulerDiscreteScheduler(**SD))
    own = {"sigmas": schedule.sigmas.tolist(), "timesteps": schedule.timesteps.tolist()}[name]
    other = {"sigmas": [10.0, 1.0, 0.0], "timesteps": [900, 500, 100]}[name]
    scheduler.set_timesteps(**{name: own})  # which changes nothing
    with warned_of(name):
        scheduler.set_timesteps(**{name: other})
    assert torch.equal(scheduler.timesteps.plain, torch.as_tensor(own_timesteps(scheduler, schedule)))


def own_timesteps(scheduler, schedule):
    """Those of the applied schedule."""
    scheduler.set_timesteps(50)
    return scheduler.timesteps.plain


def test_a_list_that_a_pipeline_of_flow_models_does_not_make_is_not_left_out_without_a_word():
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler, schedule = applied_to(plain)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())  # as pipelines do
    scheduler.set_timesteps(sigmas=[1.0, *torch.linspace(5, -2, 9).sigmoid().tolist()])  # as Stable Audio 3 does
    for steps in (5, 8, 50):
        even = torch.linspace(1, 0, steps + 1)[:-1]
        normal = (0.5 + 1.75 * torch.special.ndtri(even)).sigmoid().clamp(max=0.9999)
        for own in (even, 3 * even / (1 + 2 * even), normal):  # the last two as ACE-Step and Ideogram 4 do
            scheduler.set_timesteps(sigmas=own.tolist())
            scheduler.set_timesteps(sigmas=own[:-1].tolist())  # as in the runs of a fit
    scheduler.set_timesteps(**fs.diffusers.export(schedule, plain).arguments)
    with warned_of("sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.3])
    for listed in ([1.0, 0.9, 0.3, 0.1], torch.linspace(1, 0.2, 6).square().tolist()):
        with warned_of("sigmas"):
            scheduler.set_timesteps(sigmas=listed)


def test_denoising_start_refuses_decoupled_levels():
    scheduler, _ = applied_to(diffusers.EulerDiscreteScheduler(**SD))
    schedule = uneven(describe(scheduler).process)
    told = schedule.sigmas[:-1] * 0.99
    pipe = Pipe(diffusers.EulerDiscreteScheduler(**SD))
    fs.diffusers.apply(fs.Schedule(schedule.sigmas, "ddim", "vp", network_sigmas=told), pipe)
    pipe.scheduler.set_timesteps(50)
    below = int((pipe.scheduler.timesteps < 500).sum())
    with pytest.raises(ValueError, match="denoising_start"):
        pipe.scheduler.timesteps[-below:]


def test_a_schedule_with_weights_of_its_own_cannot_be_exported_as_arguments():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    schedule = fs.Schedule(torch.tensor([14.0, 1.0, 0.0]), "fitted", "vp", weights=torch.tensor([[1.0, 0], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="must be for a stock solver"):
        fs.diffusers.export(schedule, scheduler)


def test_a_schedule_that_is_rounded_is_applied_with_a_warning():
    """One that lies at integer timesteps, as those measured through a pipeline, is not."""
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    schedule = uneven(describe(scheduler).process)
    between = fs.Schedule(schedule.sigmas * torch.linspace(1, 0.97, STEPS + 1), "ddim", "vp")
    with pytest.warns(
        UserWarning, match=r"DDIMScheduler takes integer timesteps, so the schedule is rounded, by up to"
    ):
        assert not fs.diffusers.apply(between, Pipe(scheduler)).exact
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fs.diffusers.apply(schedule, Pipe(scheduler)).exact


def test_a_schedule_chosen_for_another_solver_is_applied_with_a_warning():
    """One made by hand, which has no origin, is not; nor is one of the scheduler's solver."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    by_hand = replace(uneven(describe(scheduler).process), solver="dpmpp_2m")
    chosen = replace(by_hand, origin=Origin("UNet"))
    text = r"chosen for dpmpp_2m, and FlowMatchEulerDiscreteScheduler samples as ddim.*choose one for solver='ddim'"
    with pytest.warns(UserWarning, match=text):
        assert fs.diffusers.apply(chosen, Pipe(scheduler)).exact
    with pytest.warns(UserWarning, match=text):
        assert fs.diffusers.export(chosen, scheduler).exact
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for schedule in (by_hand, replace(chosen, solver="ddim")):
            assert fs.diffusers.apply(schedule, Pipe(scheduler)).exact
            assert fs.diffusers.export(schedule, scheduler).exact


@pytest.mark.parametrize(
    ("config", "mu", "start"),
    [
        ({}, None, 0.6),
        ({"shift": 3.0}, None, 9 / 11),
        ({"num_train_timesteps": 1}, None, 0.6),
        ({"use_dynamic_shifting": True}, 0.5, 0.7120713),
    ],
)
def test_a_list_of_flow_times_from_below_the_schedule_starts_midway(config, mu, start):
    """Stable Audio 3 mixes given sound with noise of level 0.6, and passes times that start there."""
    pipe = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**config))
    schedule = fs.Schedule(torch.tensor([1.0, 0.9, 0.5, 0.25, 0.0]), "ddim", "flow")
    fs.diffusers.apply(schedule, pipe)
    shifting = {} if mu is None else {"mu": mu}
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 6), **shifting)
    torch.testing.assert_close(pipe.scheduler.sigmas.double(), schedule.sigmas, rtol=1e-5, atol=0)
    pipe.scheduler.set_timesteps(sigmas=[0.6, 0.4, 0.2], **shifting)
    torch.testing.assert_close(pipe.scheduler.sigmas.double(), torch.tensor([start, 0.5, 0.25, 0.0]).double())
    fs.diffusers.apply(fs.Schedule(schedule.sigmas, "fitted", "flow", weights=torch.eye(4).double()), pipe)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 4), **shifting)
    with pytest.raises(ValueError, match=r"sigmas must start at 1, as the schedule does, got 0\.6: a fitted schedule"):
        pipe.scheduler.set_timesteps(sigmas=[0.6, 0.4, 0.2, 0.1], **shifting)
