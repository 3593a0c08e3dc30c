"""What changes during a run of a pipeline: caches, schedulers, weights. Each is refused with its reason."""

import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines
from pipelines import OraclePipeline, OracleUNet, oracle_pipeline
from test_watching import euler, flow_unipc, measured, mixture, quiet

# Steps before


def test_a_cache_of_diffusers_is_refused_before_a_call():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler()))
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    for run in (measured, lambda pipe, **call: fs.diffusers.fit(pipe, 4, levels=8, samples=2, **call)):
        with pytest.raises(ValueError, match=r"pipe\.transformer uses a cache.*pipe\.transformer\.disable_cache\(\)"):
            run(pipe, **call)
    assert not calls
    pipe.transformer.disable_cache()
    assert measured(pipe, **call).samples == 2


def faster_cache(network):
    config = diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 681), current_timestep_callback=lambda: 500, tensor_format="BFCHW"
    )
    diffusers.hooks.apply_faster_cache(network, config)


@pytest.mark.parametrize(
    "apply",
    [
        faster_cache,
        lambda network: diffusers.hooks.apply_sea_cache(network, diffusers.hooks.SeaCacheConfig()),
    ],
    ids=["faster", "sea"],
)
def test_a_cache_of_hooks_alone_is_refused_before_a_call(apply):
    """FasterCache may skip so few layers that a measurement does not see it."""
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.wan(diffusers.FlowMatchEulerDiscreteScheduler()))
    apply(pipe.transformer)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"pipe\.transformer uses a cache \(diffusers' hooks .*_cache") as refused:
        measured(pipe, **call)
    assert not calls
    for remedy in str(refused.value).split("fitting: ")[1].split(", diffusers"):
        eval(f"diffusers{remedy.removeprefix('diffusers')}", {"diffusers": diffusers, "pipe": pipe})
    assert measured(pipe, **call).samples == 2


@pytest.mark.parametrize(
    "enable", [diffusers.hooks.apply_text_kv_cache, lambda network, config: network.enable_cache(config)]
)
def test_hooks_that_only_remember_the_prompt_are_no_cache(enable):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler()))
    before = measured(pipe, **call)
    enable(pipe.transformer, diffusers.hooks.TextKVCacheConfig())
    assert torch.equal(measured(pipe, **call).gram, before.gram)
    pipe.transformer.enable_teacache = True
    with pytest.raises(ValueError, match="enable_teacache is True"):
        measured(pipe, **call)


@pytest.mark.parametrize("mark", ["_is_cached", "enable_teacache"])
def test_marks_of_other_caches_are_known(mark):
    pipe = oracle_pipeline(euler(), mixture())
    setattr(pipe.unet, mark, True)
    with pytest.raises(ValueError, match=f"pipe.unet uses a cache \\({mark}"):
        measured(pipe)


@pytest.mark.parametrize("ran", [0, 1])
@pytest.mark.parametrize("skips", [lambda turn: turn % 3 == 0, lambda turn: turn > 1], ids=["some", "later"])
def test_a_network_that_skips_layers_at_some_steps_is_refused(skips, ran):
    class Skipping(OracleUNet):
        """Reuses its last output at these steps, but for these layers; many programs replace ``unet.forward`` so."""

        def answer_for(self, *args):
            self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
            self.turn = 0
            return super().answer_for(*args)

        def forward(self, sample, *args, **kwargs):
            self.turn += 1
            for layer in self.layers[: ran if skips(self.turn) else 4]:
                layer(sample)
            return super().forward(sample, *args, **kwargs)

    scheduler = euler()
    pipe = OraclePipeline(Skipping().answer_for(scheduler, mixture()), scheduler)
    with pytest.raises(ValueError, match=f"unet ran {ran} of its layers, and 4 at another"):
        measured(pipe)


class Warming(OracleUNet):
    """Answers its first calls by a part of its answer, as a cache that is filled late does."""

    def answer_for(self, scheduler, oracle, calls, part):
        self.left, self.part = calls, part
        return super().answer_for(scheduler, oracle)

    def forward(self, sample, timestep, **kwargs):
        self.left -= 1
        output = super().forward(sample, timestep, **kwargs)[0]
        return (output * self.part if self.left >= 0 else output,)


@pytest.mark.parametrize("scheduler", [euler(), diffusers.FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
@pytest.mark.parametrize("part", [0.3, 0.5])
@pytest.mark.parametrize("calls", [2, 3])  # the first is that of the pipeline's own latents, of which nothing is used
def test_a_network_that_answers_its_first_calls_otherwise_is_refused(scheduler, part, calls):
    pipe = OraclePipeline(Warming().answer_for(scheduler, mixture(), calls, part), scheduler)
    with pytest.raises(ValueError, match=f"between levels {calls - 2} and {calls - 1}.*a cache that is filled late"):
        measured(pipe)
    assert measured(pipe).samples == 2


class Periodic(OracleUNet):
    """Multiplies each output whose number is a multiple of ``period``."""

    def answer_for(self, scheduler, oracle, period, part):
        self.count, self.period, self.part = 0, period, part
        return super().answer_for(scheduler, oracle)

    def forward(self, sample, timestep, **kwargs):
        self.count += 1
        output = super().forward(sample, timestep, **kwargs)[0]
        return (output * (self.part if self.count % self.period == 0 else 1.0),)


@pytest.mark.parametrize("scheduler", [euler(), diffusers.FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
@pytest.mark.parametrize(("period", "part"), [(7, 0.0), (7, 0.8), (10, 0.8)])
def test_a_network_that_is_off_at_every_few_calls_is_refused(scheduler, period, part):
    pipe = OraclePipeline(Periodic().answer_for(scheduler, mixture(), period, part), scheduler)
    with pytest.raises(ValueError, match=r"fitted neither.*the next call at this level.*a counter"):
        fs.diffusers.measure(pipe, levels=48, samples=4, images=4)


class Windowed(OracleUNet):
    """Changes its outputs at a part of the steps of each run, which it counts in a place that is not watched."""

    def forward(self, sample, timestep, **kwargs):
        self.counter["calls"] += 1
        output = super().forward(sample, timestep, **kwargs)[0]
        begin, end = self.counter["window"]
        return (output * (1.05 if begin <= (self.counter["calls"] - 1) % 96 / 96 < end else 1.0),)


@pytest.mark.parametrize("window", [(0, 0.2), (0.1, 0.3), (0.2, 0.45), (0.2, 0.8), (0.3, 0.7), (0.5, 0.8), (0.5, 1)])
@pytest.mark.parametrize("images", [1, 3, 4])
def test_a_network_that_is_another_within_a_window_of_steps_is_refused(window, images):
    unet = Windowed().answer_for(euler(), mixture())
    unet.counter = {"calls": 0, "window": window}
    with pytest.raises(
        ValueError, match=r"answered differently \(by (4.76|5.00)%\) at the end of the run than at step"
    ):
        fs.diffusers.measure(OraclePipeline(unet, euler()), levels=48, samples=4 * images, images=images)


@pytest.mark.parametrize("window", [(0, 0.2), (0.2, 0.8), (0.3, 0.7), (0.5, 0.8), (0.5, 1)])
def test_windows_of_steps_are_found_in_one_call_of_several_images(window):
    """Two of its steps are repeated in one, half a run apart, as each level is asked again by the deviated paths."""
    unet = Windowed().answer_for(euler(), mixture())
    unet.counter = {"calls": 0, "window": window}
    with pytest.raises(
        ValueError, match=r"answered differently \(by (4.76|5.00)%\) at the end of the run than at step"
    ):
        fs.diffusers.measure(OraclePipeline(unet, euler()), levels=48, samples=4, images=4)


class Mixing(OracleUNet):
    """Adds a part of the batch's mean, or of the first output, to each output."""

    first = False

    def forward(self, sample, timestep, **kwargs):
        output = super().forward(sample, timestep, **kwargs)[0]
        return (output + 0.02 * (output[0] if self.first else output.mean(0)),)


@pytest.mark.parametrize("first", [False, True])  # as StyleAligned and Prompt-to-Prompt share their attention
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_network_that_mixes_its_batch_is_refused(images, first):
    pipe = OraclePipeline(Mixing().answer_for(euler(), mixture()), euler())
    pipe.unet.first = first
    if images == 1:
        assert measured(pipe, images=images).samples == 2
        return
    with pytest.raises(ValueError, match=r"answered differently.*beside other latents in the batch.*frames"):
        measured(pipe, images=images)


def test_nothing_of_the_watch_is_left_behind():
    pipe = oracle_pipeline(euler(), mixture())
    measured(pipe)
    with pytest.raises(ValueError, match="changed the latents"):
        measured(pipe, change_latents=lambda latents: latents + 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


# What a callback changes


def test_a_scheduler_that_a_callback_replaces_is_named():
    pipe = oracle_pipeline(euler(), mixture())

    def on_step(i, output):
        if i == 5:
            pipe.scheduler = euler()
        return output

    with pytest.raises(ValueError, match="put a EulerDiscreteScheduler in the scheduler's place"):
        measured(pipe, on_step=on_step)


class Times:
    """A processor, as attention modules have them."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self):
        return self.factor


class Halves(Times):
    def __call__(self):
        return self.factor / 2


class TimesLayer(torch.nn.Identity):
    def __init__(self, factor):
        super().__init__()
        self.__dict__ |= {"factor": factor, "scaling": {"default": 1.0}, "scale": [1.0], "processor": Times()}

    def forward(self, x):
        return self.factor * x


class Weighted(OracleUNet):
    """Its answers follow a weight, and the scales, a factor, the processor, hooks and the function of a layer."""

    def __init__(self):
        super().__init__()
        self.gain, self.layer = torch.nn.Parameter(torch.ones(1)), torch.nn.Identity()
        self.layer.scaling, self.layer.scale, self.layer.processor = {"default": 1.0}, [1.0], Times()
        self.register_buffer("shift", torch.ones(1))
        self.knob = 1.0

    def forward(self, *args, **kwargs):
        factor = self.gain * self.shift * self.knob * self.layer.scaling["default"] * self.layer.scale[0]
        factor = self.layer(factor) * self.layer.processor() * (getattr(self.layer, "b1", None) or 1.0)
        return (factor * super().forward(*args, **kwargs)[0],)


def in_a_window(change):
    """Calls ``change`` with 1.3 at step 10 and with 1 at step 20."""

    def on_step(unet, i, output):
        if i in (10, 20):
            change(unet, 1.3 if i == 10 else 1.0)
        return output

    return on_step


def set_data(unet, value):
    unet.gain.data = torch.full((1,), value)


def set_hook(unet, value):
    if value == 1.0:
        unet.hook.remove()
    else:
        unet.hook = unet.layer.register_forward_hook(lambda layer, args, output: value * output)


def set_forward(unet, value):
    if value == 1.0:
        del unet.layer.forward
    else:
        unet.layer.forward = lambda x: value * x


CHANGES = {
    "in place": lambda unet, value: unet.gain.data.fill_(value),
    "data": set_data,
    "parameter": lambda unet, value: setattr(unet, "gain", torch.nn.Parameter(torch.full((1,), value))),
    "buffer": lambda unet, value: unet.shift.fill_(value),
    "attribute": lambda unet, value: setattr(unet, "knob", value),
    "scale of LoRA": lambda unet, value: unet.layer.scaling.update(default=value),
    "scale of an IP-adapter": lambda unet, value: unet.layer.scale.__setitem__(0, value),
    "new attribute": lambda unet, value: setattr(unet.layer, "b1", value if value != 1.0 else None),  # as FreeU's
    "attribute of a processor": lambda unet, value: setattr(unet.layer.processor, "factor", value),
    "processor": lambda unet, value: setattr(unet.layer, "processor", (Times if value == 1.0 else Halves)()),
    "layer": lambda unet, value: setattr(unet, "layer", TimesLayer(value)),
    "hook": set_hook,
    "function": set_forward,
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_a_callback_changes_and_changes_back_are_noticed(name):
    scheduler = euler()
    pipe = OraclePipeline(Weighted().answer_for(scheduler, mixture()), scheduler)
    plain = measured(pipe)
    assert plain.samples == 2
    on_step = in_a_window(CHANGES[name])
    with pytest.raises(ValueError, match=r"unet\.(weights|settings)\S* was different from that at the first step"):
        measured(pipe, on_step=lambda i, output: on_step(pipe.unet, i, output))


def test_marks_of_progress_that_a_callback_makes_are_no_change():
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.flux(diffusers.FlowMatchEulerDiscreteScheduler()))
    plain = measured(pipe, **call)

    def mark(pipe, i, t, given):
        pipe.step_number, pipe.cancelled = i, False
        return given

    assert torch.equal(measured(pipe, callback_on_step_end=mark, **call).gram, plain.gram)
    assert pipe.cancelled is False


def test_processors_that_a_callback_makes_anew_may_be_alike():
    scheduler = euler()
    pipe = OraclePipeline(Weighted().answer_for(scheduler, mixture()), scheduler)
    plain = measured(pipe)

    def on_step(i, output):
        pipe.unet.layer.processor = Times()
        pipe.unet.layer.kept = torch.ones(i)  # for later, as some layers do
        return output

    assert torch.equal(measured(pipe, on_step=on_step).gram, plain.gram)


def weights_of_the_second(pipe, i, given):
    with torch.no_grad():
        next(pipe.transformer_2.parameters()).mul_({18: 1.3, 21: 1 / 1.3}.get(i, 1.0))
    return {}


def settings_of_the_second(pipe, i, given):
    pipe.transformer_2.gradient_checkpointing = i in (18, 19)
    return {}


def first_embeddings_of_the_second(pipe, i, given):
    return {"prompt_embeds": given + {7: 1.0, 8: -1.0}.get(i, 0.0)}  # it is called from step 8 on


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (weights_of_the_second, r"at step 19, transformer_2\.weights"),
        (settings_of_the_second, r"at step 19, transformer_2\.settings was different from that at the first step;"),
        (first_embeddings_of_the_second, r"at step 8, transformer_2\.encoder_hidden_states"),
    ],
)
def test_a_change_of_the_second_of_two_networks_in_turn_is_noticed(change, named):
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.wan_of_two_experts(flow_unipc(), 0.9))
    given = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "guidance_scale_2": 2.0}
    changed = lambda pipe, i, timestep, given: change(pipe, i, given["prompt_embeds"])
    with pytest.raises(ValueError, match=named):
        measured(pipe, callback_on_step_end=changed, **call, **given)


def test_weights_of_a_network_with_cache_contexts_are_watched():
    """Pipelines that name a context for caches (Wan) leave an empty registry of hooks on the network."""
    torch.manual_seed(0)
    pipe, call = quiet(pipelines.wan(diffusers.FlowMatchEulerDiscreteScheduler()))

    def changed(pipe, step, timestep, kwargs):
        with torch.no_grad():
            next(pipe.transformer.parameters()).mul_(1.1 if step == 4 else 1.0)
        return {}

    with pytest.raises(ValueError, match=r"transformer\.weights\S* was different from that at the first step"):
        measured(pipe, callback_on_step_end=changed, **call)
