"""Stock solvers as fitted ones: the same samples from the same calls, from finite levels and from pure noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fastsched as fs
from fastsched.sampling.sampler import nodes_of
from fastsched.sampling.solvers import SOLVERS, get_solver
from fastsched.sampling.stock_weights import stock_weights

LINEAR = [name for name, solver in SOLVERS.items() if solver.variable == "rho" and solver.stage is None]
DENOISERS = {
    "edm": fs.Denoiser.from_denoiser(lambda x, s: torch.tanh(x) / (1 + s.view(-1, 1)), 0.01, 80.0),
    "flow": fs.Denoiser.from_velocity(lambda x, t: torch.sin(x) + t.view(-1, 1)),
}


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("solver", LINEAR)
def test_a_stock_solver_as_a_fitted_one(solver, kind):
    """On flow the first level is pure noise. The fitted solver's last row is the last answer alone."""
    denoiser = DENOISERS[kind]
    levels = torch.cat([denoiser.levels(7)[:6], torch.zeros(1, dtype=torch.float64)])
    weights = stock_weights(solver, nodes_of(denoiser.process, levels))
    assert weights.shape == (6, 6)
    assert weights[-1].tolist() == [0.0] * 5 + [1.0]
    stock = fs.Schedule.from_levels(denoiser.process, levels, solver)
    fitted = replace(stock, solver="fitted", weights=torch.from_numpy(weights))
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = fs.sample(denoiser, stock, noise=noise)
    torch.testing.assert_close(fs.sample(denoiser, fitted, noise=noise), expected, rtol=1e-9, atol=1e-9)


def test_several_schedules_at_once():
    process = DENOISERS["edm"].process
    levels = torch.tensor([[80.0, 9.0, 2.0, 0.4, 0.0], [80.0, 20.0, 1.0, 0.1, 0.0]])
    both = stock_weights("unipc", nodes_of(process, levels))
    for own, row in zip(both, levels, strict=True):
        alone = stock_weights("unipc", nodes_of(process, row))
        np.testing.assert_allclose(own, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["heun", "ipndm"])
def test_solvers_over_tau_or_with_a_stage_are_refused(solver):
    """Two calls a step, or slopes in another variable."""
    nodes = nodes_of(DENOISERS["edm"].process, torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="solver must be a multistep solver over rho"):
        stock_weights(get_solver(solver), nodes)
