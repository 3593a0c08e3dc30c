"""Compile the kernels for GPUs that are not here, and judge what the compiler made of them."""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import pytest
import torch
from kernel_builds import GRAM, HUTCHINSON, Built, Gram, Hutchinson, build_gram, compiled, gpu_target, recorded
from kernel_worker import build

from fastsched.kernels import config
from fastsched.ops import backends

pytestmark = pytest.mark.skipif(
    (backends._TRITON or (0, 0)) < backends._LEAST_TRITON, reason="the installed Triton cannot compile the kernels"
)

SHARED_MEMORY = {  # bytes that one program may use
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


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


# Bytes of stack that are allowed, each with its reason. Everything else must have none.
SPILLS = {
    # 128 rows fill the registers of sm_80. A tile of 64 rows does not spill, but reads every row three times.
    "sm_80-N128-float32-X_levels-bf16x3": 16,
    "sm_80-N128-bfloat16-X_levels-bf16x3": 32,
    # Pairs of blocks of 64 rows, for more than 128 levels: 8 bytes are written once and read once a program.
    "sm_80-N256-float32-X_vectors-bf16x3": 8,
}


RECORDED = recorded() if backends._TRITON else {}


def built_or_recorded(case: Gram | Hutchinson) -> Built:
    return RECORDED[str(case)] if RECORDED else compiled(case)


@pytest.mark.parametrize("case", GRAM, ids=str)
def test_gram_kernel(case):
    assert problems(built_or_recorded(case), case) == []


@pytest.mark.parametrize("case", HUTCHINSON, ids=str)
def test_hutchinson_kernel(case):
    built = built_or_recorded(case)
    assert built.spilled == 0
    assert built.shared <= SHARED_MEMORY[case.arch]
    assert built.wide_loads == built.loads >= 16


@pytest.mark.slow
@pytest.mark.skipif(not RECORDED, reason="the builds on record are of other kernels or of another Triton")
@pytest.mark.parametrize(
    "case",
    [
        *(Gram(arch, precision=precision) for arch in ("sm_90", "gfx942") for precision in ("bf16x3", "ieee")),
        Gram("sm_80", N=128, R="bfloat16", X="bfloat16"),
        Gram("sm_90", N=128, precision="tf32x3", aligned=False),
        Gram("sm_100", states="vectors"),
        Hutchinson("sm_90", False, "bfloat16"),
    ],
    ids=str,
)
def test_builds_on_record_are_what_the_compiler_makes(case):
    assert compiled(case) == RECORDED[str(case)]


@pytest.mark.parametrize("level_stride", [1, "i64"])
def test_gram_kernel_with_other_strides(level_stride):
    case = Gram("sm_90", aligned=level_stride != 1)
    assert problems(build(build_gram, case, level_stride), case) == []


def test_names_are_of_one_kernel_each():
    names = [str(case) for case in (*GRAM, *HUTCHINSON)]
    assert len(names) == len(set(names))
    assert set(SPILLS) <= set(names)


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


def fusion(arch: str) -> list[bool]:
    """Whether products and sums of each launched kernel are contracted, against what the environment asks for."""
    from triton.compiler.compiler import make_backend

    from fastsched.kernels import hutchinson, level_gram

    vectors = torch.empty(16, 2, 1024, device="meta")
    chosen = config.gram_launch(16, 4, arch, precision="bf16x3", aligned=True)
    with (
        mock.patch.object(level_gram, "gram_kernel") as gram,
        mock.patch.object(hutchinson, "hutchinson_kernel") as sums,
    ):
        level_gram.launch(vectors, None, vectors[:4, 0, :16], "bf16x3", chosen, parts=1)
        hutchinson.hutchinson(vectors[0], vectors)
    launched = [kernel.__getitem__.return_value.call_args.kwargs for kernel in (gram, sums)]
    with mock.patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION="0"):
        return [make_backend(gpu_target(arch)).parse_options(options).enable_fp_fusion for options in launched]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_launches_say_whether_products_and_sums_are_contracted(arch):
    assert build(fusion, arch) == [True, True]
