"""How a pipeline's output depends on its networks' outputs: which linear combination it is, if it is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: A tensor that a network was given or returned, or a list of them, one for each sample (Z-Image).
Given = Tensor | Sequence[Tensor]

#: Relative change of guidance coefficients that counts as another formula.
SAME_FORMULA = 0.1

#: Relative residuals of an output that is a linear combination of the networks' outputs, and of one that is not: a
#: rescaled or clipped guidance.
LINEAR, NOT_LINEAR = 1e-3, 0.02

#: Relative difference of the products of outputs below which two visits of a level are of nearly the same latents.
ALIKE = 0.02


@dataclass(frozen=True)
class Formula:
    """How the pipeline's output depends linearly on the networks' outputs, by least squares for each sample.

    Attributes:
        coefficients: One for each output, float64 [B, m].
        gram: Products of the networks' outputs, float64 [B, m, m].
        products: Those with the pipeline's output, float64 [B, m].
        square: The pipeline's output, squared, [B].
    """

    coefficients: Tensor
    gram: Tensor
    products: Tensor
    square: Tensor

    @classmethod
    def of_products(cls, products: Tensor) -> Formula:
        """The best formula by the products of outputs, the pipeline's last: [B, m + 1, m + 1] on the CPU."""
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
        """The square of the pipeline's output, of all samples."""
        return float(self.square.sum())

    def residual(self, coefficients: Tensor) -> float:
        """How far the output is from the combination by ``coefficients``, relative."""
        made = torch.einsum("bi,bij,bj->", coefficients, self.gram, coefficients)
        square = self.size - 2 * float((coefficients * self.products).sum()) + float(made)
        return math.sqrt(max(square, 0.0) / max(self.size, 1e-30))

    def explains(self, other: Formula, factor: float = 10.0) -> bool:
        """Whether its coefficients make the other's output of the other's networks' outputs, as well as its own do.

        What is not finite is not told apart.

        Args:
            other: Another formula.
            factor: How many times the other's own error the residual may be.
        """
        same = self.coefficients.shape == other.coefficients.shape
        return same and not other.residual(self.coefficients) > max(LINEAR, factor * other.error)

    def contradicts(self, other: Formula) -> bool:
        """Whether one output is linear and the other not, or neither formula explains the other's output.

        Where two outputs are nearly equal, as with and without a prompt, many coefficients explain them alike.
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
        """Whether both may come of one rule whose coefficients follow the latents: other outputs, other coefficients.

        So are guidance of bounded size (APG), of the size of a network's output (``guidance_rescale``) and along it
        (CFG-Zero*): their coefficients are functions of the products of two outputs or more.
        """
        if self.gram.shape[-1] == 1 or (self.size == 0) != (other.size == 0):
            return False
        one, two = (_distances(formula.gram) for formula in (self, other))
        return not bool(((one - two).abs() <= ALIKE * torch.maximum(one, two)).all())


def _distances(gram: Tensor) -> Tensor:
    """Squares of outputs, on the diagonal, and of their differences, [B, m, m]."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    apart = squares[..., :, None] + squares[..., None, :] - 2 * gram
    return apart + torch.diag_embed(squares)


def products_of(outputs: list[Given], output: Tensor) -> Tensor | None:
    """Products of the networks' outputs and the pipeline's ``output`` [B, *shape], of each sample, on its device.

    None if the networks' outputs are not 1 to 4 of its shape.
    """
    pieces = [piece for given in outputs for piece in _pieces(given, output)]
    if not 0 < len(pieces) <= 4:
        return None
    exact = torch.float32 if output.device.type == "mps" else torch.float64
    columns = torch.stack([piece.to(output.device) for piece in (*pieces, output)], dim=1).flatten(2).to(exact)
    return columns @ columns.mT


def _pieces(given: Given, output: Tensor) -> list[Tensor]:
    """A network's output in parts like ``output`` [B, *shape], without further channels; none if shapes do not fit."""
    given = _as_batch(given, output)
    if part_like(given, output) is None:
        return []
    channels = given.narrow(1, 0, output.shape[1]) if given.shape[1] != output.shape[1] else given
    pieces = list(channels.split(len(output)))
    return pieces if all(piece.shape == output.shape for piece in pieces) else []


def part_like(given: Given, latents: Tensor) -> Tensor | None:
    """The part of a network's input where latents would be; None if the shapes do not fit."""
    given = _as_batch(given, latents)
    if not given.is_floating_point() or given.ndim != latents.ndim or len(given) % len(latents):
        return None
    larger = [d for d in range(1, latents.ndim) if given.shape[d] != latents.shape[d]]
    if len(larger) > 1 or any(given.shape[d] < latents.shape[d] for d in larger):
        return None
    part = given[: len(latents)]
    return part.narrow(larger[0], 0, latents.shape[larger[0]]) if larger else part


def _as_batch(given: Given, latents: Tensor) -> Tensor:
    """One batch: a list of samples is stacked, if it may be of latents, and axes of length 1 are as in ``latents``."""
    if not isinstance(given, Tensor):
        alike = all(each.shape == given[0].shape for each in given) and given[0].numel() == latents[0].numel()
        given = torch.stack([*given]) if alike else latents.new_empty(0)
    shapes = [[n for n in each.shape[1:] if n != 1] for each in (given, latents)]
    return given.reshape(len(given), *latents.shape[1:]) if shapes[0] == shapes[1] else given
