"""Networks that misbehave: the schedule of their well-behaved twin, or an error that says what is wrong with them.

Of networks that are no denoisers a warning may say it, for the checks cannot tell all of them from strong guidance.

Every case is a short program, which a failure prints.
"""

import math
import textwrap
import warnings

import pytest
import torch
from fuzz.amounts import of_all
from hypothesis import assume, given
from hypothesis import strategies as st

#: Constructors and their networks; `good` is the exact denoiser of a mixture, as each predicts it.
KINDS = {
    "x0": ("fs.Denoiser.from_denoiser(network, 0.02, 40.0)", "return oracle.denoise(x, t)"),
    "score": ("fs.Denoiser.from_score(network, 0.02, 40.0)", "return oracle.score(x, t)"),
    "velocity": (
        "fs.Denoiser.from_velocity(network)",
        """
        s = (t / (1 - t)).clamp_max(1e6)
        column = t.reshape(-1, 1).to(x.dtype)
        return (x - oracle.denoise(x * (1 + s.reshape(-1, 1).to(x.dtype)), s.to(x.dtype))) / column
        """,
    ),
    "v": (
        "fs.Denoiser.from_v(network, 1 / (1 + noise(torch.arange(1000).double())[:, 0] ** 2))",
        """
        s = noise(t.double())
        alpha = (1 + s**2).rsqrt()
        denoised = oracle.denoise(x.double() / alpha, s[:, 0])
        return ((alpha * x.double() - denoised) / (s * alpha)).to(x.dtype)
        """,
    ),
    "edm": (
        "fs.Denoiser.from_edm(network, sigma_min=0.02, sigma_max=40.0)",
        """
        s = (4 * t.double()).exp().reshape(-1, 1)
        z = x.double() * (s**2 + 0.25).sqrt()
        denoised = oracle.denoise(z, s[:, 0])
        return ((denoised - 0.25 / (s**2 + 0.25) * z) / (0.5 * s / (s**2 + 0.25).sqrt())).to(x.dtype)
        """,
    ),
}

#: Bodies of networks that compute the same as `good`.
HARMLESS = {
    "writes into its input": "out = good(x, t)\nx.zero_()\nt.mul_(0)\nreturn out",
    "returns its input": "return x.copy_(good(x, t))",
    "one buffer": "buffer = kept.setdefault(len(x), torch.empty_like(x))\nreturn buffer.copy_(good(x, t))",
    "overwrites what it returned": """
        for before in kept.values():
            before.fill_(float("nan"))
        kept[0] = good(x, t)
        return kept[0]
        """,
    "overwrites what it was given": """
        for before in kept.values():
            before.fill_(float("nan"))
        kept[0], kept[1], out = x, t.float(), good(x, t)
        return out
        """,
    "not contiguous": "return good(x, t).mT.contiguous().mT",
    "a view": "return torch.cat([good(x, t), x], 1)[:, : x.shape[1]]",
    "wants gradients": "return good(x, t).clone().requires_grad_()",
    "turns gradients on": "torch.set_grad_enabled(True)\nreturn good(x, t)",
    "inference mode": "with torch.inference_mode():\n    return good(x, t)",
    "a subclass": "return good(x, t).as_subclass(Tagged)",
    "draws random numbers": "torch.rand(3)\nreturn good(x, t)",
    "keeps its answers": "return kept.setdefault((x.numpy().tobytes(), t.numpy().tobytes()), good(x, t))",
    "goes sample by sample": "return torch.cat([good(x[n : n + 1], t[n : n + 1]) for n in range(len(x))])",
    "seeds random numbers": "torch.manual_seed(0)\nreturn good(x, t)",
}

#: Those whose output cannot be used, whatever is asked of them.
UNUSABLE = {
    "NaN at low levels": 'return torch.where(noise(t) < 0.5, float("nan"), good(x, t))',
    "NaN at high levels": 'return torch.where(noise(t) > 2.0, float("nan"), good(x, t))',
    "inf in one element": 'out = good(x, t)\nout[0, -1] = float("inf")\nreturn out',
    "NaN in the last sample": 'out = good(x, t)\nout[-1] = float("nan")\nreturn out',
    "NaN from the third call on": """
        kept["calls"] = kept.get("calls", 0) + 1
        return good(x, t) * (float("nan") if kept["calls"] > 2 else 1.0)
        """,
    **{
        f"gives {wrong}": f"out = good(x, t)\nreturn {wrong}"
        for wrong in (
            "out[:, :1]", "out[:, 1:]", "out[None]", "out.flatten()", "torch.cat([out, out], 1)", "out.sum()",
            "out[:0]", "torch.cat([out, out])", "out[..., None]", "out.long()", "out > 0", "out.to(torch.complex64)",
            "None", "(out,)", "(out, out)", "[out]", "{'sample': out}", "out.numpy()", "'x'", "3.0", "out.to('meta')",
            "network", "out.to_sparse()",
        )
    },
}  # fmt: skip

#: Those that are no denoisers of their process, which a measurement's checks find.
NO_DENOISERS = {
    "random": "return good(x, t) + 0.1 * torch.randn(x.shape)",
    "random by factors": "return good(x, t) * (1 + 0.3 * torch.rand(x.shape))",
    "stateful": 'kept["calls"] = kept.get("calls", 0) + 1\nreturn good(x, t) * (1 + 0.05 * kept["calls"])',
    "otherwise at first": """
        kept["calls"] = kept.get("calls", 0) + 1
        return good(x, t) * (0.9 if kept["calls"] < 3 else 1)
        """,
    "drifts": 'kept["calls"] = kept.get("calls", 0) + 1\nreturn good(x, t) * (1 + 1e-3 * kept["calls"])',
    "first for all": "return good(x[:1], t[:1]).expand(len(x), -1)",
    "keeps the answer of a level": "return kept.setdefault((float(t.reshape(-1)[0]), len(x)), good(x, t))",
    "minus it": "return -good(x, t)",
    "three times it": "return 3 * good(x, t)",
    "mixes the batch": "return good(x, t) + 0.3 * x.mean(0, keepdim=True)",
    "normalises over the batch": "out = good(x, t)\nreturn (out - out.mean(0)) / (out.std(0, correction=0) + 1)",
}

#: Those that fail by themselves.
RAISING = {
    "ValueError": "raise ValueError('mine')",
    "KeyError": "raise KeyError('mine')",
    "StopIteration": "raise StopIteration('mine')",
    "ZeroDivisionError": "return x / (0 * int(len(x) / 0))",
    "RuntimeError": "return x @ torch.zeros(3, 3, 3, 7)",
}

PROGRAM = """
import torch
import fastsched as fs

class Tagged(torch.Tensor):
    pass

oracle = fs.oracles.GaussianMixture.random({d}, 3, seed={seed})
kept = {{}}

def noise(t):
    s = {noise}
    return s.reshape(-1, 1)

def good(x, t):
{good}

def network(x, t):
{body}

denoiser = {make}
found = {action}
"""

NOISE = {
    "x0": "t",
    "score": "t",
    "velocity": "t / (1 - t)",
    "v": "torch.expm1(9.95 * ((t + 1) / 1000) ** 2 + 0.1 * (t + 1) / 1000).sqrt()",
    "edm": "(4 * t).exp()",
}
ACTIONS = {
    "measure": "fs.optimal_schedule(fs.measure(denoiser, ({d},), levels={levels}, {options}, progress=False), {steps})",
    "fit": "fs.fit(denoiser, ({d},), {steps}, '{solver}', levels={levels}, model_calls=250, {options}, progress=False)",
    "sample": "fs.sample(denoiser, denoiser.process.sampler_sigma(torch.cat([denoiser.levels({steps} + 2), "
    "torch.zeros(1).double()])), '{solver}', torch.randn({samples}, {d}, generator=torch.Generator().manual_seed(1)))",
}


@st.composite
def settings_of(draw, actions):
    samples = draw(st.integers(1, 3))
    options = f"samples={samples}"
    for name, values in (("seed", st.integers(0, 3)), ("batch_size", st.sampled_from([None, 1, 2]))):
        options += f", {name}={draw(values)}"
    return {
        "kind": draw(st.sampled_from(sorted(KINDS))),
        "action": draw(st.sampled_from(actions)),
        "d": draw(st.sampled_from([8, 9, 12])),
        "seed": draw(st.integers(0, 5)),
        "levels": draw(st.integers(6, 14)),
        "steps": draw(st.integers(1, 4)),
        "solver": draw(st.sampled_from(["ddim", "dpmpp_2m", "heun", "unipc", "ipndm", "fitted"])),
        "samples": samples,
        "options": options,
    }


def program(body, kind, action, **values):
    if action == "sample" and values["solver"] == "fitted":
        values["solver"] = "ddim"
    make, good = KINDS[kind]
    indented = lambda text: textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")
    parts = {"make": make, "good": indented(good), "body": indented(body), "noise": NOISE[kind]}
    return PROGRAM.format(**parts, action=ACTIONS[action].format(**values), **values).strip("\n")


def run(text, doubts="ignore"):
    """What a program finds, and the error it ends with; ``doubts="error"`` for warnings of a network's checks too."""
    scope, grad = {}, torch.is_grad_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings(doubts, message=".*checks=False")
            exec(compile(text, "program", "exec"), scope)
        return scope["found"], None
    except Exception as error:
        return None, error
    finally:
        torch.set_grad_enabled(grad)


def told(text, why):
    pytest.fail(f"{why}\n--- program\n{text}\n---", pytrace=False)


def check_valid(text, found):
    if isinstance(found, torch.Tensor):
        if not bool(found.isfinite().all()):
            told(text, "samples are not finite")
        return
    sigmas, error = found.sigmas, error_of(found)
    descends = bool((sigmas[1:] < sigmas[:-1]).all()) and float(sigmas[-1]) == 0.0
    if not descends or not bool(sigmas[1:].isfinite().all()) or not math.isfinite(error):
        told(text, f"no valid schedule: {found}")


def error_of(schedule):
    return schedule.predicted_error if schedule.measured_error is None else schedule.measured_error


def same(one, other, exact=True):
    """To the bit, or to what float32 leaves of samples that are computed one at a time."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    if exact:
        return torch.equal(one.sigmas, other.sigmas) and one.measured_error == other.measured_error
    return math.isclose(error_of(one), error_of(other), rel_tol=1e-3)  # levels may be another minimum's


@of_all(0.04)
@given(body=st.sampled_from(sorted(HARMLESS)), case=settings_of(["measure", "fit", "sample"]))
def test_harmless_ways_change_nothing(body, case):
    alone = "sample by sample" in body
    text = program(HARMLESS[body], **case)
    found, error = run(text)
    if error is not None:
        told(text, f"{type(error).__name__}: {error}")
    check_valid(text, found)
    if alone and case["action"] == "fit":  # whose runs amplify rounding, up to another minimum: measurements do not
        case = case | {"action": "measure"}
        found, _ = run(program(HARMLESS[body], **case))
    twin, _ = run(program("return good(x, t)", **case))
    if not same(found, twin, exact=not alone):
        told(text, f"not the schedule of its well-behaved twin: {found}, {twin}")


@of_all(0.12)
@given(body=st.sampled_from(sorted(UNUSABLE)), case=settings_of(["measure", "fit", "sample"]))
def test_unusable_outputs_are_named(body, case):
    text = program(UNUSABLE[body], **case)
    found, error = run(text)
    if error is None:
        twin, _ = run(program("return good(x, t)", **case))
        if not same(found, twin):  # what is wrong may never have been asked for
            told(text, f"no error, and another result than its twin's: {found}")
    elif not isinstance(error, (TypeError, ValueError)) or "the network" not in str(error):
        told(text, f"{type(error).__name__}: {error}")


@of_all(0.04)
@given(body=st.sampled_from(sorted(NO_DENOISERS)), case=settings_of(["measure", "fit"]))
def test_what_is_no_denoiser_is_refused_or_warned_of(body, case):
    alone = case["samples"] == 1 or "batch_size=1" in case["options"]  # then no two alike are asked at one level
    assume(not alone or "keeps" not in body)
    text = program(NO_DENOISERS[body], **case)
    found, error = run(text, doubts="error")
    if error is None:
        twin, _ = run(program("return good(x, t)", **case))
        if not same(found, twin):  # a sample alone mixes with no other
            told(text, f"no error, and another result than its twin's: {found}")
    elif not isinstance(error, (ValueError, UserWarning)) or "network" not in str(error):
        told(text, f"{type(error).__name__}: {error}")


@of_all(0.02)
@given(body=st.sampled_from(sorted(RAISING)), case=settings_of(["measure", "fit", "sample"]))
def test_errors_of_the_network_are_its_own(body, case):
    text = program(RAISING[body], **case)
    _, error = run(text)
    # These two say how the network was called; the key alone would say nothing.
    expected = {"StopIteration": "RuntimeError", "KeyError": "ValueError"}.get(body, body)
    if type(error).__name__ != expected:
        told(text, f"{type(error).__name__}: {error}")
