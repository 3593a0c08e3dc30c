"""Cost matrices over pairs or triples of noise levels, one family a file."""

from fastsched.costs.corrector_cost import stein_corrector
from fastsched.costs.cost_matrix import CostMatrix, ModelCalls
from fastsched.costs.fisher_rao_cost import fisher_rao
from fastsched.costs.klub_cost import klub
from fastsched.costs.predictor_cost import stein_predictor
from fastsched.costs.step_cost import PathCost, path_cost

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
