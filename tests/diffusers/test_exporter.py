"""Schedules given to schedulers of diffusers: the sigmas that they use are those of the schedule."""

import contextlib
import copy
import importlib.util
import inspect
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.schedulers.exporter import EXACT, relative_error
from fastsched.selection.starts import even_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# 845.6 and 0.5 are the values that classes change; the others are as uneven as a schedule's.
VP_TIMESTEPS = torch.tensor([999.0, 845.6, 500.25, 210.4, 60.7, 9.8], dtype=torch.float64)
FLOW_SIGMAS = torch.tensor([1.0, 0.9, 0.5, 0.21, 0.06, 0.0], dtype=torch.float64)


class Pipe:
    """The part of a pipeline that `apply` needs."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


def vp_schedule(scheduler, timesteps=VP_TIMESTEPS):
    s = describe(scheduler).levels(timesteps)
    return fs.Schedule(torch.cat([s, s.new_zeros(1)]), "ddim", "vp")


def arguments_of(schedule, scheduler, **shifting):
    return fs.diffusers.export(schedule, scheduler, **shifting).arguments


def flow_schedule():
    return fs.Schedule(FLOW_SIGMAS, "ddim", "flow")


def used_by_pipeline(scheduler, arguments, **shifting):
    """The sigmas a scheduler holds after a pipeline has passed it ``arguments``."""
    scheduler = copy.deepcopy(scheduler)
    timesteps, count = retrieve_timesteps(scheduler, None, "cpu", **arguments, **shifting)
    assert len(timesteps) == count
    return scheduler.sigmas.double()


def assert_same(used, schedule):
    assert len(used) == len(schedule.sigmas)
    assert used[-1] == 0
    assert relative_error(used, schedule.sigmas) <= EXACT


def test_trap_euler_drops_the_last_sigma():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    schedule = vp_schedule(scheduler)
    naive = used_by_pipeline(scheduler, {"sigmas": schedule.sigmas[:-1].tolist()})
    assert len(naive) == schedule.steps  # one step fewer, and it never reaches 0
    assert_same(used_by_pipeline(scheduler, arguments_of(schedule, scheduler)), schedule)


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 1.15),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.0),
    ],
    ids=["static", "dynamic", "dynamic-linear"],
)
def test_trap_flow_match_shifts_what_it_is_given(config, mu):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    schedule, shifting = flow_schedule(), {} if mu is None else {"mu": mu}
    naive = used_by_pipeline(scheduler, {"sigmas": schedule.sigmas[:-1].tolist()}, **shifting)
    assert relative_error(naive, schedule.sigmas) > 0.1
    if mu is None:
        assert naive[2] == pytest.approx(0.75)
    arguments = arguments_of(schedule, scheduler, **shifting)
    assert_same(used_by_pipeline(scheduler, arguments, **shifting), schedule)


def test_flow_match_with_dynamic_shift_asks_for_mu():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu must be given"):
        arguments_of(flow_schedule(), scheduler)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_match_that_rebuilds_the_interior_is_refused_and_applied(flag):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{flag: True})
    with pytest.raises(ValueError, match=flag):
        arguments_of(flow_schedule(), scheduler)
    assert fs.diffusers.apply(flow_schedule(), Pipe(scheduler)).exact


def test_trap_unipc_takes_sigmas_of_flow_models_alone():
    scheduler = diffusers.UniPCMultistepScheduler(**SD)
    schedule = vp_schedule(scheduler)
    with pytest.raises(ValueError, match="sigmas"):  # older ones take none at all
        used_by_pipeline(scheduler, {"sigmas": schedule.sigmas[:-1].tolist()})
    with pytest.raises(ValueError, match=r"takes no list.*apply"):
        arguments_of(schedule, scheduler)
    assert fs.diffusers.apply(schedule, Pipe(scheduler)).exact

    flow = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    naive = used_by_pipeline(flow, {"sigmas": flow_schedule().sigmas[:-1].numpy()})
    assert naive[2] == pytest.approx(0.75)
    assert_same(used_by_pipeline(flow, arguments_of(flow_schedule(), flow)), flow_schedule())


def test_trap_edm_euler_takes_sigmas_for_a_ramp():
    scheduler = diffusers.EDMEulerScheduler()
    schedule = fs.Schedule(torch.tensor([80.0, 20.0, 3.0, 0.4, 0.02, 0.0]), "ddim", "ve")
    naive = used_by_pipeline(scheduler, {"sigmas": schedule.sigmas[:-1]})
    assert relative_error(naive, schedule.sigmas) > 0.5
    assert_same(used_by_pipeline(scheduler, arguments_of(schedule, scheduler)), schedule)


def test_edm_euler_with_an_exponential_ramp_is_refused_and_applied():
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    schedule = fs.Schedule(torch.tensor([80.0, 3.0, 0.02, 0.0]), "ddim", "ve")
    with pytest.raises(ValueError, match="sigma_schedule"):
        arguments_of(schedule, scheduler)
    assert fs.diffusers.apply(schedule, Pipe(scheduler)).exact


def test_trap_dpm_solver_truncates_timesteps_to_integers():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    schedule = vp_schedule(scheduler)
    cut = used_by_pipeline(scheduler, {"timesteps": VP_TIMESTEPS.tolist()})
    with pytest.warns(UserWarning, match="rounded"):
        arguments = arguments_of(schedule, scheduler)
    assert arguments["timesteps"] == [999, 846, 500, 210, 61, 10]
    rounded = used_by_pipeline(scheduler, arguments)
    assert relative_error(rounded, schedule.sigmas) < relative_error(cut, schedule.sigmas)
    # Half a timestep is at most half of the largest relative distance between neighbouring levels around them.
    assert relative_error(rounded, schedule.sigmas) < 0.03
    assert fs.diffusers.apply(schedule, Pipe(scheduler)).exact  # by assignment
    integer = vp_schedule(scheduler, VP_TIMESTEPS.round())
    assert_same(used_by_pipeline(scheduler, arguments_of(integer, scheduler)), integer)


def test_dpm_solver_that_ends_above_zero_is_refused():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match=r"would end at sigma 0\.029"):
        arguments_of(vp_schedule(scheduler, VP_TIMESTEPS.round()), scheduler)


def test_timesteps_that_round_to_the_same_one_are_refused():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    with pytest.raises(ValueError, match="round to the same"):
        arguments_of(vp_schedule(scheduler, torch.tensor([999.0, 30.3, 29.9])), scheduler)


def test_heun_is_exact_by_fractional_timesteps():
    scheduler = diffusers.HeunDiscreteScheduler(**SD)
    schedule = vp_schedule(scheduler)
    used = used_by_pipeline(scheduler, arguments_of(schedule, scheduler))
    assert_same(torch.cat([used[:1], used[1:-1:2], used[-1:]]), schedule)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_follows_an_applied_schedule_by_its_stride(set_alpha_to_one):
    scheduler = diffusers.DDIMScheduler(**SD, set_alpha_to_one=set_alpha_to_one)
    schedule = vp_schedule(scheduler, VP_TIMESTEPS.round())
    with pytest.raises(ValueError, match="takes no list"):
        arguments_of(schedule, scheduler)
    pipe = Pipe(scheduler)
    proof = fs.diffusers.apply(schedule, pipe)
    assert (proof.way, proof.exact) == ("stepped", True)
    pipe.scheduler.set_timesteps(50)
    assert pipe.scheduler.timesteps.tolist() == VP_TIMESTEPS.round().tolist()


@pytest.mark.parametrize("name", ["PNDMScheduler", "KDPM2AncestralDiscreteScheduler", "CogVideoXDPMScheduler"])
def test_what_cannot_follow_is_refused_with_reasons(name):
    scheduler = getattr(diffusers, name)(**SD)
    pipe = Pipe(scheduler)
    with pytest.raises(ValueError, match=f"{name} cannot be made to use this schedule; change the scheduler"):
        fs.diffusers.apply(vp_schedule(scheduler), pipe)
    assert pipe.scheduler is scheduler


def test_apply_leaves_the_old_scheduler_and_the_signature():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    before = {name: repr(value) for name, value in vars(scheduler).items()}
    pipe = Pipe(scheduler)
    schedule = vp_schedule(scheduler)
    fs.diffusers.apply(schedule, pipe)
    assert {name: repr(value) for name, value in vars(scheduler).items()} == before
    assert pipe.scheduler is not scheduler
    assert type(pipe.scheduler) is type(scheduler)
    assert pipe.scheduler.config == scheduler.config
    assert inspect.signature(pipe.scheduler.set_timesteps) == inspect.signature(scheduler.set_timesteps)
    for call in ({"num_inference_steps": 50}, {"sigmas": [1.0, 0.5, 0.0]}):  # whatever the call asks for
        warned = pytest.warns(UserWarning, match="sigmas of this call is not used")
        with warned if "sigmas" in call else contextlib.nullcontext():
            pipe.scheduler.set_timesteps(**call, device="cpu")
        assert_same(pipe.scheduler.sigmas.double(), schedule)
    duplicate = copy.deepcopy(pipe.scheduler)
    duplicate.set_timesteps(7)
    assert_same(duplicate.sigmas.double(), schedule)
    shorter = vp_schedule(scheduler, VP_TIMESTEPS[::2])
    fs.diffusers.apply(shorter, pipe)  # over the first one
    pipe.scheduler.set_timesteps(50)
    assert_same(pipe.scheduler.sigmas.double(), shorter)


def test_a_class_of_flow_times_that_steps_through_sigmas_of_edm_is_refused():
    """Cosmos 2 writes such a sigma_max into its scheduler's config, and turns the sigmas into flow times by itself."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    schedule = fs.Schedule([1.0, 0.5, 0.0], "ddim", "flow")
    assert fs.diffusers.apply(schedule, SimpleNamespace(scheduler=scheduler)).exact
    scheduler.register_to_config(sigma_max=80.0)
    for given in (schedule, fs.Schedule([80.0, 1.0, 0.0], "ddim", "ve")):
        with pytest.raises(ValueError, match="through sigmas up to 80"):
            fs.diffusers.apply(given, SimpleNamespace(scheduler=scheduler))
    scheduler.register_to_config(use_karras_sigmas=False)  # then the class ignores sigma_max
    assert fs.diffusers.apply(schedule, SimpleNamespace(scheduler=scheduler)).exact


def test_a_schedule_of_another_process_or_range_is_refused():
    euler = diffusers.EulerDiscreteScheduler(**SD)
    with pytest.raises(ValueError, match="'flow' noise process"):
        arguments_of(flow_schedule(), euler)
    with pytest.raises(ValueError, match="trained from 14"):
        arguments_of(fs.Schedule(torch.tensor([80.0, 1.0, 0.1, 0.0]), "ddim", "ve"), euler)
    with pytest.raises(ValueError, match="does not support"):
        arguments_of(flow_schedule(), diffusers.SCMScheduler())


def test_wrong_arguments_are_named():
    euler = diffusers.EulerDiscreteScheduler(**SD)
    schedule = vp_schedule(euler)
    with pytest.raises(TypeError, match="schedule must be"):
        fs.diffusers.apply(schedule.sigmas, Pipe(euler))
    for pipe in (None, euler, Pipe):
        with pytest.raises(TypeError, match="pipe must be"):
            fs.diffusers.apply(schedule, pipe)
    for scheduler in (Pipe(euler), diffusers.EulerDiscreteScheduler, None):
        with pytest.raises(TypeError, match="scheduler must be"):
            arguments_of(schedule, scheduler)
    with pytest.raises(ValueError, match="mu must be None"):
        arguments_of(schedule, euler, mu=1.15)
    with pytest.raises(TypeError, match="mu must be a number"):
        arguments_of(flow_schedule(), diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), mu="1.15")


def test_exporting_leaves_global_random_state_alone():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fs.diffusers.apply(vp_schedule(scheduler), Pipe(scheduler))
    assert torch.rand(1) == expected


def test_export_reports_what_will_be_used():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    schedule = vp_schedule(scheduler)
    proof = fs.diffusers.export(schedule, scheduler)
    assert_same(proof.sigmas, schedule)
    assert proof.deterministic
    assert proof.timestep_error < 1e-3
    np.testing.assert_allclose(describe(scheduler).levels(VP_TIMESTEPS), schedule.sigmas[:-1], rtol=1e-12)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_scheduler_with_another_schedule_applied_is_not_exported_for(fitted):
    """It uses the one that was applied, whatever a call is given."""
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe, schedule = Pipe(scheduler), vp_schedule(scheduler)
    fs.diffusers.apply(schedule, pipe)
    assert fs.diffusers.export(schedule, pipe.scheduler).exact  # the one that it uses
    fs.diffusers.apply(even_schedule(describe(scheduler).process, 5, "fitted" if fitted else "ddim"), pipe)
    with pytest.raises(ValueError, match="scheduler must be the pipeline's own"):
        fs.diffusers.export(schedule, pipe.scheduler)


def test_an_applied_schedule_is_exported_as_it_was_given_or_rounded():
    """Neither is another schedule: this scheduler's timesteps are whole numbers."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipe, schedule = Pipe(scheduler), vp_schedule(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the rounding
        alone = fs.diffusers.export(schedule, scheduler)
        fs.diffusers.apply(schedule, pipe)
        assert torch.equal(fs.diffusers.export(schedule, pipe.scheduler).sigmas, alone.sigmas)
    assert not alone.exact


def test_fastsched_itself_needs_no_diffusers():
    assert importlib.util.find_spec("fastsched.diffusers") is not None
    import subprocess
    import sys

    code = "import sys, fastsched; assert 'diffusers' not in sys.modules; sys.modules['diffusers'] = None\n"
    code += "import pytest\nwith pytest.raises(ImportError, match='fastsched.diffusers'): fastsched.diffusers.apply"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scheduler_that_fails_without_a_message_is_refused_with_the_kind_of_error():
    """UniPC rounds flow times to integers, and asserts about them without a message."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = diffusers.UniPCMultistepScheduler(**flow, num_train_timesteps=1)
    schedule = fs.Schedule(torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0]), "unipc", "flow")
    with pytest.raises(ValueError, match=r"does not take this schedule: it ends in [A-Z][A-Za-z]*Error\. Try "):
        fs.diffusers.export(schedule, scheduler)
