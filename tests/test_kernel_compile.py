"""Compile the kernels for GPUs that are not here, and read what the compiler made of them."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import pytest
from kernel_worker import build

from fastsched.kernels import config

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}


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
    code: int  # lines of assembly


@dataclass(frozen=True)
class Gram:
    """A variant of the Gram kernel."""

    arch: str
    N: int = 64
    R: str = "float32"
    X: str = "float32"
    states: str = "levels"
    precision: str = "bf16x3"
    cross: bool = False
    aligned: bool = True
    wide: str = "wide_loads"  # the width that loads must have
    spill: int = 0  # bytes of stack allowed, with the reason beside the case
    change: tuple = ()  # fields of the launch that a planted failure changes
    options: tuple = ()  # further options of the compiler

    def __str__(self) -> str:
        name = f"{self.arch}-N{self.N}-{self.R}-X_{self.states}-{self.precision}"
        return name + "-W" * self.cross + "-unaligned" * (not self.aligned)

    def launch(self) -> config.GramLaunch:
        itemsize = 2 if {self.R, self.X} <= {"bfloat16", "float16"} else 4
        chosen = config.gram_launch(
            self.N, itemsize, self.arch, precision=self.precision, aligned=self.aligned, cross=self.cross
        )
        return dataclasses.replace(chosen, **dict(self.change))


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
        code=len(assembly.splitlines()),
    )


def _read_nvidia(asm: dict, shared: int) -> Built:
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [os.path.join(tools, "cuobjdump"), option, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
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
        code=count(r"/\*[0-9a-f]{4,}\*/", sass),
    )


def build_gram(case: Gram) -> Built:
    from fastsched.kernels import level_gram

    chosen = case.launch()
    types = dict.fromkeys(("p_W", "p_coefficients", "p_gram", "p_diagonal", "p_cross", "p_norms"), "*fp32")
    types |= {"p_R": POINTERS[case.R], "p_X": POINTERS[case.X], "p_pairs": "*i32"}
    constants = level_gram.constants(case.N, case.states, case.cross, case.precision, chosen)
    sizes = ("K", "r_level", "r_sample", "x_level", "x_sample", "w_level", "w_sample")
    unaligned = ("N", "iterations") + (() if case.aligned else sizes)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages} | dict(case.options)
    return compile_kernel(level_gram.gram_kernel, types, constants, unaligned, case.arch, options)


def problems(built: Built, case: Gram) -> list[str]:
    """What is wrong with a build, in words; empty if nothing is."""
    found = []
    if built.code < 500:
        found.append(f"an empty kernel: {built.code} instructions")
    if built.spilled > case.spill:
        found.append(f"spills: {built.spilled} bytes of stack, {case.spill} allowed")
    if built.shared > config.SHARED_MEMORY[case.arch]:
        found.append(f"shared memory: {built.shared} bytes of {config.SHARED_MEMORY[case.arch]}")
    if case.aligned and getattr(built, case.wide) < 5:
        found.append(f"narrow loads: {getattr(built, case.wide)} {case.wide} among {built.loads}")
    if case.precision == "ieee":
        if built.tensor_core or built.tf32:
            found.append(f"float32 products on a tensor core: {built.tensor_core}, TF32: {built.tf32}")
    elif not built.tensor_core:
        found.append("no tensor-core instruction")
    if (case.precision == "tf32x3") != bool(built.tf32) and not case.arch.startswith("gfx"):
        found.append(f"TF32 instructions: {built.tf32} with {case.precision}")
    return found


GRAM = [
    *(Gram(arch) for arch in config.ARCHITECTURES),
    *(Gram(arch, R="bfloat16", X="bfloat16") for arch in ("sm_90", "sm_100")),
    # 16-bit data on gfx942: a thread's four elements are 8 bytes.
    Gram("gfx942", R="bfloat16", X="bfloat16", wide="half_wide_loads"),
    Gram("sm_90", N=16, R="bfloat16"),
    Gram("sm_90", states="shared"),
    Gram("sm_80", states="none", R="float16", X="float16"),
    # 128 rows in bf16x3 fill the registers of sm_80 and spill 16 bytes; half the columns would lose the wide loads.
    Gram("sm_80", N=128, spill=16),
    *(Gram(arch, N=128) for arch in ("sm_90", "sm_100", "gfx942")),
    Gram("sm_90", N=128, R="bfloat16", X="bfloat16"),
    Gram("sm_90", N=256),
    *(Gram(arch, precision="tf32x3") for arch in ("sm_80", "sm_90", "sm_100")),
    Gram("sm_90", cross=True),
    # 16 columns, or 32 over 8 warps, leave a thread two elements a row slice: 8 bytes, the price of not spilling.
    *(Gram(arch, cross=True, wide="half_wide_loads") for arch in ("sm_80", "gfx942")),
    *(Gram(arch, N=128, cross=True, wide="half_wide_loads") for arch in ("sm_90", "sm_100")),
    # Rows that start anywhere are loaded element by element.
    Gram("sm_80", aligned=False),
    Gram("sm_90", N=128, aligned=False),
    # Two warps keep sm_100 off its tensor core (see config.py) but are short of registers; a debugging mode.
    Gram("sm_100", precision="ieee", spill=8),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRAM, ids=str)
def test_gram_kernel(case):
    assert problems(build(build_gram, case), case) == []


PLANTED = {
    "spill": (Gram("sm_90", options=(("maxnreg", 64),)), "spills"),
    "scalar-loads": (Gram("sm_90", aligned=False), "narrow loads"),
    "shared-memory": (Gram("sm_89", change=(("stages", 8), ("columns", 64))), "shared memory"),
    "tf32-for-float32": (
        Gram("sm_100", precision="ieee", change=(("warps", 4), ("columns", 32))),
        "float32 products on a tensor core",
    ),
    "no-tensor-core": (Gram("sm_90", precision="ieee"), "no tensor-core instruction"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_are_seen(name):
    case, expected = PLANTED[name]
    judged_as = {"scalar-loads": {"aligned": True}, "no-tensor-core": {"precision": "bf16x3"}}.get(name, {})
    found = problems(build(build_gram, case), dataclasses.replace(case, **judged_as))
    assert any(problem.startswith(expected) for problem in found), found


def build_hutchinson(arch: str, probe: str, dtype: str) -> Built:
    from fastsched.kernels import hutchinson

    chosen = config.hutchinson_launch(probe)
    types = {"p_V": POINTERS[dtype], "p_JV": POINTERS[dtype], "p_sums": "*fp32", "seed": "i64"}
    constants, options = hutchinson.constants(probe, chosen), {"num_warps": chosen.warps}
    return compile_kernel(hutchinson.hutchinson_kernel, types, constants, ("N", "samples", "seed"), arch, options)


HUTCHINSON = [
    *((arch, "seed", "float32") for arch in ARCHITECTURES),
    ("sm_90", "shared", "bfloat16"),
    ("sm_89", "levels", "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "probe", "dtype"), HUTCHINSON)
def test_hutchinson_kernel(arch, probe, dtype):
    built = build(build_hutchinson, arch, probe, dtype)
    assert built.spilled == 0
    assert built.shared <= config.SHARED_MEMORY[arch]
    assert built.wide_loads >= 4
    assert built.wide_loads >= built.loads // 2


def build_min_plus(arch: str, kernel: str) -> Built:
    from fastsched.kernels import min_plus

    chosen = config.MinPlusLaunch()
    types = {"p_best": "*fp64", "p_cost": "*fp64", "p_longer": "*fp64", "p_before": "*i32"}
    types |= {"p_totals": "*fp64", "p_paths": "*i64"}
    if kernel == "extend":
        constants = {"BI": chosen.previous, "BK": chosen.following}
        return compile_kernel(min_plus.extend_kernel, types, constants, ("M",), arch, {"num_warps": chosen.warps})
    return compile_kernel(min_plus.backtrack_kernel, types, {"BM": 256}, ("M", "steps"), arch, {"num_warps": 1})


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["extend", "backtrack"])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_min_plus_kernel(arch, kernel):
    built = build(build_min_plus, arch, kernel)
    assert built.spilled == 0
    assert built.shared <= 48 * 1024
    assert built.loads >= 2
