"""The scheduler of fitted schedules gives the samples of `fs.sample`, in every family of pipelines."""

import copy
import json
import pickle

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from diffusers import EulerDiscreteScheduler
from scheduler_table import exact_denoise, exact_denoiser, uneven_schedule

from fastsched.diffusers.conventions import describe
from fastsched.diffusers.fitted_scheduler import FittedScheduler
from fastsched.diffusers.schedulers.probe import oracle_network, states_of
from fastsched.sampling.k_diffusion import sample_fitted

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
#: Every kind of model, by the scheduler that its pipeline has.
KINDS = {
    "epsilon, scaled state": ("EulerDiscreteScheduler", SD),
    "epsilon, integer timesteps": ("DDIMScheduler", {**SD, "clip_sample": False}),
    "epsilon, DPM-Solver": ("DPMSolverMultistepScheduler", SD),
    "v": ("EulerDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}),
    "v from pure noise": ("DDIMScheduler", {**ZERO_SNR, "clip_sample": False}),
    "x0": ("DDIMScheduler", {**SD, "prediction_type": "sample", "clip_sample": False}),
    "velocity": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "velocity, UniPC": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    "EDM": ("EDMEulerScheduler", {}),
    "EDM, v": ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    "video EDM": (
        "EulerDiscreteScheduler",
        {
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    "angles": ("IPNDMScheduler", {}),
}
STEPS = 6
ORACLE = fs.oracles.GaussianMixture.random(8, 3, seed=0)


def own_scheduler(kind):
    name, config = KINDS[kind]
    return getattr(diffusers, name)(**config)


def random_weights(steps, seed=0):
    """Rows that sum to 1 and use every evaluation, of no stock solver."""
    values = torch.randn(steps, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tril(-1)
    values = 0.3 * values
    return values + torch.diag(1 - values.sum(1))


def fitted_for(scheduler, steps=STEPS):
    schedule = uneven_schedule(describe(scheduler), steps)
    return fs.Schedule(schedule.sigmas, "fitted", schedule.noise, weights=random_weights(steps))


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def applied(kind):
    pipe = Pipe(own_scheduler(kind))
    schedule = fitted_for(pipe.scheduler)
    return pipe, schedule, fs.diffusers.apply(schedule, pipe)


def by_loop(scheduler, noise):
    """The last state of diffusers' loop from ``noise``."""
    convention = describe(scheduler)
    network = oracle_network(convention, exact_denoise(ORACLE))
    levels = convention.process.level(scheduler.schedule.sigmas[:-1])
    scheduler.set_timesteps(scheduler.schedule.steps)
    timesteps = iter(levels)  # the oracle is asked at the exact level, not at that of a rounded float32 timestep
    return list(
        states_of(scheduler, lambda x, t: network(x, next(timesteps)[None]), scheduler.init_noise_sigma * noise)
    )[-1]


def noise_of(count=4, dtype=torch.float64):
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_of_diffusers_gives_the_samples_of_fs_sample(kind):
    pipe, schedule, proof = applied(kind)
    assert isinstance(pipe.scheduler, FittedScheduler)
    assert (proof.way, proof.exact, proof.deterministic) == ("fitted", True, True)
    denoiser = exact_denoiser(describe(own_scheduler(kind)), ORACLE)
    expected = fs.sample(denoiser, schedule, noise=noise_of())
    scale = float(expected.norm())
    assert (
        float((by_loop(pipe.scheduler, noise_of()) - expected).norm()) < 1e-9 * scale
    )  # float64, another order of sums
    assert float((by_loop(pipe.scheduler, noise_of().float()) - expected).norm()) < 1e-5 * scale
    stock = fs.sample(denoiser, schedule.sigmas, "dpmpp_2m", noise_of())
    assert float((stock - expected).norm()) > 1e-2 * scale  # the weights matter


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_also_gives_the_denoised_sample(kind):
    """As own classes do: in an output of some classes, and in tuples of these only. A pipeline may write into it."""
    pipe, schedule, _ = applied(kind)
    own, scheduler, convention = own_scheduler(kind), pipe.scheduler, describe(own_scheduler(kind))
    network = oracle_network(convention, lambda y, s: torch.full_like(y, 0.25))
    own.set_timesteps(STEPS)
    gives = len(own.step(noise_of(), own.timesteps[0], noise_of(), return_dict=False))
    ends = []
    for write in (False, True):
        scheduler.set_timesteps(STEPS)
        x = scheduler.init_noise_sigma * noise_of()
        for t, s in zip(scheduler.timesteps, convention.process.level(schedule.sigmas[:-1]), strict=True):
            output = network(scheduler.scale_model_input(x, t), s[None])
            assert len(copy.deepcopy(scheduler).step(output, t, x, return_dict=False)) == gives
            step = scheduler.step(output, t, x)
            x, denoised = step.prev_sample, step.pred_original_sample
            torch.testing.assert_close(denoised, torch.full_like(denoised, 0.25), rtol=1e-6, atol=1e-6)
            if write:
                denoised.zero_()
        ends.append(x)
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "v from pure noise"])
def test_the_function_of_k_diffusion_gives_them_too(kind):
    scheduler = own_scheduler(kind)
    schedule, convention = fitted_for(scheduler), describe(scheduler)
    denoise, process = exact_denoise(ORACLE), convention.process

    def model(x, sigma):  # k-diffusion's: x at scale sigma
        return denoise(x / sigma[0], process.level(sigma[:1]))

    sigmas = schedule.sigmas
    ours = sample_fitted(model, noise_of() * sigmas[0], sigmas, weights=schedule.weights, disable=True)
    expected = fs.sample(exact_denoiser(convention, ORACLE), schedule, noise=noise_of())
    assert float((ours - expected).norm()) < 1e-9 * float(expected.norm())


@pytest.mark.parametrize("kind", ["epsilon, integer timesteps", "velocity", "EDM", "v from pure noise"])
def test_copies_pickles_and_files_keep_schedule_and_weights(kind, tmp_path):
    pipe, schedule, _ = applied(kind)
    pipe.scheduler.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    entries = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entries["weights"] == schedule.weights.tolist()
    states = by_loop(pipe.scheduler, noise_of())
    for other in (
        copy.deepcopy(pipe.scheduler),
        pickle.loads(pickle.dumps(pipe.scheduler)),
        FittedScheduler.from_pretrained(tmp_path),
        FittedScheduler.from_config(pipe.scheduler.config),
    ):
        assert torch.equal(other.schedule.sigmas, schedule.sigmas)
        assert torch.equal(other.schedule.weights, schedule.weights)
        assert torch.equal(by_loop(other, noise_of()), states)


def test_a_copy_in_the_midst_of_a_run_goes_on_alike():
    scheduler = applied("velocity")[0].scheduler
    scheduler.set_timesteps(STEPS)
    x = noise_of()
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(x, t, x).prev_sample
    other = copy.deepcopy(scheduler)
    assert torch.equal(scheduler.step(x, None, x).prev_sample, other.step(x, None, x).prev_sample)


def test_half_precision_sums_in_float32():
    scheduler = applied("velocity")[0].scheduler
    scheduler.set_timesteps(STEPS)
    x = noise_of(dtype=torch.float16)
    following = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0]
    assert following.dtype == torch.float16
    assert scheduler._states.dtype == torch.float32


def test_a_program_s_autocast_does_not_reach_the_sums():
    scheduler, found = applied("velocity")[0].scheduler, []
    for enabled in (False, True):
        scheduler.set_timesteps(STEPS)
        x = noise_of()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for t in scheduler.timesteps:
                x = scheduler.step(0.9 * x, t, x).prev_sample
        found.append(x)
    assert torch.equal(*found)


def test_step_copies_nothing_to_the_host():
    """On the meta device a value cannot be read, so any read would raise."""
    scheduler = applied("epsilon, scaled state")[0].scheduler
    scheduler.set_timesteps(STEPS, device="meta")
    x = torch.empty(2, 4, 8, 8, device="meta", dtype=torch.bfloat16)
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    assert (x.shape, x.dtype, scheduler.step_index) == ((2, 4, 8, 8), torch.bfloat16, STEPS)


def test_a_variance_beside_the_prediction_is_dropped():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    made = FittedScheduler.from_schedule(fitted_for(scheduler), scheduler)
    x = noise_of()
    steps = []
    for output in (x, torch.cat([x, x + 1], 1)):
        made.set_timesteps(STEPS)
        steps.append(made.step(output, made.timesteps[0], x).prev_sample)
    assert torch.equal(*steps)


FAMILIES = {
    "unconditional": ("DDPMScheduler", {"clip_sample": False}),
    "stable_diffusion": ("DPMSolverMultistepScheduler", SD),
    "stable_diffusion_xl": ("EulerDiscreteScheduler", SD),
    "stable_diffusion_3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flux": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "wan": ("UniPCMultistepScheduler", KINDS["velocity, UniPC"][1]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_pipelines_samples_with_it(family):
    """A network whose answer is 0 gives ``D = a x``, so that the latents are a known multiple of the noise."""
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    pipe, call, output = getattr(pipelines, family)(getattr(diffusers, name)(**config))
    pipe.set_progress_bar_config(disable=True)
    schedule = fitted_for(pipe.scheduler)
    fs.diffusers.apply(schedule, pipe)
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x, **kwargs: seen.append((output, x)) or step(output, t, x, **kwargs)
    call = {**call, **output, "num_inference_steps": STEPS}
    result = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    assert len(seen) == STEPS
    made = pipe.scheduler
    convention = made.convention
    s = convention.process.level(schedule.sigmas)
    a, c = convention.denoiser.coefficients(s[:-1])
    denoised = [a[n] * x.double() + c[n] * output.double()[:, : x.shape[1]] for n, (output, x) in enumerate(seen)]
    for n in range(STEPS - 1):  # the formula, from what the pipeline passed to step
        mean = sum(schedule.weights[n, m] * denoised[m] for m in range(n + 1))
        y = seen[n][1].double() / convention.process.sigma(s[n]) + (1 / s[n + 1] - 1 / s[n]) * mean
        expected = convention.process.sigma(s[n + 1]) * y
        torch.testing.assert_close(seen[n + 1][1].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(torch.as_tensor(result if not isinstance(result, list) else 0.0)).all()


def test_a_pipeline_saves_and_loads_with_it(tmp_path):
    pipe, *_ = pipelines.unconditional(diffusers.DDPMScheduler(clip_sample=False))
    schedule = fitted_for(pipe.scheduler)
    fs.diffusers.apply(schedule, pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, FittedScheduler)
    assert type(loaded.scheduler.own_scheduler()) is diffusers.DDPMScheduler
    assert torch.equal(loaded.scheduler.schedule.weights, schedule.weights)


def test_another_class_made_from_its_config_keeps_its_own_defaults():
    """DPMSolverMultistepScheduler has ``timestep_spacing="linspace"`` by default, DDIMScheduler "leading"."""
    own = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    config = FittedScheduler.from_schedule(fitted_for(own), own).config
    for kind in (diffusers.DDIMScheduler, EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        right = {key: value for key, value in kind.from_config(own.config).config.items() if not key.startswith("_")}
        assert right.items() <= dict(kind.from_config(config).config).items()


def test_another_schedule_can_be_applied_and_the_own_class_restored():
    pipe, schedule, _ = applied("epsilon, scaled state")
    assert type(EulerDiscreteScheduler.from_config(pipe.scheduler.config)) is EulerDiscreteScheduler
    assert pipe.scheduler.config.beta_start == SD["beta_start"]
    shorter = fitted_for(pipe.scheduler.own_scheduler(), 4)
    fs.diffusers.apply(shorter, pipe)
    assert pipe.scheduler.schedule.steps == 4
    fs.diffusers.apply(fs.Schedule(schedule.sigmas, "ddim", schedule.noise), pipe)
    assert type(pipe.scheduler) is EulerDiscreteScheduler


def test_changes_of_the_own_scheduler_are_kept():
    scheduler = EulerDiscreteScheduler(**SD)
    scheduler.alphas_cumprod = EulerDiscreteScheduler(beta_end=0.015).alphas_cumprod  # as by hand
    top = describe(scheduler).process.s_max
    schedule = fitted_for(scheduler)
    assert float(schedule.sigmas[0]) > describe(EulerDiscreteScheduler(**SD)).process.s_max
    pipe = Pipe(scheduler)
    fs.diffusers.apply(schedule, pipe)
    for kept in (pipe.scheduler, copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert describe(kept.own_scheduler()).process.s_max == top
        fs.diffusers.apply(schedule, Pipe(kept))
    fs.diffusers.apply(fs.Schedule(schedule.sigmas, "ddim", "vp"), pipe)
    assert describe(pipe.scheduler).process.s_max == top


def test_the_own_scheduler_has_no_trace_of_schedules():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    process = describe(scheduler).process
    levels = process.nearest(process.levels(STEPS))
    stock = fs.Schedule.from_levels(process, torch.cat([levels, levels.new_zeros(1)]), "ddim")
    pipe = Pipe(scheduler)
    fs.diffusers.apply(stock, pipe)
    by_steps(pipe.scheduler)
    fs.diffusers.apply(fitted_for(scheduler), pipe)
    assert torch.equal(by_steps(pipe.scheduler.own_scheduler()), by_steps(scheduler))


def by_steps(scheduler):
    """The last state of a few steps of a network that returns its input."""
    scheduler.set_timesteps(5)
    return list(states_of(scheduler, lambda x, t: x, noise_of()))[-1]


@pytest.mark.parametrize("kind", ["epsilon, scaled state", "velocity"])
def test_a_pipeline_with_it_is_measured_and_fitted_as_before(kind):
    torch.manual_seed(0)
    pipe = pipelines.oracle_pipeline(own_scheduler(kind), ORACLE)
    before = fs.diffusers.measure(pipe, levels=16)
    fs.diffusers.apply(fs.optimal_schedule(before, STEPS, "fitted"), pipe)
    after = fs.diffusers.measure(pipe, levels=16)
    assert torch.equal(after.s, before.s)
    torch.testing.assert_close(after.gram, before.gram, rtol=1e-4, atol=1e-6)
    schedule = fs.diffusers.fit(pipe, 4, stats=before, model_calls=100)
    assert (schedule.steps, schedule.solver) == (4, "ddim")


def test_a_loop_may_go_on_with_a_slice_of_the_timesteps():
    scheduler = applied("velocity")[0].scheduler
    scheduler.set_timesteps()
    x = torch.randn(2, 3, 4, 4)
    timesteps = scheduler.timesteps
    with pytest.raises(ValueError, match=r"scheduler\.timesteps\.clone\(\)\[1:\]"):
        timesteps[1:]
    x = scheduler.step(x, timesteps[0], x).prev_sample
    assert torch.equal(timesteps[1:], timesteps.clone()[1:])


def test_a_list_of_the_call_s_own_is_not_left_out_without_a_word():
    plain = EulerDiscreteScheduler(**SD)
    schedule = fitted_for(plain, 5)
    scheduler = FittedScheduler.from_schedule(schedule, plain)
    scheduler.set_timesteps(timesteps=scheduler.timesteps.tolist())
    scheduler.set_timesteps(sigmas=schedule.sigmas[:-1].tolist())
    for name, other in {"timesteps": [999, 700, 400, 200, 50], "sigmas": [14.0, 5.0, 3.0, 1.0, 0.5]}.items():
        with pytest.warns(UserWarning, match=f"{name} of this call is not used"):
            scheduler.set_timesteps(**{name: other})
