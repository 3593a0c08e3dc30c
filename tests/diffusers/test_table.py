"""Every scheduler of diffusers is run: the committed table is current, and `solver_of` names the right solvers."""

import warnings

import pytest

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import scheduler_table

from fastsched.diffusers.applier import applied
from fastsched.diffusers.conventions import describe, solver_of

PINNED = "0.42.1"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers


@pytest.fixture(scope="module")
def rows():
    with warnings.catch_warnings():
        scheduler_table.quietly()
        return scheduler_table.rows()


@pytest.mark.slow
def test_the_table_is_current(rows):
    pytest.importorskip("torchsde", reason="some classes of the table need it")
    if diffusers.__version__ != PINNED:
        pytest.skip(f"the committed table is of diffusers {PINNED}; this is {diffusers.__version__}")
    expected = scheduler_table.HEADER + "\n".join(line for line, _ in rows.values()) + "\n"
    written = scheduler_table.PATH.read_text(encoding="utf-8")
    assert written == expected, "run: python tests/scheduler_table.py"


#: Equal solvers of fastsched: of third order, the two variants of UniPC differ only by rounding.
TWINS = {"unipc_3": ["unipc_3", "unipc_bh1_3"], "unipc_bh1_3": ["unipc_3", "unipc_bh1_3"], None: []}
PARITY = {
    *("ddim", "heun", "dpm_2", "dpmpp_2m", "dpmpp_3m", "lms", "ipndm", "deis_2", "deis_3"),
    *("dpmpp_3m_lowered", "deis_3_lowered", "unipc_3_lowered", "unipc_bh1_3_lowered"),
    *("unipc", "unipc_3", "unipc_bh1", "unipc_bh1_3"),
}


@pytest.mark.slow
def test_solvers_agree_with_the_schedulers_they_are(rows):
    """Parity to 1e-3 on a mixture of Gaussians from the same noises, and no other solver agrees."""
    found = {key: result for key, (_, result) in rows.items() if result is not None}
    wrong = {key: result for key, result in found.items() if result[1] != TWINS.get(result[0], [result[0]])}
    assert not wrong
    assert {solver for solver, _ in found.values()} == PARITY | {None}


LONG = {
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    "deis_2": ("DEISMultistepScheduler", {}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"prediction_type": "v_prediction"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


@pytest.mark.parametrize("solver", LONG)
def test_solvers_agree_beyond_the_steps_where_classes_lower_their_order(solver):
    name, config = LONG[solver]
    scheduler, steps = getattr(diffusers, name)(**config), 16
    convention = describe(scheduler)
    target, proof = applied(scheduler_table.uneven_schedule(convention, steps), scheduler)
    target.set_timesteps(50)
    assert solver_of(scheduler, steps) == solver
    assert scheduler_table.matching_solvers(target, convention, proof.sigmas) == [solver]
