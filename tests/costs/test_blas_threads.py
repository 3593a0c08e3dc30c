import threading
import warnings

import pytest
import torch
from threadpoolctl import ThreadpoolController, threadpool_info

import fastsched as fs
from fastsched.costs.blas_threads import _openblas, one_blas_thread
from fastsched.fitting import gauss_newton
from fastsched.selection import optimal

OPENBLAS = ThreadpoolController().select(internal_api="openblas")


def threads(internal_api="openblas"):
    return {library["num_threads"] for library in threadpool_info() if library["internal_api"] == internal_api}


def set_threads(number):
    """From a thread that ends: threadpoolctl lets no other set the number while the first that did so lives."""
    thread = threading.Thread(target=lambda: OPENBLAS.limit(limits=number))
    thread.start()
    thread.join()


@pytest.fixture(autouse=True)
def three_threads():
    """OpenBLAS has three threads outside, whatever the environment says."""
    before = max(threads(), default=1)
    set_threads(3)
    if threads() != {3}:
        pytest.skip("NumPy and SciPy have no OpenBLAS here whose threads can be set")
    yield
    set_threads(before)


def test_one_thread_inside_and_as_many_as_before_afterwards():
    others = threads("openmp"), torch.get_num_threads()
    with one_blas_thread():
        with one_blas_thread():
            assert threads() == {1}
        assert threads() == {1}
        assert (threads("openmp"), torch.get_num_threads()) == others
    assert threads() == {3}


def test_an_error_lifts_the_limit():
    @one_blas_thread()
    def failing():
        assert threads() == {1}
        raise ArithmeticError

    for _ in range(2):  # nor does an error keep the next block from its limit
        with pytest.raises(ArithmeticError):
            failing()
        assert threads() == {3}


@pytest.mark.parametrize("first", ["here", "there"])
def test_blocks_that_overlap_in_two_threads_leave_the_number_of_threads_as_it_was(first):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with one_blas_thread():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    if first == "here":
        with one_blas_thread():
            thread.start()
            assert entered.wait(60)
            assert threads() == {1}
        leave.set()
    else:
        thread.start()
        assert entered.wait(60)
        with one_blas_thread():
            leave.set()
            thread.join()
    thread.join()
    assert threads() == {3}
    with one_blas_thread():
        assert threads() == {1}


@pytest.mark.parametrize("solver", ["dpmpp_2m", "fitted"])
def test_searches_use_one_thread(solver, monkeypatch):
    seen = []

    def watched(function):
        return lambda *arguments: seen.append(threads()) or function(*arguments)

    monkeypatch.setattr(optimal, "descend", watched(optimal.descend))
    monkeypatch.setattr(optimal, "starting_levels", watched(optimal.starting_levels))
    monkeypatch.setattr(gauss_newton, "quadratic", watched(gauss_newton.quadratic))
    mixture = fs.oracles.GaussianMixture.random(8, 4, seed=0)
    denoiser = fs.Denoiser.from_denoiser(mixture.denoise, 0.01, 10.0)
    fs.fit(denoiser, (8,), 4, solver, levels=16, samples=4, progress=False)
    assert len(seen) > 4
    assert all(each == {1} for each in seen)
    assert threads() == {3}


def test_two_kinds_of_openmp_in_a_program_are_not_warned_of(monkeypatch):
    def warn(controller):
        warnings.warn("Found Intel OpenMP ('libiomp') and LLVM OpenMP ('libomp')", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(ThreadpoolController, "_warn_if_incompatible_openmp", warn)
    with pytest.warns(RuntimeWarning):
        ThreadpoolController()
    assert len(_openblas.__wrapped__()) == len(OPENBLAS)
