"""Costs that grow linearly with layers and with tokens, from four small measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """cost(n) = base + slope * n, in bytes."""

    base: float
    slope: float

    def at(self, n: float) -> float:
        """The cost of n tokens (or sequences), never below 0."""
        return max(0.0, self.base + self.slope * n)


@dataclass(frozen=True)
class Plane:
    """cost(layers, n) = base + per_layer * layers + (slope + slope_per_layer * layers) * n."""

    base: float
    per_layer: float
    slope: float
    slope_per_layer: float

    def line(self, layers: int) -> Line:
        """The cost of a model with so many layers."""
        return Line(self.base + self.per_layer * layers, self.slope + self.slope_per_layer * layers)


def fit_plane(
    measure: Callable[[int, int], float], layers: tuple[int, int], sizes: tuple[int, int]
) -> Plane:
    """The plane through measure(layers, n) at the four corners of layers x sizes."""
    (l1, l2), (n1, n2) = layers, sizes
    at = {(layer, n): measure(layer, n) for layer in layers for n in sizes}
    slopes = {layer: (at[layer, n2] - at[layer, n1]) / (n2 - n1) for layer in layers}
    bases = {layer: at[layer, n1] - slopes[layer] * n1 for layer in layers}
    slope_per_layer = (slopes[l2] - slopes[l1]) / (l2 - l1)
    per_layer = (bases[l2] - bases[l1]) / (l2 - l1)
    return Plane(
        base=bases[l1] - per_layer * l1,
        per_layer=per_layer,
        slope=slopes[l1] - slope_per_layer * l1,
        slope_per_layer=slope_per_layer,
    )
