"""Launch parameters, chosen from a static table by size, dtype and architecture.

Unlike an autotuner, a table launches the same way every time, needs no GPU to be read or tested, and costs nothing on
the first call. ``benchmarks/speed/tune.py`` measures alternatives on a GPU; the fastest are entered by hand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

# Products and sums are contracted (FMA). Triton 3.9 warns where a launch does not say whether they are: it takes this
# default for the last time.
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class GramLaunch:
    """How `level_gram` tiles its input.

    Attributes:
        rows: Rows of the tile, 32, 64 or 128. Fewer levels are stacked, more are divided into blocks of rows.
        columns: Columns of the tile.
        warps: Warps per program.
        stages: Depth of the load pipeline.
        programs: Programs per multiprocessor, among which the columns are divided.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1

    def options(self) -> dict:
        """The compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages, **FUSION}


# One row per family of architectures, one entry per shape, which is the largest number of levels. A shape may have a
# separate entry for a precision or for 16-bit data. tests/kernels/test_kernel_compile.py compiles every entry for every
# architecture that uses it, and reads registers, spills and shared memory from the result.
FAMILIES = {"sm_80": "ampere", "sm_89": "ada", "sm_90": "hopper", "sm_100": "hopper", "sm_120": "ada", "gfx942": "cdna"}
_SMALL = GramLaunch(64, 16, 8, 2)
_SMALLEST = GramLaunch(32, 16, 8, 2)  # fits into the registers in every precision
GRAM = {
    "hopper": {
        "64": GramLaunch(64, 32, 4, 4, programs=3),
        "128": GramLaunch(128, 32, 8, 4, programs=3),
        "128 16-bit": GramLaunch(128, 64, 8, 3),
        "256": GramLaunch(128, 32, 8, 2),
        "256 tf32x3": GramLaunch(64, 32, 4, 3),
    },
    "ampere": {
        "64": GramLaunch(64, 64, 4, 3),
        "64 tf32x3": GramLaunch(64, 32, 4, 3),
        "128": GramLaunch(128, 32, 8, 3),
        "256": GramLaunch(64, 16, 4, 2, programs=2),
    },
    "ada": {
        "64": GramLaunch(64, 32, 4, 2, programs=2),
        "128": GramLaunch(64, 16, 4, 2, programs=2),
        "256": GramLaunch(64, 16, 4, 2, programs=2),
    },
    "cdna": {
        "64": GramLaunch(64, 64, 4, 2, programs=2),
        "128": GramLaunch(128, 64, 8, 2),
        "128 tf32x3": GramLaunch(128, 32, 8, 2),
        "256": GramLaunch(64, 64, 4, 2),
    },
    "unaligned": {  # element by element; wide tiles would spill
        "64": GramLaunch(64, 32, 8, 2),
        "128": _SMALL,
        "256": _SMALL,
    },
    # Float32 products on the ordinary cores, for debugging. 64 rows over four warps or more would use the tensor cores
    # of sm_100, which have no float32: up to Triton 3.7 the compiler silently uses TF32.
    "ieee": dict.fromkeys(("64", "128", "256"), _SMALLEST),
}

HUTCHINSON_COLUMNS, HUTCHINSON_WARPS = 8192, 4  # of a tile: 64 KiB of shared memory hold two in float32; of a program
PROGRAM_COST = 4  # in tiles, a guess: fill the load pipeline, write [ROWS, ROWS] sums, read them for the total


def architecture(device: torch.device) -> str:
    """Return a device's name in the table; the interpreter counts as sm_90.

    Raises:
        ValueError: The device is neither a CUDA nor a HIP device.
    """
    if interpreted():
        return "sm_90"
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA or HIP device; got {device}")
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(major * 10 + minor)


def nearest(capability: int) -> str:
    """Return the newest architecture of the table that is not newer than a compute capability (86 -> sm_80).

    Raises:
        ValueError: It is older than all of them.
    """
    known = [int(name[3:]) for name in FAMILIES if name.startswith("sm_")]
    below = [number for number in known if number <= capability]
    if not below:
        raise ValueError(f"compute capability must be at least 8.0; got {capability / 10}")
    return f"sm_{max(below)}"


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gram_launch(N: int, itemsize: int, arch: str, *, precision: str, aligned: bool) -> GramLaunch:
    """Choose the tile of `level_gram`.

    Args:
        N: Number of levels.
        itemsize: Bytes per element of the widest input.
        arch: One of `FAMILIES`; another gfx name counts as gfx942, any other as sm_80.
        precision: ``"bf16x3"``, ``"tf32x3"`` or ``"ieee"``.
        aligned: Whether rows start on 16-element boundaries, so that loads can be wide.
    """
    family = FAMILIES.get(arch, "cdna" if arch.startswith("gfx") else "ampere")
    table = GRAM["ieee" if precision == "ieee" else family if aligned else "unaligned"]
    shape = "64" if N <= 64 else "128" if N <= 128 else "256"
    special = f"{shape} {precision}", f"{shape} 16-bit" if itemsize == 2 else ""
    return next(table[key] for key in (*special, shape) if key in table)


def splits(tiles: int, samples: int, slots: int) -> int:
    """Choose the number of programs that divide the columns of one sample among them.

    All programs take about equally long, so they run in waves that fill the slots, and the last wave may leave most
    slots idle. With 133 samples and 132 slots, one program per sample takes two waves, and the second has one program.
    More and shorter programs fill the last wave better, but each also costs its start and the writing of its sums. The
    result minimises ``waves * (tiles of a program + PROGRAM_COST)`` over the sixteen smallest numbers of waves.

    Args:
        tiles: Column tiles of one sample; the result is at most this.
        samples: Samples, or pairs of row blocks times samples; each has its own programs.
        slots: Programs that the device runs at once.
    """
    fewest = -(-samples // slots)
    choices = {max(1, min(tiles, waves * slots // samples)) for waves in range(fewest, fewest + 16)}

    def duration(parts: int) -> int:
        return -(-parts * samples // slots) * (-(-tiles // parts) + PROGRAM_COST)

    return min(sorted(choices), key=duration)


def processors(device: torch.device) -> int:
    """Count the multiprocessors of a device; the interpreter counts as three."""
    if interpreted():
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
