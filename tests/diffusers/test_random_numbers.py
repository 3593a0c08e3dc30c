"""Calls of pipelines in several threads do not disturb each other's random numbers, nor networks that they share."""

import random
import threading

import numpy as np
import pytest
import torch

import fastsched as fs

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import pipelines

from fastsched.diffusers.pipelines.measurement import call
from fastsched.diffusers.random_numbers import ONE_CALL, random_numbers_kept


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - global


def in_threads(*functions):
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_do_not_see_each_others_states():
    """The second seeds only when the first has drawn and restored."""
    before, drawn = random_states(), {}
    inside, waiting = threading.Event(), threading.Event()

    def first():
        with random_numbers_kept([]):
            inside.set()
            waiting.wait(60)
            drawn["first"] = torch.randn(3)

    def second():
        inside.wait(60)
        waiting.set()
        with random_numbers_kept([], seed=1):
            drawn["second"] = torch.randn(3)

    in_threads(first, second)
    assert random_states() == before
    for name, seed in (("first", 0), ("second", 1)):
        assert torch.equal(drawn[name], torch.randn(3, generator=torch.Generator().manual_seed(seed)))


def test_within_a_thread_calls_may_be_nested():
    before = random_states()
    with ONE_CALL, random_numbers_kept([]):
        first = torch.randn(3)
        with random_numbers_kept([], seed=2**32 + 1):  # NumPy's seeds have 32 bits
            torch.randn(3)
        second = torch.randn(3)
    assert random_states() == before
    drawn = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([first, second])[:3], drawn[:3])


def test_a_fit_in_another_thread_changes_no_draw():
    """Of the conditioning that a pipeline draws from the global state, all runs of a fit see one."""
    torch.manual_seed(5)
    before = random_states()
    pipes = [drawing_pipeline() for _ in range(3)]
    options = {"levels": 8, "samples": 2, "model_calls": 60, "progress": False}
    in_threads(*(lambda pipe=pipe: fs.diffusers.fit(pipe, 3, conditioning=0.1, **options) for pipe in pipes))
    assert random_states() == before
    for pipe in pipes:
        assert len(pipe.draws) > 2
        assert all(torch.equal(draw, pipes[0].draws[0]) for draw in pipe.draws)


def drawing_pipeline():
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return pipelines.oracle_pipeline(scheduler, fs.oracles.GaussianMixture.random(8, 3, seed=0))


def test_pipelines_that_share_a_network_are_measured_in_threads():
    pipes = [drawing_pipeline()]
    pipes.append(pipelines.OraclePipeline(pipes[0].unet, pipes[0].scheduler))
    options = {"levels": 12, "samples": 6, "progress": False}
    expected, found = fs.diffusers.measure(pipes[0], **options), []
    in_threads(*(lambda pipe=pipe: found.append(fs.diffusers.measure(pipe, **options)) for pipe in pipes))
    assert len(found) == 2
    assert all(torch.equal(stats.gram, expected.gram) for stats in found)


def test_a_fit_within_a_callback_of_another_ends():
    """A thread that holds the lock may take it again."""
    outer, inner = drawing_pipeline(), drawing_pipeline()
    options = {"levels": 8, "samples": 2, "progress": False}
    found = []

    def on_step(index, output):
        if index == 5 and not found:
            found.append(fs.diffusers.measure(inner, **options))
        return output

    in_threads(lambda: found.append(fs.diffusers.measure(outer, **options, on_step=on_step)))
    assert len(found) == 2


def test_a_call_has_the_seed_that_it_is_given():
    pipe = drawing_pipeline()
    for seed in (0, 0, 7):
        call(pipe, 3, {"conditioning": 1.0}, seed=seed)
    assert torch.equal(pipe.draws[0], pipe.draws[1])
    assert not torch.equal(pipe.draws[0], pipe.draws[2])
