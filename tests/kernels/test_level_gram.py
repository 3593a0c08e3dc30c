import itertools
import math

import numpy as np
import pytest
import torch
from kernel_cases import EPS, PRODUCT_ERROR, PRODUCT_RMS, GramCase, gram_scale, summation_error, terms
from kernel_worker import DEVICE, launch, nan_in_new_tensors

from fastsched import ops
from fastsched.ops import reference

ROUNDING = 16 * EPS[torch.float32]  # six roundings make a term, two terms an increment, on either side
# A tensor core truncates where it adds: at most once a step of 8 columns, 16 times in two dots over 64 columns.
TRUNCATION = 32 * EPS[torch.float32] if DEVICE == "cuda" else 0.0

CASES = [
    GramCase(N=2, B=1, d=1),
    GramCase(N=13, B=3, d=257),
    GramCase(N=13, B=3, d=257, per_sample=True),
    GramCase(N=16, B=2, d=333, states="shared"),
    GramCase(N=16, B=2, d=320, states="shared", per_sample=True),
    GramCase(N=24, B=2, d=1000, states="none", apart=1e-4),
    GramCase(N=33, B=2, d=129, states="shared"),
    GramCase(N=33, B=2, d=129, precision="tf32x3", apart=1e-4),
    GramCase(N=64, B=2, d=500, states="none", per_sample=True),
    GramCase(N=64, B=2, d=500, dtype=torch.bfloat16),
    GramCase(N=64, B=2, d=500, dtype=torch.float16, states="shared"),
    GramCase(N=64, B=1, d=512, precision="tf32x3"),
    GramCase(N=64, B=1, d=192, precision="ieee"),
    GramCase(N=64, B=1, d=512, apart=1e-4),
    GramCase(N=100, B=1, d=131),
    GramCase(N=100, B=2, d=40, per_sample=True),
    GramCase(N=128, B=1, d=128, states="none", precision="tf32x3"),
    GramCase(N=128, B=1, d=128, states="shared", dtype=torch.bfloat16),
    GramCase(N=256, B=1, d=65, states="none"),
    GramCase(N=256, B=2, d=33, per_sample=True, apart=1e-4),
    GramCase(N=256, B=1, d=64, states="shared"),
    GramCase(N=256, B=1, d=64, states="none", precision="tf32x3"),
    GramCase(N=200, B=1, d=48, states="none"),
]


# Every number of levels with every kind of state, averaged and per sample; in turn far apart and close; odd d.
GRID = [
    GramCase(N=N, B=2, d=35, states=states, per_sample=per_sample, apart=(1e-1, 1e-4)[(n + k + per_sample) % 2])
    for (n, N), (k, states), per_sample in itertools.product(
        enumerate((13, 16, 24, 33, 64, 100, 128, 256)), enumerate(("none", "shared", "levels")), (False, True)
    )
]
if DEVICE == "cpu":  # the interpreter takes seconds for many levels: two cases in five
    GRID = GRID[::5] + GRID[1::5]


def run(case: GramCase, change=None) -> np.ndarray:
    R, X, a, c, options = case.inputs(DEVICE)
    if change is not None:
        R = change(R)
    return ops.level_increment_gram(R, X, a, c, backend="triton", **options).cpu().numpy()


def on_device(case: GramCase, change=None) -> torch.Tensor:
    return torch.from_numpy(launch(run, case, change))


def expected(case: GramCase):
    """Reference values and what they may be missed by: Gram matrix, diagonal."""
    R, X, a, c, _ = case.inputs()
    relative = ROUNDING + summation_error(case.d)
    scale = gram_scale(terms(R, X, a, c))
    gram = reference.increment_gram(R, X, a, c, per_sample=True)
    values = [gram, gram.diagonal(dim1=-2, dim2=-1)]
    product = PRODUCT_ERROR[case.precision] + TRUNCATION
    bounds = [(relative + product) * scale, relative * scale.diagonal(dim1=-2, dim2=-1)]
    if not case.per_sample:
        values, bounds = [v.mean(0) for v in values], [b.mean(0) for b in bounds]
    return values, bounds


@pytest.mark.parametrize("case", [*CASES, *GRID], ids=str)
def test_against_reference(case):
    found = on_device(case)
    parts = [found, found.diagonal(dim1=-2, dim2=-1)]
    for got, want, bound in zip(parts, *expected(case), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert ((got - want).abs() <= bound).all()
    assert torch.equal(found, found.mT)


def relative_error(case: GramCase, found: torch.Tensor) -> torch.Tensor:
    R, X, a, c, _ = case.inputs()
    want = reference.increment_gram(R, X, a, c)
    return (found - want).abs() / gram_scale(reference.increments(R, X, a, c)).mean(0)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3", "ieee"])
def test_typical_error_of_a_precision(precision):
    N = 16 if precision == "ieee" else 64  # the interpreter takes its time for float32
    case = GramCase(N=N, B=1, d=1024, states="none", precision=precision)
    error = relative_error(case, on_device(case))
    off_diagonal = error[~torch.eye(N, dtype=torch.bool)]
    rounding = EPS[torch.float32] * (4 + math.sqrt(1024)) + TRUNCATION
    assert off_diagonal.square().mean().sqrt() <= PRODUCT_RMS[precision] / math.sqrt(1024) + rounding


def equal_increments(R: torch.Tensor) -> torch.Tensor:
    """Levels on a straight line: the low parts of all increments agree, and their products add up."""
    steps = torch.arange(1, 1 + len(R), device=R.device, dtype=R.dtype).view(-1, 1, 1)
    return (steps * (R[1] * 1024).round() / 1024).to(R.dtype)  # 1024ths: every multiple is exact


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3"])
def test_worst_case_of_a_precision(precision):
    case = GramCase(N=16, B=1, d=2048, states="none", precision=precision, apart=0.0)
    R = equal_increments(case.inputs()[0])
    a, c = torch.zeros(16), torch.ones(16)
    found = torch.from_numpy(launch(run_equal, case))
    want = reference.increment_gram(R, None, a, c)
    error = ((found - want) / want)[~torch.eye(16, dtype=torch.bool)]
    bound = PRODUCT_RMS[precision] + summation_error(2048) + TRUNCATION
    assert error.abs().max() <= bound
    assert torch.equal(error, error[:1].expand_as(error)) or error.std() <= bound


def run_equal(case: GramCase) -> np.ndarray:
    R = equal_increments(case.inputs(DEVICE)[0])
    zeros, ones = [0.0] * case.N, [1.0] * case.N
    return ops.level_increment_gram(R, None, zeros, ones, precision=case.precision, backend="triton").cpu().numpy()


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3", "ieee"])
def test_close_levels_keep_their_distance(precision):
    case = GramCase(N=16, B=1, d=4096, states="none", precision=precision, apart=1e-4)
    found = ops.pairwise_squared_distances(on_device(case))
    R, _, a, c, _ = case.inputs()
    want = reference.squared_distances(reference.levels(R, None, a, c))
    adjacent = range(15), range(1, 16)
    assert ((found[adjacent] - want[adjacent]).abs() <= 1e-5 * want[adjacent]).all()


def transposed(R: torch.Tensor) -> torch.Tensor:
    return torch.empty(R.shape[::-1], dtype=R.dtype, device=R.device).permute(2, 1, 0).copy_(R)


def every_other_sample(R: torch.Tensor) -> torch.Tensor:
    return torch.empty((R.shape[0], 2 * R.shape[1], R.shape[2]), dtype=R.dtype, device=R.device)[:, ::2].copy_(R)


@pytest.mark.parametrize("change", [transposed, every_other_sample])
def test_strides(change):
    case = GramCase(N=9, B=3, d=144)
    found = on_device(case, change)
    want, bound = (parts[0] for parts in expected(case))
    assert ((found - want).abs() <= bound).all()


def two_billion_apart(R: torch.Tensor) -> torch.Tensor:
    """Levels so far apart that offsets exceed 32 bits, though their stride does not.

    On the CPU only the pages that are written to take memory.
    """
    N, B, d = R.shape
    stride = 2**31 // (N - 1) + 16
    far = torch.empty((N - 1) * stride + B * d, dtype=R.dtype, device=R.device).as_strided(R.shape, (stride, d, 1))
    return far.copy_(R)


@pytest.mark.parametrize("N", [3, 4, 9])  # twice, three times, eight times the stride
def test_far_offsets(N):
    case = GramCase(N=N, B=2, d=48, dtype=torch.bfloat16, states="shared", per_sample=True)
    found = on_device(case, two_billion_apart)
    want, bound = (parts[0] for parts in expected(case))
    assert ((found - want).abs() <= bound).all()


def with_nan(R: torch.Tensor) -> torch.Tensor:
    R[3, 0, 5] = math.nan
    return R


def with_gpu_nan(R: torch.Tensor) -> torch.Tensor:
    R[3, 0, 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what arithmetic on a GPU gives
    return R


def with_inf(R: torch.Tensor) -> torch.Tensor:
    R[3, 0, 5] = math.inf
    return R


@pytest.mark.parametrize("change", [with_nan, with_gpu_nan, with_inf])
@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3", "ieee"])
def test_bad_numbers_come_through(change, precision):
    gram = on_device(GramCase(N=16, B=1, d=64, states="none", precision=precision), change)
    bad = ~gram.isfinite()
    touched = torch.zeros(16, 16, dtype=torch.bool)
    touched[3:5] = touched[:, 3:5] = True
    assert torch.equal(bad, touched)


def run_parts(case: GramCase, parts: list[int]) -> list[list[np.ndarray]]:
    """Partial sums for several numbers of programs, from outputs that held NaN."""
    from fastsched.kernels import config, level_gram

    R, X, a, c, _ = case.inputs(DEVICE)
    R, X = (None if t is None else level_gram.columns_view(t, True) for t in (R, X))
    steps = level_gram.coefficient_steps(torch.stack([a, c])).to(DEVICE)
    chosen = config.gram_launch(case.N, 4, "sm_90", precision=case.precision, aligned=False)
    with nan_in_new_tensors():
        runs = [level_gram.launch(R, X, steps, case.precision, chosen, n) for n in parts]
    return [[t.cpu().numpy() for t in outputs] for outputs in runs]


@pytest.mark.parametrize("case", [GramCase(N=24, B=2, d=777), GramCase(N=100, B=1, d=100)], ids=str)
def test_outputs_are_written_whole(case):
    (outputs,) = launch(run_parts, case, [3])
    for output in outputs:
        assert np.isfinite(output).all()


def test_repeats_bitwise():
    once, again = launch(run_parts, GramCase(N=33, B=1, d=300), [4, 4])
    for one, other in zip(once, again, strict=True):
        assert np.array_equal(one, other)


def test_number_of_programs_does_not_matter():
    case = GramCase(N=33, B=1, d=500, states="none")
    runs = launch(run_parts, case, [1, 2, 7, 20])
    R, X, a, c, _ = case.inputs()
    scale = gram_scale(reference.increments(R, X, a, c))[0]
    grams = [torch.from_numpy(run[0]).double().sum(0)[0, 0, :33, :33] for run in runs]
    for gram in grams[1:]:
        assert ((gram - grams[0]).abs() <= 2 * (summation_error(case.d) + TRUNCATION) * scale).all()


def run_opcheck(case: GramCase) -> dict:
    R, X, a, c, _ = case.inputs(DEVICE)
    arguments = (R, X, torch.stack([a, c]), case.per_sample, case.precision, True)
    return torch.library.opcheck(torch.ops.fastsched.level_gram, arguments)


@pytest.mark.parametrize("per_sample", [False, True], ids=["mean", "per_sample"])
def test_opcheck(per_sample):
    results = launch(run_opcheck, GramCase(N=5, B=2, d=32, per_sample=per_sample))
    assert set(results.values()) == {"SUCCESS"}


def run_too_many_samples() -> str:
    R = torch.zeros(1, device=DEVICE).expand(2, 65536, 1)
    try:
        ops.level_increment_gram(R, None, [0.0] * 2, [1.0] * 2, per_sample=True, backend="triton")
    except ValueError as error:
        return str(error)
    return "no error"


def test_too_many_samples():
    assert launch(run_too_many_samples).startswith("R must have at most 65535 samples where they are kept apart")


def run_coefficients_on_the_device(case: GramCase) -> list[np.ndarray]:
    R, X, a, c, options = case.inputs(DEVICE)
    found = [
        ops.level_increment_gram(R, X, a.to(device), c.to(device), backend="triton", **options).cpu().numpy()
        for device in ("cpu", DEVICE)
    ]
    return found


def test_coefficients_may_be_on_the_device():
    on_host, on_device = launch(run_coefficients_on_the_device, GramCase(N=9, d=48))
    assert np.array_equal(on_host, on_device)


def vectors_of(B, V, d, dtype="float32"):
    """Rows of larger memory, as a measurement keeps them: neither first nor adjacent."""
    generator = torch.Generator().manual_seed(V * 1000 + d)
    rows = torch.randn(B, V + 3, d, generator=generator).cumsum(1)
    return rows.to(getattr(torch, dtype)).to(DEVICE)[:, 1 : V + 1]


def vector_gram(shape, dtype, precision):
    return ops.vector_gram(vectors_of(*shape, dtype), precision=precision, backend="triton").cpu().numpy()


@pytest.mark.parametrize("precision", ["bf16x3", "tf32x3", "ieee"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 257), (2, 16, 512), (2, 31, 96), (1, 64, 192), (2, 93, 131), (1, 200, 64)], ids=str
)
def test_gram_of_vectors(shape, precision):
    vectors = vectors_of(*shape).double().cpu()
    found = torch.from_numpy(launch(vector_gram, shape, "float32", precision))
    expected, norms = vectors @ vectors.mT, vectors.norm(dim=2)
    scale = norms[:, :, None] * norms[:, None, :]
    relative = summation_error(shape[2]) + EPS[torch.float32]
    assert found.dtype == torch.float64
    assert ((found - expected).abs() <= (relative + PRODUCT_ERROR[precision] + TRUNCATION) * scale).all()
    diagonal = (found - expected).diagonal(dim1=1, dim2=2).abs()
    assert (diagonal <= relative * scale.diagonal(dim1=1, dim2=2)).all()
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gram_of_vectors_in_16_bits(dtype):
    shape = (2, 40, 320)
    vectors = vectors_of(*shape, dtype).double().cpu()
    found, norms = torch.from_numpy(launch(vector_gram, shape, dtype, "bf16x3")), vectors.norm(dim=2)
    bound = (summation_error(320) + PRODUCT_ERROR["bf16x3"] + TRUNCATION) * norms[:, :, None] * norms[:, None, :]
    assert ((found - vectors @ vectors.mT).abs() <= bound).all()
