"""Elements of the latents that a pipeline keeps for itself: a given first frame, a mask."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import OraclePipeline, OracleUNet, oracle_pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def mixture():
    return fs.oracles.GaussianMixture.random(8, 3, seed=0)


def quiet(built):
    pipe, call, _ = built
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def measured(pipe, **call):
    return fs.diffusers.measure(pipe, levels=24, samples=2, **call)


def exact_video(deviation=0.7):
    """The forward of a video model whose elements are independent and Gaussian: the exact velocity at each."""

    def forward(hidden_states, timestep, **_):
        t = (timestep.double().amax() / 1000).to(hidden_states)  # of the frames that are sampled
        shrink = (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)
        return ((hidden_states - shrink * hidden_states) / t,)

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_that_the_pipeline_replaces_is_in_no_sum(dtype):
    """The other frame's path is that of the pipeline without an image."""
    torch.manual_seed(0)
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    kept = []
    for build in (pipelines.wan, lambda scheduler: pipelines.wan_from_image(scheduler, expand_timesteps=True)):
        pipe, call = quiet(build(scheduler))
        pipe.transformer.to(dtype)
        pipe.transformer.forward = exact_video()
        call |= {name: value.to(dtype) for name, value in call.items() if name.endswith("embeds")}
        kept.append(measured(pipe, keep_increments=True, **call))
    free, framed = (each.increments.reshape(2, -1, *each.shape) for each in kept)
    assert float(framed[:, :, :, 0].abs().max()) < 1e-6
    assert kept[1].data_std == pytest.approx(0.7, rel=0.1)  # of the frame that is sampled
    assert float((framed[:, :, :, 1] - free[:, :, :, 1]).norm()) < 1e-5 * float(free[:, :, :, 1].norm())
    found = fs.diffusers.fit(pipe, 4, stats=kept[1], **call)
    assert found.measured_error < 0.01  # a frame of noise would add 1


def test_a_frame_of_a_network_that_is_not_exact_is_in_no_sum():
    torch.manual_seed(0)
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    pipe, call = quiet(pipelines.wan_from_image(scheduler, expand_timesteps=True))
    stats = measured(pipe, **call)
    assert float(stats.ends[:, :, 0].abs().max()) == 0
    assert float(stats.ends[:, :, 1].abs().min()) > 0
    pipe, call = quiet(pipelines.wan_from_image(scheduler))  # here the image comes as channels of its own
    assert float(measured(pipe, **call).ends.abs().min()) > 0


class FromFrame(OraclePipeline):
    """Starts from noise with a given frame in it, and puts the frame into the network's input at every step."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50, framed=True, fixed=True):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 2, 3, 8, 8)
        frame = torch.zeros_like(latents, dtype=torch.bool)
        frame[:, :, 0] = framed
        latents = torch.where(frame, 1.0, latents)
        for t in self.scheduler.timesteps:
            given = torch.where(frame & fixed, 1.0, latents)
            output = self.unet(given, t.expand(2), return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def test_a_frame_may_be_in_the_first_latents_if_the_pipeline_keeps_it():
    unet = OracleUNet()
    unet.forward = lambda sample, timestep, return_dict=True: exact_video()(sample, timestep)
    pipe = FromFrame(unet, diffusers.FlowMatchEulerDiscreteScheduler())
    kept = measured(pipe)
    assert float(kept.ends[:, :, 0].abs().max()) == 0
    assert kept.data_std == pytest.approx(0.7, rel=0.1)
    assert measured(pipe, framed=False).data_std == pytest.approx(0.7, rel=0.1)
    with pytest.raises(ValueError, match="neighbours in the pipeline's first latents are correlated"):
        measured(pipe, fixed=False)


class BehindFrame(OraclePipeline):
    """Puts a given frame before its latents, as Sana Video does from an image; here it is the latents' own first."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 2, 2, 2)
        for t in self.scheduler.timesteps:
            frames = torch.cat([latents[:, :1], latents], dim=1)
            output = self.unet(frames, t.expand(2), return_dict=False)[0]
            latents = self.scheduler.step(output[:, 1:], t, latents, return_dict=False)[0]
        return latents


def test_latents_behind_a_frame_that_is_not_stepped_are_all_sampled():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    kept = []
    for kind in (BehindFrame, OraclePipeline):
        unet = OracleUNet()
        unet.forward = lambda sample, timestep, return_dict=True: exact_video()(sample, timestep)
        kept.append(measured(kind(unet, scheduler)))
    assert torch.allclose(kept[0].gram, kept[1].gram, rtol=1e-4)


@pytest.mark.parametrize(("mask", "count"), [(0.5, 8), (torch.tensor([1.0, 0.25]), 4)])
def test_elements_that_a_soft_mask_blends_with_an_image_are_not_taken_for_replaced_ones(mask, count):
    pipe = oracle_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), mixture())

    def blend(_, args):
        sample = args[0].clone()
        sample[:, 0] = 0.7 * mask + (1 - mask) * sample[:, 0]
        return sample, *args[1:]

    pipe.unet.register_forward_pre_hook(blend)
    with pytest.raises(ValueError, match=f"blend of the latents with something else at {count} of 16 elements"):
        measured(pipe)


def test_elements_that_are_replaced_at_some_steps_are_noticed():
    class Replaced(OracleUNet):
        """Is given the first channel of the latents at its first 20 calls alone."""

        calls = 0

        def forward(self, sample, *args, **kwargs):
            self.calls += 1
            return super().forward(sample, *args, **kwargs)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = OraclePipeline(Replaced().answer_for(scheduler, mixture()), scheduler)

    def replace(_, args):
        sample = args[0].clone()
        sample[:, 0] = 0.5 if pipe.unet.calls >= 20 else sample[:, 0]
        return sample, *args[1:]

    pipe.unet.register_forward_pre_hook(replace)
    with pytest.raises(ValueError, match=r"keeps 8 of 16 elements .* starts from noise alone"):
        measured(pipe)


class KeptInLatents(OraclePipeline):
    """Begins with a given channel among its latents, and tells the scheduler that it is clean, as LTX-2 does."""

    @torch.no_grad()
    def __call__(self, num_inference_steps=50):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 2, 2, 2)
        latents[:, 0] = 0.5
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t.expand(2), return_dict=False)[0]
            output[:, 0] = (latents[:, 0] - 0.5) * 1000 / t
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return latents


def test_elements_that_are_clean_from_the_first_step_on_are_noticed():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="keeps 8 of 16 elements"):
        measured(KeptInLatents(OracleUNet().answer_for(scheduler, mixture()), scheduler))


def test_elements_that_the_pipeline_holds_still_are_noticed():
    def freeze(i, output):
        output[:, :, 0, 0] = 0
        return output

    with pytest.raises(ValueError, match="keeps 4 of 16 elements"):
        measured(oracle_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(), mixture()), on_step=freeze)
