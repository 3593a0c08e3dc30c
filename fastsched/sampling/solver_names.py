"""Names of samplers in menus and other libraries, and the solvers that they correspond to."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Names of samplers in web interfaces, k-diffusion and diffusers, in the spelling of `plain`, and their solvers here,
#: if these have other names.
KNOWN = {
    "euler": "ddim",
    "heun2": "heun",
    "deis": "deis_2",
    "unipc": "unipc",  # which is also the plain spelling of the alias "uni_pc"
    "eulera": "ancestral",
    "eulerancestral": "ancestral",
    "dpmpp2msde": "sde_dpmpp_2m",
    "eulerdiscretescheduler": "ddim",
    "edmeulerscheduler": "ddim",
    "flowmatcheulerdiscretescheduler": "ddim",
    "ddimscheduler": "ddim",
    "heundiscretescheduler": "heun",
    "flowmatchheundiscretescheduler": "heun",
    "kdpm2discretescheduler": "dpm_2",
    "dpmsolvermultistepscheduler": "dpmpp_2m",
    "edmdpmsolvermultistepscheduler": "dpmpp_2m",
    "dpmsolversinglestepscheduler": "dpmpp_2s",
    "lmsdiscretescheduler": "lms",
    "unipcmultistepscheduler": "unipc",
    "deismultistepscheduler": "deis_2",
    "ipndmscheduler": "ipndm",
    "eulerancestraldiscretescheduler": "ancestral",
}
#: Names of samplers that fastsched does not have, and the error message for each.
UNKNOWN = {
    "dpmppsde": "DPM++ SDE is not supported; 'sde_dpmpp_2m' is the stochastic solver of the family",
    "dpmpp3msde": "DPM++ 3M SDE is not supported; 'dpmpp_3m' is its deterministic form",
    "dpmpp2sa": "DPM++ 2S a (ancestral) is not supported; 'dpmpp_2s' is its deterministic form",
    "dpmpp2sancestral": "DPM++ 2S ancestral is not supported; 'dpmpp_2s' is its deterministic form",
    "dpm2a": "DPM2 a (ancestral) is not supported; 'dpm_2' is its deterministic form",
    "dpm2ancestral": "DPM2 ancestral is not supported; 'dpm_2' is its deterministic form",
    "plms": "PLMS is not supported; 'ipndm' is the nearest solver",
    "pndm": "PNDM is not supported; 'ipndm' is the nearest solver",
    "dpmfast": "DPM fast chooses its own steps; it cannot be given a schedule",
    "dpmadaptive": "DPM adaptive chooses its own steps; it cannot be given a schedule",
    "lcm": "LCM samples a distilled model in its own steps; the nearest solvers are 'ancestral' and 'ddim'",
    "ddpm": "DDPM is not supported; 'ancestral' is the nearest stochastic solver",
}
#: Noise schedules that menus append to a sampler's name: "DPM++ 2M Karras".
SUFFIXES = ("karras", "exponential", "sgmuniform", "simple", "normal", "beta", "kloptimal", "alignyoursteps", "ays")


def plain(name: str) -> str:
    """``name`` in lower case without separators, ``+`` as p: "DPM++ 2M" and "sample_dpmpp_2m" are both dpmpp2m."""
    return re.sub("[^a-z0-9]", "", name.lower().removeprefix("sample_").replace("+", "p"))


def known_as(name: str, own: Iterable[str]) -> tuple[str | None, str | None]:
    """The solver, one of our ``own`` names, and the noise schedule that a menu's or a library's name stands for.

    Either is None if the name does not contain it. A ValueError names the nearest solver if fastsched does not have the
    sampler.
    """
    # Menus join a sampler and a noise schedule. fastsched chooses the schedule, so only the sampler is looked up.
    short, ending = plain(name), None
    for suffix in SUFFIXES:
        if short.endswith(suffix) and short != suffix:
            short, ending = short.removesuffix(suffix), suffix
            break
    if short in UNKNOWN:
        raise ValueError(f"solver {name!r}: {UNKNOWN[short]}")
    return KNOWN.get(short) or {plain(each): each for each in own}.get(short), ending
