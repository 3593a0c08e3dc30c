"""Cost matrices over pairs or triples of noise levels, one family a file."""

from fastsched.costs.path import PathCost, path_cost

__all__ = ["PathCost", "path_cost"]
