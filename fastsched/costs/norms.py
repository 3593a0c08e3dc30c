"""Squared norms of vectors that are given as coefficients over known vectors, from the Gram matrices of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, eq=False)
class Norms:
    """Norms of combinations of V known vectors. Each of B samples has its own V vectors."""

    gram: Array  #: Gram matrix of each sample's vectors, [B, V, V]
    size: Array  #: the squared norm that each sample's squared norms are relative to, [B]

    @classmethod
    def of_increments(cls, gram: Array, increments: int) -> Norms:
        """Norms relative to the sum of the squared norms of the increments, which are the first vectors."""
        size = np.einsum("bqq->b", gram[:, :increments, :increments])
        return cls(gram, np.maximum(size, np.finfo(np.float64).tiny))

    @property
    def vectors(self) -> int:
        """V, the number of vectors."""
        return self.gram.shape[1]

    @cached_property
    def relative_gram(self) -> Array:
        """``gram_b / size_b``, [B, V, V]."""
        return self.gram / self.size[:, None, None]

    @cached_property
    def metric(self) -> Array:
        """The mean of `relative_gram` over samples, [V, V]."""
        return self.relative_gram.mean(0)

    @cached_property
    def _side_by_side(self) -> Array:
        return np.ascontiguousarray(self.gram.transpose(1, 0, 2)).reshape(self.vectors, -1)

    def squared(self, vectors: Array) -> Array:
        """``v' G_b v`` of vectors [C, V] for each sample, [C, B]."""
        products = (vectors @ self._side_by_side).reshape(len(vectors), *self.gram.shape[:2])
        return np.maximum((products @ vectors[:, :, None])[:, :, 0], 0.0)

    def mean_squared(self, vectors: Array) -> Array:
        """The sum over K vectors of the mean over samples of ``v' G_b v / size_b``, [C], from [C, K, V].

        It needs only the mean matrix `metric`, so it is B times cheaper than `squared`.
        """
        return ((vectors @ self.metric) * vectors).sum((1, 2))
