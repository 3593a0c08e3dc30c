"""Kernels compiled for GPUs that are not here: ``python tests/kernel_builds.py`` writes tests/kernel_builds.json.

A compilation takes seconds, and gives the same each time. So the file keeps what all came to, with a digest of the code
and the version of the compiler. The tests read it as long as neither changes, and else compile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass

from kernel_worker import build
from tqdm import tqdm

from fastsched.kernels import config

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}
PRECISIONS = ("bf16x3", "tf32x3", "ieee")
PATH = pathlib.Path(__file__).with_suffix(".json")
ROOT = PATH.parents[1]
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


@dataclass(frozen=True)
class Hutchinson:
    """A variant of the Hutchinson kernel."""

    arch: str
    shared: bool
    dtype: str

    def __str__(self) -> str:
        return f"hutchinson-{self.arch}-{self.dtype}-V_{'shared' if self.shared else 'levels'}"


def compile_kernel(function, types: dict, constants: dict, unaligned: tuple, arch: str, options: dict) -> Built:
    import triton
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if name not in unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pytest's filters do not reach this process
        built = triton.compile(source, target=gpu_target(arch), options=options)
    shared = built.metadata.shared
    return _read_amd(built.asm["amdgcn"], shared) if arch.startswith("gfx") else _read_nvidia(built.asm, shared)


def gpu_target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


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
    options = chosen.options() | dict(case.options)
    return compile_kernel(level_gram.gram_kernel, types, constants, unaligned, case.arch, options)


def build_hutchinson(case: Hutchinson) -> Built:
    from fastsched.kernels import hutchinson

    types = {"p_V": POINTERS[case.dtype], "p_JV": POINTERS[case.dtype], "p_sums": "*fp32"}
    constants, unaligned = hutchinson.constants(case.shared), ("N", "samples")
    return compile_kernel(hutchinson.hutchinson_kernel, types, constants, unaligned, case.arch, hutchinson.OPTIONS)


def every_entry() -> list[Gram]:
    """A case for every kernel that the launch table can lead to, in float32 with states, which needs most registers."""
    cases: dict[tuple, Gram] = {}
    for arch, precision, N, aligned in itertools.product(config.FAMILIES, PRECISIONS, (64, 128, 256), (True, False)):
        case = Gram(arch, N=N, precision=precision, aligned=aligned)
        key = arch, precision, aligned, case.launch(), case.launch().rows < N
        cases.setdefault(key, case)
    return list(cases.values())


GRAM = [
    *every_entry(),
    *(Gram(arch, N=N, R="bfloat16", X="bfloat16") for arch in config.FAMILIES for N in (64, 128)),
    *(Gram(arch, R="bfloat16", states="shared") for arch in ("sm_90", "sm_100")),
    *(Gram(arch, states="none", R="float16", X="float16") for arch in ("sm_80", "sm_90")),
    *(Gram(arch, N=16, R="bfloat16") for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(Gram(arch, N=N, states="vectors") for arch in config.FAMILIES for N in (64, 128, 256)),
]
HUTCHINSON = [Hutchinson(*each) for each in itertools.product(config.FAMILIES, (True, False), ("float32", "bfloat16"))]


def compiled(case: Gram | Hutchinson) -> Built:
    """Compile a case now."""
    return build(build_gram if isinstance(case, Gram) else build_hutchinson, case)


def digest() -> str:
    """Of all that decides what a compilation gives: the kernels, their launches, this file and Triton's version."""
    import triton

    sources = [
        pathlib.Path(__file__),
        *(ROOT / "kernels" / f"{name}.py" for name in ("config", "level_gram", "hutchinson")),
    ]
    parts = [triton.__version__.encode(), *(source.read_bytes() for source in sources)]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def recorded() -> dict[str, Built]:
    """What the file says of every case, by name; empty if it is of other code or of another Triton."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    return {name: Built(**built) for name, built in found["builds"].items()} if found["digest"] == digest() else {}


def main() -> None:
    found = {str(case): dataclasses.asdict(compiled(case)) for case in tqdm([*GRAM, *HUTCHINSON], unit="kernel")}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(built)}" for name, built in found.items())
    PATH.write_text(f'{{\n  "digest": "{digest()}",\n  "builds": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
