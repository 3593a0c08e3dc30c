"""Every scheduler of diffusers, run: the committed table is current, and solvers are the ones claimed."""

import warnings

import pytest

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

import diffusers
import scheduler_table

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


@pytest.mark.slow
def test_solvers_agree_with_the_schedulers_they_are(rows):
    """Parity to 1e-3 on a mixture of Gaussians from the same noises, and no other solver agrees."""
    found = {key: result for key, (_, result) in rows.items() if result is not None}
    wrong = {key: result for key, result in found.items() if result[1] != ([result[0]] if result[0] else [])}
    assert not wrong
    assert {solver for solver, _ in found.values()} >= {"ddim", "dpmpp_2m", "dpmpp_3m", "heun", "unipc"}
