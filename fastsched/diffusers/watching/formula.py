"""How a pipeline's output depends on its networks' outputs: which linear combination it is, if it is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastsched.ops.backends import widest_dtype

#: A tensor that a network was given or returned, or a list of them, one for each sample (Z-Image).
Given = Tensor | Sequence[Tensor]

#: Formulas are the same if their coefficients differ by at most this fraction of the larger norm.
SAME_FORMULA = 0.1

#: Relative residuals: below the first, an output is a linear combination of the networks' outputs; above the second, it
#: is not (a rescaled or clipped guidance).
LINEAR, NOT_LINEAR = 1e-3, 0.02

#: Two visits of a level have nearly the same latents if their distances between outputs agree within this fraction.
ALIKE = 0.02


@dataclass(frozen=True)
class Formula:
    """How the pipeline's output depends linearly on the networks' outputs, by least squares for each sample."""

    coefficients: Tensor  #: one for each network output, float64 [B, m]
    gram: Tensor  #: inner products of the networks' outputs, float64 [B, m, m]
    products: Tensor  #: inner products of the networks' outputs with the pipeline's output, float64 [B, m]
    square: Tensor  #: the squared norm of the pipeline's output, float64 [B]

    @classmethod
    def of_products(cls, products: Tensor) -> Formula:
        """The least-squares formula from outputs' inner products [B, m + 1, m + 1] on the CPU, the pipeline's last."""
        whole = products.double()
        gram, given = whole[:, :-1, :-1], whole[:, :-1, -1]
        coefficients = (torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ given[..., None])[..., 0]
        return cls(coefficients, gram, given, whole[:, -1, -1])

    @cached_property
    def error(self) -> float:
        """The relative residual of the formula itself."""
        return self.residual(self.coefficients)

    @cached_property
    def size(self) -> float:
        """The squared norm of the pipeline's output over all samples."""
        return float(self.square.sum())

    def residual(self, coefficients: Tensor) -> float:
        """The relative distance of the output from the combination with ``coefficients``."""
        made = torch.einsum("bi,bij,bj->", coefficients, self.gram, coefficients)
        square = self.size - 2 * float((coefficients * self.products).sum()) + float(made)
        return math.sqrt(max(square, 0.0) / max(self.size, 1e-30))

    def explains(self, other: Formula, factor: float = 10.0) -> bool:
        """Whether these coefficients fit the other's outputs about as well as the other's own coefficients.

        The residual may be ``factor`` times the other's own error. One that is NaN counts as a fit.
        """
        same = self.coefficients.shape == other.coefficients.shape
        return same and not other.residual(self.coefficients) > max(LINEAR, factor * other.error)

    def contradicts(self, other: Formula) -> bool:
        """Whether one output is linear and the other not, or neither formula explains the other's output.

        If two network outputs are nearly equal, as with and without a prompt, many coefficients fit equally well.
        """
        low, high = sorted((self.error, other.error))
        if self.coefficients.shape != other.coefficients.shape or low > NOT_LINEAR:
            return False
        if high > NOT_LINEAR:
            return low < LINEAR
        largest = torch.maximum(self.coefficients.norm(), other.coefficients.norm())
        if float((self.coefficients - other.coefficients).norm()) <= SAME_FORMULA * float(largest):
            return False
        return not self.explains(other) and not other.explains(self)

    def may_follow(self, other: Formula) -> bool:
        """Whether one rule whose coefficients depend on the latents may give both formulas: the network outputs differ.

        Such rules are guidance of bounded size (APG), or guidance scaled by a network output's size
        (``guidance_rescale``) or projection (CFG-Zero*). They need the inner products of two or more outputs.
        """
        if self.gram.shape[-1] == 1 or (self.size == 0) != (other.size == 0):
            return False
        one, two = (_distances(formula.gram) for formula in (self, other))
        return not bool(((one - two).abs() <= ALIKE * torch.maximum(one, two)).all())


def _distances(gram: Tensor) -> Tensor:
    """Squared norms of outputs on the diagonal, and of their differences elsewhere, [B, m, m]."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    apart = squares[..., :, None] + squares[..., None, :] - 2 * gram
    return apart + torch.diag_embed(squares)


def products_of(outputs: list[Given], output: Tensor) -> Tensor | None:
    """Inner products of the networks' outputs and the pipeline's ``output`` [B, *shape], per sample, on its device.

    None unless the networks' outputs are 1 to 4 tensors of its shape.
    """
    pieces = [piece for given in outputs for piece in _pieces(given, output)]
    if not 0 < len(pieces) <= 4:
        return None
    exact = widest_dtype(output.device)
    columns = torch.stack([piece.to(output.device) for piece in (*pieces, output)], dim=1).flatten(2).to(exact)
    return columns @ columns.mT


def _pieces(given: Given, output: Tensor) -> list[Tensor]:
    """A network's output in parts of the shape of ``output``, without extra channels; [] if the shapes do not fit."""
    given = _as_batch(given, output)
    if part_like(given, output) is None:
        return []
    channels = given.narrow(1, 0, output.shape[1]) if given.shape[1] != output.shape[1] else given
    pieces = list(channels.split(len(output)))
    return pieces if all(piece.shape == output.shape for piece in pieces) else []


def part_like(given: Given, latents: Tensor, *, last: bool = False) -> Tensor | None:
    """The part of a network's input that has the place and shape of the latents; None if the shapes do not fit.

    If the input is longer along a dimension, this is its beginning, or its end with ``last``.
    """
    given = _as_batch(given, latents)
    if not given.is_floating_point() or given.ndim != latents.ndim or len(given) % len(latents):
        return None
    larger = [d for d in range(1, latents.ndim) if given.shape[d] != latents.shape[d]]
    if len(larger) > 1 or any(given.shape[d] < latents.shape[d] for d in larger):
        return None
    part = given[: len(latents)]
    if not larger:
        return part
    length = latents.shape[larger[0]]
    return part.narrow(larger[0], part.shape[larger[0]] - length if last else 0, length)


def _as_batch(given: Given, latents: Tensor) -> Tensor:
    """``given`` as one batch: a list is stacked if its size fits, and axes of length 1 are as in ``latents``."""
    if not isinstance(given, Tensor):
        alike = all(each.shape == given[0].shape for each in given) and given[0].numel() == latents[0].numel()
        given = torch.stack([*given]) if alike else latents.new_empty(0)
    shapes = [[n for n in each.shape[1:] if n != 1] for each in (given, latents)]
    return given.reshape(len(given), *latents.shape[1:]) if shapes[0] == shapes[1] else given
