"""Solver names on a command line: those of samplers' menus and libraries are understood too."""

from __future__ import annotations


def resolve_solver(name: str) -> tuple[str, str | None]:
    """The name for fastsched, and a remark for the user if it differs in more than spelling.

    Names of fastsched come back as they are, and unknown ones too, for the library's own error.

    Raises:
        ValueError: If it is a known sampler without a counterpart here; the message names the nearest.
    """
    from fastsched.sampling.solver_names import known_as
    from fastsched.sampling.solvers import ALIASES, SOLVERS, STOCHASTIC_SOLVERS

    if name in SOLVERS or name in ALIASES or name in STOCHASTIC_SOLVERS:
        return name, None
    found, ending = known_as(name, (*ALIASES, *SOLVERS))
    if found is None:
        return name, None
    remark = f"solver {name!r} is {found} here"
    if ending is not None:
        remark += f"; fastsched's noise levels take the place of the {ending} ones"
    return found, remark
