import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_cases import EPS, GramCase, gram_scale, summation_error, terms
from torch.utils._python_dispatch import TorchDispatchMode

from fastsched.ops import eager, hutchinson_reduce, level_increment_gram, pairwise_squared_distances, reference

GRAM_CASES = [
    GramCase(N=13, d=1000),
    GramCase(N=13, d=1000, per_sample=True),
    GramCase(N=64, B=1, d=63, states="shared"),
    GramCase(N=33, states="none", per_sample=True),
    GramCase(N=2, B=3, d=1),
    GramCase(N=1, states="shared"),
    GramCase(N=128, B=1, d=20001, states="none"),
    GramCase(N=16, dtype=torch.bfloat16),
    GramCase(N=16, dtype=torch.float16, states="shared"),
    GramCase(N=16, dtype=torch.float64, per_sample=True),
    GramCase(N=24, d=4096, apart=1e-4),
]


def assert_gram(case, found, R, X, a, c, options):
    dtype = case.dtype if case.dtype == torch.float64 else torch.float32
    # Six roundings at most make a term and two terms an increment, on either side; then the sum.
    relative = 16 * EPS[dtype] + summation_error(case.d, dtype)
    expected = reference.increment_gram(R, X, a, c, per_sample=True)
    scale = gram_scale(terms(R, X, a, c))
    if not case.per_sample:
        expected, scale = expected.mean(0), scale.mean(0)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= relative * scale).all()


@pytest.mark.parametrize("case", GRAM_CASES, ids=str)
def test_gram_against_reference(case):
    R, X, a, c, options = case.inputs()
    assert_gram(case, level_increment_gram(R, X, a, c, **options), R, X, a, c, options)


def coefficients(kind: str, N: int) -> torch.Tensor:
    """Coefficients that move a lot, a little, not at all, or through zero."""
    k = torch.arange(N, dtype=torch.float64)
    return {
        "constant": torch.full((N,), 0.7, dtype=torch.float64),
        "zero": torch.zeros(N, dtype=torch.float64),
        "rounded": 0.7 * (1 + 2.0**-52 * (k % 3)),
        "through-zero": 1 - k / 8,
        "two-alike": torch.where(k == 5, 4.0, k),
        "wild": 10 ** (3 * torch.sin(7 * k)),
        "close": 1 + 1e-6 * k,
    }[kind]


@pytest.mark.parametrize("of_X", ["constant", "zero", "through-zero", "wild", None])
@pytest.mark.parametrize("of_R", ["constant", "zero", "rounded", "through-zero", "two-alike", "wild", "close"])
def test_gram_with_any_coefficients(of_R, of_X):
    case = GramCase(N=16, states="levels" if of_X else "none")
    R, X, a, _, options = case.inputs()
    a, c = a if of_X is None else coefficients(of_X, 16), coefficients(of_R, 16)
    assert_gram(case, level_increment_gram(R, X, a, c, **options), R, X, a, c, options)


def test_gram_of_levels_that_are_the_same():
    R = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(0)).expand(6, 2, 50)
    gram = level_increment_gram(R, None, [0.0] * 6, [0.3] * 6)
    assert (gram[0, 0] > 0).all()
    assert (gram[1:] == 0).all()


@pytest.mark.parametrize("states", ["none", "shared", "levels"])
def test_gram_of_wide_blocks(states):
    case = GramCase(N=33, B=1, d=9001, states=states)
    R, X, a, c, options = case.inputs()
    assert_gram(case, level_increment_gram(R, X, a, c, **options), R, X, a, c, options)


def test_gram_keeps_its_precision_when_a_program_lowers_that_of_matmul():
    R, X, a, c, options = GramCase(N=16, B=1, d=9000).inputs()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products where the processor has them
    try:
        found = level_increment_gram(R, X, a, c, **options)
    finally:
        torch.set_float32_matmul_precision(before)
    # So the products are taken in float64, wherever this runs.
    bound = summation_error(9000, torch.float64) * gram_scale(terms(R, X, a, c)).mean(0)
    assert ((found - reference.increment_gram(R, X, a, c)).abs() <= 16 * bound).all()


def test_gram_of_strided_tensors():
    case = GramCase(N=9, B=3, d=300)
    R, X, a, c, options = case.inputs()
    strided = torch.empty(3, 300, 9).permute(2, 0, 1).copy_(R)
    assert not strided.is_contiguous()
    assert_gram(case, level_increment_gram(strided, X, a, c, **options), R, X, a, c, options)


@pytest.mark.parametrize("kind", [list, np.asarray], ids=["list", "numpy"])
def test_gram_takes_coefficients_of_any_kind(kind):
    R, X, a, c, options = GramCase().inputs()
    plain = level_increment_gram(R, X, kind(a.tolist()), kind(c.tolist()), **options)
    assert torch.equal(plain, level_increment_gram(R, X, a, c, **options))


def test_inputs_that_require_gradients():
    R, X, a, c, options = GramCase().inputs()
    results = lambda: (level_increment_gram(R, X, a, c, **options), *hutchinson_reduce(X, R))
    plain = results()
    R.requires_grad_(), X.requires_grad_()
    for found, expected in zip(results(), plain, strict=True):
        assert torch.equal(found, expected)
        assert not found.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["R", "X"])
def test_nan_and_inf_reach_the_gram_matrix(bad, where):
    R, X, a, c, options = GramCase().inputs()
    {"R": R, "X": X}[where][3, 1, 40] = bad
    gram = level_increment_gram(R, X, a, c, **options)
    assert not gram[3].isfinite().any()
    assert not gram[:, 4].isfinite().any()
    assert gram[:3, :3].isfinite().all()


def test_close_levels_keep_their_distance():
    R, _, a, c, options = GramCase(N=32, B=1, d=5000, states="none", apart=1e-4).inputs()
    found = pairwise_squared_distances(level_increment_gram(R, None, a, c, **options))
    expected = reference.squared_distances(reference.levels(R, None, a, c))
    adjacent = range(31), range(1, 32)
    assert ((found[adjacent] - expected[adjacent]).abs() <= 1e-5 * expected[adjacent]).all()
    # The textbook form in float32 loses them: the bound above can fail.
    u = reference.levels(R, None, a, c).float().flatten(1)
    textbook = (u * u).sum(1)[:, None] + (u * u).sum(1)[None] - 2 * u @ u.T
    assert ((textbook[adjacent] - expected[adjacent]).abs() > 0.1 * expected[adjacent]).any()


def test_distances_of_exact_gram():
    R, X, a, c, _ = GramCase(N=20, B=3, dtype=torch.float64).inputs()
    found = pairwise_squared_distances(reference.increment_gram(R, X, a, c))
    expected = reference.squared_distances(reference.levels(R, X, a, c))
    # Additions per entry: at most N^2 / 2, each relative to the path's length squared.
    length = reference.increments(R, X, a, c)[1:].square().sum(-1).sqrt().sum(0).square().mean()
    assert ((found - expected).abs() <= 200 * EPS[torch.float64] * length).all()
    assert torch.equal(found, found.T)


def test_distances_are_batched_and_never_negative():
    gram = reference.increment_gram(*GramCase(N=6, B=4).inputs()[:4], per_sample=True)
    batched = pairwise_squared_distances(gram)
    for sample in range(4):
        assert torch.equal(batched[sample], pairwise_squared_distances(gram[sample]))
    back_and_forth = torch.tensor([[0.0, 0, 0], [0, 1.0, -1.0 - 1e-15], [0, -1.0 - 1e-15, 1.0]])
    assert (pairwise_squared_distances(back_and_forth.double()) >= 0).all()


class LargestStorage(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("states", ["none", "shared", "levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gram_needs_little_memory(states, dtype):
    R, X, a, c, _options = GramCase(N=64, B=4, d=16384, states=states, dtype=dtype, apart=0.1).inputs()
    with LargestStorage() as storage:
        eager.level_gram(R, X, torch.stack([a, c]), False)
    assert 0 < storage.largest <= R.nbytes / 4


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(11)).double() * 2 - 1


@pytest.mark.parametrize("shape", [(5, 3, 1001), (3, 1001)], ids=["levels", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hutchinson_against_reference(shape, dtype):
    JV = torch.randn(5, 3, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    V = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = hutchinson_reduce(V, JV)
    expected = reference.hutchinson(V, JV)
    for got, want, size in zip(found, expected, ((V * JV).double().abs(), JV.double().square()), strict=True):
        assert got.dtype == torch.float64
        assert ((got - want).abs() <= 1001 * EPS[torch.float64] * size.sum(-1)).all()


def test_hutchinson_finds_a_trace():
    d, probes = 40, 4000
    J = torch.randn(d, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    V = signs(probes, d)
    v_jv, jv_jv = hutchinson_reduce(V, (V @ J.T).unsqueeze(0))
    for estimates, exact in ((v_jv, J.trace()), (jv_jv, J.square().sum())):
        assert abs(estimates.mean() - exact) <= 4 * estimates.std() / math.sqrt(probes)


@pytest.mark.parametrize("states", ["none", "shared", "levels"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["mean", "per_sample"])
def test_opcheck_level_gram(states, per_sample):
    R, X, a, c, _ = GramCase(N=5, d=33, states=states).inputs()
    arguments = (R, X, torch.stack([a, c]), per_sample, "bf16x3", False)
    torch.library.opcheck(torch.ops.fastsched.level_gram, arguments)


def test_opcheck_vector_gram():
    torch.library.opcheck(torch.ops.fastsched.vector_gram, (torch.randn(2, 3, 40), "bf16x3", False))


@pytest.mark.parametrize("probe", ["levels", "shared"])
def test_opcheck_hutchinson(probe):
    JV = torch.randn(2, 3, 40)
    V = {"levels": JV.clone(), "shared": JV[0].clone()}[probe]
    torch.library.opcheck(torch.ops.fastsched.hutchinson, (V, JV, False))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    *inputs, _ = GramCase(N=6, d=50).inputs()

    def everything(R, X, a, c):
        return pairwise_squared_distances(level_increment_gram(R, X, a, c)), *hutchinson_reduce(X, R)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*inputs)
    for got, want in zip(compiled, everything(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64


R3 = torch.zeros(4, 2, 8)
ERRORS = {
    "precision": (lambda: level_increment_gram(R3, None, [1] * 4, [1] * 4, precision="fp8"), "precision.*'fp8'"),
    "backend": (lambda: level_increment_gram(R3, None, [1] * 4, [1] * 4, backend="cuda"), "backend.*'cuda'"),
    "triton-gram": (
        lambda: level_increment_gram(R3, None, [1] * 4, [1] * 4, backend="triton"),
        'backend="triton".*cpu',
    ),
    "triton-hutchinson": (lambda: hutchinson_reduce(R3, R3, backend="triton"), 'backend="triton".*cpu'),
    "triton-float64": (
        lambda: hutchinson_reduce(R3.double(), R3, backend="triton"),
        'backend="triton" reads float32, bfloat16 and float16; got float64',
    ),
    "triton-float64-states": (
        lambda: level_increment_gram(R3, R3.double(), [1] * 4, [1] * 4, backend="triton"),
        'backend="triton" reads float32, bfloat16 and float16; got float64',
    ),
    "R-shape": (lambda: level_increment_gram(R3[0], None, [1] * 4, [1] * 4), r"R must be \[N, B, d\]"),
    "R-empty": (lambda: level_increment_gram(R3[:, :0], None, [1] * 4, [1] * 4), "R must be .* not empty"),
    "R-dtype": (lambda: level_increment_gram(R3.int(), None, [1] * 4, [1] * 4), "R must be one of .*int32"),
    "X-shape": (lambda: level_increment_gram(R3, R3[:3], [1] * 4, [1] * 4), r"X must be \[4, 2, 8\] or \[2, 8\]"),
    "a-shape": (lambda: level_increment_gram(R3, R3, [1] * 3, [1] * 4), r"a must be \[4\].*\(3,\)"),
    "c-shape": (lambda: level_increment_gram(R3, R3, [1] * 4, [[1] * 4]), r"c must be \[4\].*\(1, 4\)"),
    "device": (lambda: level_increment_gram(R3, R3.to("meta"), [1] * 4, [1] * 4), "X must be on R's device.*meta"),
    "gram-shape": (lambda: pairwise_squared_distances(torch.zeros(3, 4)), r"gram must be .*\(3, 4\)"),
    "V-shape": (lambda: hutchinson_reduce(R3[:2], R3), r"V must be \[4, 2, 8\] or \[2, 8\]"),
    "V-dtype": (lambda: hutchinson_reduce(R3.int(), R3), "V must be one of .*int32"),
    "JV-shape": (lambda: hutchinson_reduce(R3[0], R3[0]), r"JV must be \[N, B, d\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_needs_neither_triton_nor_scipy():
    script = """
import sys
for name in ("triton", "scipy"):
    sys.modules[name] = None  # any import of it fails
import torch
from fastsched import ops
from fastsched.ops import reference
R = torch.randn(4, 2, 30)
found = ops.level_increment_gram(R, None, [0.0] * 4, [1.0] * 4)
expected = reference.increment_gram(R, None, torch.zeros(4), torch.ones(4))
assert (found - expected).abs().max() <= 1e-5 * expected.max()
assert not [name for name in sys.modules if name.startswith("fastsched.kernels")]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


DATA = torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: level_increment_gram(DATA.numpy(), None, [1] * 3, [1] * 3), "R"),
        (lambda: level_increment_gram(DATA.tolist(), None, [1] * 3, [1] * 3), "R"),
        (lambda: level_increment_gram(DATA.to_sparse(), None, [1] * 3, [1] * 3), "R"),
        (lambda: level_increment_gram(DATA, DATA.numpy(), [1] * 3, [1] * 3), "X"),
        (lambda: level_increment_gram(DATA, None, None, [1] * 3), "a"),
        (lambda: level_increment_gram(DATA, None, [1] * 3, "ccc"), "c"),
        (lambda: level_increment_gram(DATA, None, [1] * 3, torch.ones(3, dtype=torch.complex64)), "c"),
        (lambda: pairwise_squared_distances(np.ones((3, 3))), "gram"),
        (lambda: hutchinson_reduce(None, DATA), "V"),
    ],
)
def test_arguments_that_are_no_tensors_are_named(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be a"):
        call()
