"""Compile the kernels for GPUs that are not here, and read what the compiler made of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import pytest
from kernel_worker import build

from fastsched.kernels import config
from fastsched.ops import backends

pytestmark = pytest.mark.skipif(
    (backends._TRITON or (0, 0)) < backends._LEAST_TRITON, reason="the installed Triton cannot compile the kernels"
)

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}
PRECISIONS = ("bf16x3", "tf32x3", "ieee")
SHARED_MEMORY = {  # bytes that one program may use
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Built:
    """What one compilation took, and which instructions it came to."""

    registers: int
    spilled: int  # bytes of stack a thread
    shared: int  # bytes a program
    wide_loads: int  # of 16 bytes, asynchronous or not
    half_wide_loads: int  # of 8 bytes
    loads: int  # of any width
    tensor_core: int
    tf32: int


@dataclass(frozen=True)
class Gram:
    """A variant of the Gram kernel."""

    arch: str
    N: int = 64
    R: str = "float32"
    X: str = "float32"
    states: str = "levels"
    precision: str = "bf16x3"
    aligned: bool = True
    change: tuple = ()  # fields of the launch that a planted failure changes
    options: tuple = ()  # further options of the compiler

    def __str__(self) -> str:
        name = f"{self.arch}-N{self.N}-{self.R}-X_{self.states}-{self.precision}"
        return name + "-unaligned" * (not self.aligned)

    def launch(self) -> config.GramLaunch:
        itemsize = 2 if {self.R, self.X} <= {"bfloat16", "float16"} else 4
        chosen = config.gram_launch(self.N, itemsize, self.arch, precision=self.precision, aligned=self.aligned)
        return dataclasses.replace(chosen, **dict(self.change))

    def load_width(self) -> int:
        """Bytes a thread should load at once: its share of a slice, every fourth row of the tile, 16 at most."""
        launch, lanes = self.launch(), 64 if self.arch.startswith("gfx") else 32
        elements = launch.rows // 4 * launch.columns // (lanes * launch.warps)
        return min(16, elements * ITEMSIZES[self.R]) if self.aligned else 0


def compile_kernel(function, types: dict, constants: dict, unaligned: tuple, arch: str, options: dict) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if name not in unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    built = triton.compile(ASTSource(function, signature, constexprs, attributes), target=target, options=options)
    shared = built.metadata.shared
    return _read_amd(built.asm["amdgcn"], shared) if amd else _read_nvidia(built.asm, shared)


def _read_amd(assembly: str, shared: int) -> Built:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly))

    return Built(
        registers=field("vgpr_count"),
        spilled=field("private_segment_fixed_size"),
        shared=shared,
        wide_loads=count(r"\b(?:global|buffer)_load_dwordx4"),
        half_wide_loads=count(r"\b(?:global|buffer)_load_dwordx2"),
        loads=count(r"\b(?:global|buffer)_load_"),
        tensor_core=count(r"\bv_mfma_"),
        tf32=count(r"\bv_mfma_\w*xf32"),
    )


def _read_nvidia(asm: dict, shared: int) -> Built:
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [os.path.join(tools, tool), option, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "--no-dataflow"))
        )

    def count(pattern: str, text: str) -> int:
        return len(re.findall(pattern, text))

    return Built(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=shared,
        wide_loads=count(r"\bLDG(?:STS)?\.E[.\w]*\.128", sass),
        half_wide_loads=count(r"\bLDG(?:STS)?\.E[.\w]*\.64", sass),
        loads=count(r"\bLDG(?:STS)?\.E", sass),
        tensor_core=count(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass),
        tf32=count(r"kind::tf32|\.tf32", asm["ptx"]),
    )


def build_gram(case: Gram, level_stride: int | str = "i32") -> Built:
    """Build a case with strides between levels that are of a type, or known to be 1 (as Triton takes that number)."""
    from fastsched.kernels import level_gram

    chosen = case.launch()
    types = dict.fromkeys(("p_coefficients", "p_gram", "p_diagonal"), "*fp32")
    types |= {"p_R": POINTERS[case.R], "p_X": POINTERS[case.X], "p_pairs": "*i32"}
    constants = level_gram.constants(case.N, case.states, case.precision, chosen)
    strides = dict.fromkeys(("r_level", "x_level"), level_stride)
    types, constants = (types | strides, constants) if isinstance(level_stride, str) else (types, constants | strides)
    sizes = ("K", "r_level", "r_sample", "x_level", "x_sample")
    unaligned = ("N", "iterations") + (() if case.aligned else sizes)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages} | dict(case.options)
    return compile_kernel(level_gram.gram_kernel, types, constants, unaligned, case.arch, options)


def problems(built: Built, case: Gram) -> list[str]:
    """What is wrong with a build, in words; empty if nothing is."""
    found = []
    if built.spilled > SPILLS.get(str(case), 0):
        found.append(f"spills: {built.spilled} bytes of stack, {SPILLS.get(str(case), 0)} allowed")
    if built.shared > SHARED_MEMORY[case.arch]:
        found.append(f"shared memory: {built.shared} bytes of {SHARED_MEMORY[case.arch]}")
    wide = {16: built.wide_loads, 8: built.wide_loads + built.half_wide_loads}.get(case.load_width(), built.loads)
    if wide < (1 if case.states == "vectors" else 5):  # the slices of one input
        found.append(f"narrow loads: {wide} of {case.load_width()} bytes among {built.loads}")
    amd = case.arch.startswith("gfx")  # its matrix units do have float32
    if case.precision == "ieee":
        if built.tf32 or (built.tensor_core and not amd):
            found.append(f"float32 products on a tensor core: {built.tensor_core}, TF32: {built.tf32}")
    elif not built.tensor_core:
        found.append("no tensor-core instruction")
    if (case.precision == "tf32x3") != bool(built.tf32) and not amd:
        found.append(f"TF32 instructions: {built.tf32} with {case.precision}")
    return found


def every_entry() -> list[Gram]:
    """A case for every kernel that the launch table can lead to, in float32 with states, which needs most registers.

    Rows that are not aligned have the same launch on every card; they are compiled for one of each vendor. Precisions
    other than the default are compiled for one card of each way to multiply in them, and one of little shared memory.
    """
    cases: dict[tuple, Gram] = {}
    for arch, precision, N, aligned in itertools.product(config.FAMILIES, PRECISIONS, (64, 128, 256), (True, False)):
        if arch not in ("sm_90", "gfx942") and not aligned:
            continue
        if arch == "sm_120" and precision != PRECISIONS[0]:  # as sm_89
            continue
        case = Gram(arch, N=N, precision=precision, aligned=aligned)
        key = arch, precision, aligned, case.launch(), case.launch().rows < N
        cases.setdefault(key, case)
    return list(cases.values())


GRAM = [
    *every_entry(),
    *(Gram(arch, R="bfloat16", X="bfloat16") for arch in config.FAMILIES),
    *(Gram(arch, N=128, R="bfloat16", X="bfloat16") for arch in ("sm_80", "sm_90", "gfx942")),
    *(Gram(arch, R="bfloat16", states="shared") for arch in ("sm_90", "sm_100")),
    *(Gram(arch, states="none", R="float16", X="float16") for arch in ("sm_80", "sm_90")),
    *(Gram(arch, N=16, R="bfloat16") for arch in ("sm_90", "gfx942")),
    *(Gram(arch, N=64, states="vectors") for arch in config.FAMILIES),
    *(Gram(arch, N=N, states="vectors") for arch in ("sm_80", "sm_89", "sm_90", "gfx942") for N in (128, 256)),
]

# Bytes of stack that are allowed, each with its reason. Everything else must have none.
SPILLS = {
    # 128 rows fill the registers of sm_80. A tile of 64 rows does not spill, but reads every row three times.
    "sm_80-N128-float32-X_levels-bf16x3": 16,
    "sm_80-N128-bfloat16-X_levels-bf16x3": 32,
    # Pairs of blocks of 64 rows, for more than 128 levels: 8 bytes are written once and read once a program.
    "sm_80-N256-float32-X_vectors-bf16x3": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRAM, ids=str)
def test_gram_kernel(case):
    assert problems(build(build_gram, case), case) == []


@pytest.mark.parametrize("level_stride", [1, "i64"])
def test_gram_kernel_with_other_strides(level_stride):
    case = Gram("sm_90", aligned=level_stride != 1)
    assert problems(build(build_gram, case, level_stride), case) == []


def test_spills_are_of_kernels_that_exist():
    assert set(SPILLS) <= {str(case) for case in GRAM}


PLANTED = {
    "spill": (Gram("sm_90", options=(("maxnreg", 64),)), "spills"),
    "scalar-loads": (Gram("sm_90", aligned=False), "narrow loads"),
    "shared-memory": (Gram("sm_89", change=(("stages", 8), ("columns", 64))), "shared memory"),
    "tf32-for-float32": (
        Gram("sm_100", precision="ieee", change=(("rows", 64), ("warps", 4), ("columns", 32))),
        "float32 products on a tensor core",
    ),
    "no-tensor-core": (Gram("sm_90", precision="ieee"), "no tensor-core instruction"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_are_seen(name):
    if name == "tf32-for-float32" and backends._TRITON >= (3, 8):
        pytest.skip("since Triton 3.8 the compiler multiplies float32 as float32 there")
    case, expected = PLANTED[name]
    judged_as = {"scalar-loads": {"aligned": True}, "no-tensor-core": {"precision": "bf16x3"}}.get(name, {})
    found = problems(build(build_gram, case), dataclasses.replace(case, **judged_as))
    assert any(problem.startswith(expected) for problem in found), found


def build_hutchinson(arch: str, shared: bool, dtype: str) -> Built:
    from fastsched.kernels import hutchinson

    chosen = config.hutchinson_launch(shared=shared)
    types = {"p_V": POINTERS[dtype], "p_JV": POINTERS[dtype], "p_sums": "*fp32"}
    constants, options = hutchinson.constants(shared, chosen), {"num_warps": chosen.warps}
    return compile_kernel(hutchinson.hutchinson_kernel, types, constants, ("N", "samples"), arch, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shared", "dtype"),  # one launch for all: all its variants for one card, and each other card in turn
    [
        *(("sm_90", shared, dtype) for shared in (True, False) for dtype in ("float32", "bfloat16")),
        *((arch, arch.startswith("sm"), "float32") for arch in config.FAMILIES if arch != "sm_90"),
    ],
)
def test_hutchinson_kernel(arch, shared, dtype):
    built = build(build_hutchinson, arch, shared, dtype)
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[arch]
    assert built.wide_loads == built.loads >= 16
