"""Pipelines measured through their own loop: equal to measuring the network, or an error that says why not."""

import dataclasses
import inspect
import itertools
import types

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import SHAPE, oracle_pipeline
from scheduler_table import exact_denoise

from fastsched.diffusers.conventions import describe

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SVD = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LEVELS, SAMPLES = 48, 4

COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
KINDS = {
    "epsilon-scaled-linear": ("EulerDiscreteScheduler", SD),
    "v-scaled-linear": ("EulerDiscreteScheduler", {**SD, "prediction_type": "v_prediction"}),
    "sample-scaled-linear": ("EulerDiscreteScheduler", {**SD, "prediction_type": "sample"}),
    "epsilon-linear-integer-timesteps": ("DPMSolverMultistepScheduler", {}),
    "epsilon-cosine": ("DDIMScheduler", COSINE),
    "v-cosine": ("DDIMScheduler", {**COSINE, "prediction_type": "v_prediction"}),
    "sample-cosine": ("DDIMScheduler", {**COSINE, "prediction_type": "sample"}),
    "v-zero-terminal-snr": (
        "DDIMScheduler",
        {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False},
    ),
    "sample-zero-terminal-snr": (
        "DDIMScheduler",
        {**SD, "prediction_type": "sample", "rescale_betas_zero_snr": True, "clip_sample": False},
    ),
    "v-zero-terminal-snr-euler": (
        "EulerDiscreteScheduler",
        {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "edm": ("EDMEulerScheduler", {}),
    "edm-v": ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "v-angles": ("IPNDMScheduler", {}),
    "svd-continuous-v": ("EulerDiscreteScheduler", {**SVD, "prediction_type": "v_prediction"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-static-shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow-dynamic-shift": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-unipc": ("UniPCMultistepScheduler", FLOW),
}


def mixture(seed=0):
    return fs.oracles.GaussianMixture.random(8, 3, seed=seed)


def denoiser_of(scheduler, *networks_and_scales):
    """The pipeline's network as a Denoiser: the sum of oracles' outputs, each times its scale."""
    convention = describe(scheduler)
    process = convention.process

    def level(condition):
        if process.kind == "ve":
            return (4 * condition).exp()
        if convention.angle:
            return dataclasses.replace(convention, angle=False).levels(condition)
        return convention.levels(condition * convention.train_steps if process.kind == "flow" else condition)

    from fastsched.diffusers.schedulers.probe import oracle_network

    parts = [(oracle_network(convention, exact_denoise(oracle)), scale) for oracle, scale in networks_and_scales]

    def network(x, condition):
        s = level(condition[:1].double())
        return convention.sign * sum(scale * part(x, s) for part, scale in parts)

    return fs.Denoiser(network, process, convention.denoiser.prediction, convention.denoiser.sigma_data)


def cells_apart(schedule, other, s):
    """The largest distance between nodes of two schedules, in cells of the levels ``s``."""
    level = schedule.sigmas[:-1], other.sigmas[:-1]
    if schedule.noise == "flow":
        level = tuple(t / (1 - t) for t in level)
    nodes = [[int((s.log() - value.log()).abs().nan_to_num(0.0).argmin()) for value in values] for values in level]
    return max(abs(a - b) for a, b in zip(*nodes, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_is_measured_as_its_network_is(kind):
    name, config = KINDS[kind]
    scheduler = getattr(diffusers, name)(**config)
    pipe = oracle_pipeline(scheduler, mixture())
    mu = {"mu": 1.15} if config.get("use_dynamic_shifting") else {}
    measured = fs.diffusers.measure(pipe, levels=LEVELS, samples=SAMPLES, **mu)
    direct = fs.measure(denoiser_of(scheduler, (mixture(), 1.0)), SHAPE, levels=LEVELS, samples=SAMPLES, progress=False)
    assert measured.increments is None
    assert torch.equal(measured.s, direct.s)
    assert torch.equal(measured.seeds, direct.seeds)
    for name in ("gram", "response_cross", "response_gram"):
        found, wanted = getattr(measured, name), getattr(direct, name)
        # Products of up to a thousandth of the largest come from float32 states, with timesteps in float32.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert measured.model_calls == 2 * LEVELS * SAMPLES
    ours, theirs = (fs.optimal_schedule(stats, 5, polish=False) for stats in (measured, direct))
    assert cells_apart(ours, theirs, direct.s) == 0


@pytest.mark.filterwarnings("ignore:the network's outputs come in bfloat16")  # one kind is at the limit, on purpose
@pytest.mark.parametrize("kind", ["epsilon-scaled-linear", "v-cosine", "edm", "flow-static-shift"])
def test_half_precision_gives_a_schedule_as_good(kind):
    # From the same noise, judged by the statistics in float32. The two have several minima of nearly the same error, so
    # the levels themselves may differ. Of schedules from the descent 10% is the worst of 64 (four seeds), where it ends
    # in another minimum. bfloat16 rounds outputs by up to 0.4%: without the descent dynamic programming takes another
    # path once, 34% worse, and float16's never does by more than 1%.
    allowed = {True: {torch.bfloat16: 1.15, torch.float16: 1.15}, False: {torch.bfloat16: 1.4, torch.float16: 1.1}}
    name, config = KINDS[kind]
    scheduler = getattr(diffusers, name)(**config)
    stats = {
        dtype: fs.diffusers.measure(oracle_pipeline(scheduler, mixture(), dtype=dtype), samples=32, images=32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    wide = stats[torch.float32]
    for solver, polish in itertools.product(("ddim", "dpmpp_2m"), (True, False)):
        exact = fs.predict_error(wide, fs.optimal_schedule(wide, 6, solver, polish=polish))
        for dtype, most in allowed[polish].items():
            rounded = fs.predict_error(wide, fs.optimal_schedule(stats[dtype], 6, solver, polish=polish))
            assert rounded <= most * exact


def test_samples_do_not_depend_on_the_batch_and_prompts_take_turns():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    one = fs.diffusers.measure(pipe, levels=12, samples=3, images=1, prompts=["a", "b"])
    assert pipe.prompts == ["a", "b", "a"]
    three = fs.diffusers.measure(pipe, levels=12, samples=3, images=3, prompts="a")
    assert torch.equal(one.seeds, three.seeds)
    # The finite difference's size comes from the batch's own data deviation, so sensitivities agree but not to a bit.
    torch.testing.assert_close(one.gram, three.gram, rtol=1e-4, atol=1e-4)
    assert fs.diffusers.measure(pipe, levels=12, samples=3, images=2).samples == 4
    again = fs.diffusers.measure(pipe, levels=12, samples=3, images=3, seed=1)
    assert not set(again.seeds.tolist()) & set(three.seeds.tolist())


def test_increments_are_kept_on_demand():
    """Their products are the measured Gram matrix, to the rounding of float32."""
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    stats = fs.diffusers.measure(pipe, levels=12, samples=3, images=2, keep_increments=True)
    assert stats.increments.shape == (4, 11, 8)
    increments = stats.increments.double()
    size = increments.square().sum(2).amax()
    torch.testing.assert_close(increments @ increments.mT, stats.gram, rtol=1e-4, atol=1e-5 * float(size))


def test_latents_of_a_video_are_measured():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    calibration = fs.diffusers.CalibrationScheduler.from_config(scheduler.config)
    calibration.set_timesteps(12)
    network = denoiser_of(scheduler, (mixture(), 1.0)).network
    latents = torch.randn(1, 2, 1, 2, 2)  # [batch, channels, frames, height, width]
    for t in calibration.timesteps:
        output = network(latents, t.reshape(1) / 1000)
        latents = calibration.step(output, t, latents).prev_sample
    assert calibration.statistics.shape == (2, 1, 2, 2)


def fail_at(step, error):
    def on_step(i, output):
        if i == step:
            raise error
        return output

    return on_step


def state_of(pipe):
    return (
        id(pipe.scheduler),
        dict(pipe.scheduler.config),
        pipe.config["scheduler"],
        pipe.device,
        pipe.dtype,
        inspect.signature(pipe.__call__),
        {name: repr(value) for name, value in vars(pipe.scheduler).items()},
    )


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["raises", "interrupted"])
@pytest.mark.parametrize("task", ["measure", "fit"])
def test_the_pipeline_is_left_as_it_was(task, error):
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    before = state_of(pipe)
    run = {
        "measure": lambda **call: fs.diffusers.measure(pipe, levels=8, samples=2, **call),
        "fit": lambda **call: fs.diffusers.fit(pipe, 4, levels=8, samples=2, **call),
    }[task]
    run()
    assert state_of(pipe) == before
    with pytest.raises(type(error)):
        run(on_step=fail_at(3, error))
    assert state_of(pipe) == before


@pytest.mark.parametrize("run", [1, 3], ids=["audition", "tuning"])
def test_fit_interrupted_on_the_way_leaves_the_pipeline_as_it_was(run, monkeypatch):
    pipe = oracle_pipeline(diffusers.DPMSolverMultistepScheduler(**SD), mixture())
    before, stats = state_of(pipe), fs.diffusers.measure(pipe, levels=8, samples=2, keep_increments=True)
    runs = []

    def interrupt(i, output):
        runs.append(i)
        if (runs.count(0), i) == (run, 2):
            raise KeyboardInterrupt
        return output

    warned = []
    monkeypatch.setattr(fs.validate, "warn", warned.append)
    found = fs.diffusers.fit(pipe, 4, stats=stats, model_calls=3 * 2 * 5, on_step=interrupt)  # two runs and a trial
    what = "that of optimal_schedule for the 2 paths" if run == 1 else "the best of the 2 that were run"
    assert [f"interrupted: this schedule is {what}" in each for each in warned] == [True]
    assert found.steps == 4
    assert (found.measured_error is None) == (run == 1)
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("misbehaviour", "reason"),
    [
        ({"repeat_steps": 2}, "does not call its network and scheduler once for each"),
        ({"change_latents": lambda latents: latents * 1.1}, "changed the latents between steps"),
        ({"on_step": lambda i, output: output * (1.5 if i < 14 else 1.0)}, "must not depend on the step's number"),
        ({"on_step": lambda i, output: output * (1.5 if i > 3 else 1.0)}, "must not depend on the step's number"),
        ({"on_step": lambda i, output: output * float("nan") if i == 5 else output}, "NaN or inf at timestep"),
    ],
    ids=["two steps a call", "latents changed", "guidance ends midway", "guidance starts midway", "not finite"],
)
def test_a_pipeline_that_cannot_be_driven_is_told_why(misbehaviour, reason):
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match=reason):
        fs.diffusers.measure(pipe, levels=8, samples=2, **misbehaviour)


def test_answers_left_to_chance_are_noticed():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match="random numbers"):
        fs.diffusers.measure(pipe, on_step=lambda i, output: output + 0.01 * torch.randn_like(output))


def test_a_run_that_stops_early_is_no_measurement():
    class Impatient(pipelines.OraclePipeline):
        def __call__(self, num_inference_steps=50):
            self.scheduler.set_timesteps(num_inference_steps)
            x = self.scheduler.init_noise_sigma * torch.randn(1, *SHAPE)
            for t in self.scheduler.timesteps[:5]:
                x = self.scheduler.step(self.unet(self.scheduler.scale_model_input(x, t), t)[0], t, x)[0]

    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    pipe = Impatient(pipelines.OracleUNet().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match="made 5 of the 16 steps"):
        fs.diffusers.measure(pipe, levels=8)


def test_image_to_image_and_foreign_schedulers_are_refused():
    calibration = fs.diffusers.CalibrationScheduler.from_config(diffusers.EulerDiscreteScheduler(**SD).config)
    with pytest.raises(ValueError, match="text-to-image"):
        calibration.add_noise(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="midway"):
        calibration.set_begin_index(3)
    with pytest.raises(ValueError, match="what a number N of levels takes"):
        calibration.set_timesteps(50)
    with pytest.raises(ValueError, match="does not support"):
        fs.diffusers.measure(oracle_pipeline_of_unknown_kind())
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(ValueError, match="num_inference_steps must be left out"):
        fs.diffusers.measure(pipe, num_inference_steps=20)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"prompts": []}, ValueError, "prompts must hold"),
        ({"prompts": 3}, TypeError, "prompts must be a string"),
        ({"prompts": ["a", None]}, TypeError, "prompts must be a string"),
        ({"prompts": "a", "prompt": "b"}, ValueError, "prompt must be left out"),
        ({"levels": 2}, ValueError, "levels must be at least 3"),
        ({"levels": [14.0, 1.0, "a"]}, TypeError, "levels must be a tensor or a list of numbers"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"seed": "a"}, TypeError, "seed must be a whole number"),
        ({"strength": 0.5}, ValueError, "strength must be left out"),
        ({"device": "cuda"}, TypeError, "device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, reason):
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    with pytest.raises(error, match=reason):
        fs.diffusers.measure(pipe, **arguments)


@pytest.mark.parametrize("pipe", [None, diffusers.StableDiffusionPipeline, diffusers.EulerDiscreteScheduler()])
def test_what_is_no_pipeline_is_refused(pipe):
    with pytest.raises(TypeError, match="pipe must be a pipeline"):
        fs.diffusers.measure(pipe)


@pytest.mark.parametrize("use", [fs.diffusers.measure, lambda pipe: fs.diffusers.apply(None, pipe)])
def test_a_scheduler_of_another_name_is_named(use):
    schedulers = {"prior_scheduler": diffusers.DDIMScheduler(), "decoder_scheduler": diffusers.DDIMScheduler()}
    with pytest.raises(TypeError, match=r"but pipe\.prior_scheduler and pipe\.decoder_scheduler: only a loop"):
        use(types.SimpleNamespace(**schedulers))


def test_a_user_s_own_arguments_of_the_call_are_kept():
    torch.manual_seed(0)
    pipe, call, _ = pipelines.stable_diffusion(diffusers.EulerDiscreteScheduler(**SD))
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def look(pipe, i, timestep, kwargs):
        seen.append(i)
        return kwargs

    kept = {"output_type": "np", "return_dict": False, "callback_on_step_end": look, "eta": 0.0}
    stats = fs.diffusers.measure(pipe, levels=8, samples=2, generator=torch.Generator(), **kept, **call)
    assert seen == list(range(16))
    plain = fs.diffusers.measure(pipe, levels=8, samples=2, **call)
    assert torch.equal(stats.gram, plain.gram)
    unguided = fs.diffusers.measure(pipe, levels=8, samples=2, **{**call, "guidance_scale": 1.0})
    assert not torch.allclose(unguided.gram, plain.gram)


def test_a_subclass_of_a_known_scheduler_is_known():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    pipe = oracle_pipeline(Mine(**SD), mixture())
    assert fs.diffusers.fit(pipe, 3, levels=8, samples=2).solver == "ddim"
    with pytest.raises(TypeError, match="scheduler must be a scheduler of diffusers"):
        fs.diffusers.measure(types.SimpleNamespace(scheduler=object()))


def oracle_pipeline_of_unknown_kind():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    pipe.scheduler = diffusers.SCMScheduler()
    return pipe


def test_the_origin_says_how_the_pipeline_was_called():
    pipe = oracle_pipeline(diffusers.EulerDiscreteScheduler(**SD), mixture())
    origin = fs.diffusers.measure(pipe, levels=12, samples=1, prompts=["a", "b"]).origin
    assert (origin.pipeline, origin.prompts, origin.guidance) == ("OraclePipeline", 2, None)
