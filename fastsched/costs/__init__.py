"""Cost matrices over pairs or triples of noise levels, one family a file."""

from fastsched.costs.fisher_rao import fisher_rao
from fastsched.costs.klub import klub
from fastsched.costs.matrix import CostMatrix, ModelCalls
from fastsched.costs.path import PathCost, path_cost
from fastsched.costs.stein import stein_corrector
from fastsched.costs.stein_predictor import stein_predictor

__all__ = [
    "CostMatrix",
    "ModelCalls",
    "PathCost",
    "fisher_rao",
    "klub",
    "path_cost",
    "stein_corrector",
    "stein_predictor",
]
