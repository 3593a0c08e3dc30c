"""The verdicts of the acceptance on a GPU, from rows as the benchmarks make them."""

from benchmarks.accept_gpu import faster
from benchmarks.profiles import row
from fastsched import Denoiser, profile


def rows(ours, compiled, eager):
    times = {"vector_gram": ours, "torch.compile of matmul": compiled, "eager matmul": eager}
    return [{"variant": name, "p50_ms": value} for name, value in times.items()]


def test_ours_is_held_against_the_fastest_other():
    (verdict,) = faster("gram", rows(2.0, 6.0, 4.0), "cuda")
    assert verdict.passed
    assert verdict.found.startswith("2.00 times eager matmul")
    (verdict,) = faster("gram", rows(2.0, 1.0, 4.0), "cuda")
    assert not verdict.passed
    assert verdict.row()["verdict"] == "FAILED"
    (verdict,) = faster("gram", rows(2.0, 1.0, 4.0), "cpu")
    assert verdict.wanted == "not judged on a CPU"


def test_a_row_holds_the_profile():
    found = profile(Denoiser.from_denoiser(lambda z, s: 0.1 * z, 0.1, 10.0), (4,), steps=3)
    made = row("small", found)
    assert made["case"] == "small"
    assert made["own_share"] == round(found.own_share, 5)
    assert made["measuring_p50_ms"] == round(found.steps[2].p50_ms, 5)
