"""Which rank each module gets, so that the model loses least within one budget.

Every module has a curve: what it costs to keep a rank, and what the model loses by it (`sensitivity`). PIFA's cost
r(m + n) - r² is concave, so that the last ranks are nearly free, and "dense" is the end of the curve. The answer is
the Lagrangian one: on the lower convex hull of each curve, steps are taken in the order of what they save per
number, until the budget is spent. That is the optimum for the budget that it spends; what is left, less than one
step, goes to the best single steps that still fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pifa_vllm.compression.allocation import PARAMETERS, Recipe, Rule, kept_parameters
from pifa_vllm.compression.decoder import LinearShape
from pifa_vllm.compression.report.schema import Representation
from pifa_vllm.errors import PifaError


class _Point(NamedTuple):
    """One choice for a module; rank 0 stands for dense."""

    cost: int
    loss: float
    rank: int


def allocate_by_loss(
    linears: Sequence[LinearShape],
    losses: dict[str, Tensor],
    density: float,
    representation: Representation,
    tile: int,
) -> dict[str, int]:
    """Choose ranks.

    Args:
        linears: every compressible module.
        losses: by module name, [min(m, n) + 1], what the model loses at each rank.
        density: kept / dense parameters over all modules, which is not exceeded.
        representation: which parameter count to budget.
        tile: ranks are multiples of this, but for modules that are narrower.

    Raises:
        PifaError: if the budget does not hold the smallest rank of every module.

    Returns:
        Rank by module name; modules that stay dense are left out.
    """
    curves = {x.name: _curve(x, losses[x.name], representation, tile) for x in linears}
    chosen = {name: points[0] for name, points in curves.items()}
    spare = int(density * sum(x.m * x.n for x in linears)) - sum(point.cost for point in chosen.values())
    if spare < 0:
        raise PifaError(
            f"--density: expected one that holds rank {tile} of every module, found {density:g}, which is "
            f"{-spare:,} numbers short of it. A smaller --tile helps."
        )
    steps = [
        ((before.loss - after.loss) / (after.cost - before.cost), name, after)
        for name, points in curves.items()
        for before, after in itertools.pairwise(_hull(points))
    ]
    # Along a hull what a number saves only falls, so that a module's own steps come in their order.
    full = set()
    for worth, name, point in sorted(steps, key=lambda x: (-x[0], x[1])):
        if worth <= 0.0:
            break
        cost = point.cost - chosen[name].cost
        if name in full or cost > spare:
            full.add(name)
            continue
        chosen[name] = point
        spare -= cost
    _spend(chosen, curves, spare)
    return {name: point.rank for name, point in chosen.items() if point.rank}


def recipe_of(
    linears: Sequence[LinearShape], ranks: dict[str, int], representation: Representation
) -> Recipe:
    """Write ranks as a recipe, module by module, that gives the same ranks again.

    Args:
        linears: every compressible module.
        ranks: by module name; those that are left out are dense.
        representation: which parameter count makes densities of them.
    """
    dense = sum(x.m * x.n for x in linears)
    kept = {x.name: kept_parameters([x], ranks, representation) for x in linears}
    return Recipe(
        density=sum(kept.values()) / dense,
        dense_parameters=dense,
        rules=[Rule(match=x.name, density=kept[x.name] / (x.m * x.n)) for x in linears],
    )


def _curve(linear: LinearShape, losses: Tensor, representation: Representation, tile: int) -> list[_Point]:
    """A module's choices, from the smallest rank to dense."""
    m, n, count = linear.m, linear.n, PARAMETERS[representation]
    full = min(m, n)
    points = [
        _Point(count(m, n, rank), float(losses[rank]), rank)
        for rank in (range(tile, full, tile) or range(1, full))
        if count(m, n, rank) < m * n
    ]
    return [*points, _Point(m * n, 0.0, 0)]


def _hull(points: list[_Point]) -> list[_Point]:
    """The lower convex hull of a curve whose costs rise."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: _Point, b: _Point) -> float:
    return (b.loss - a.loss) / (b.cost - a.cost)


def _spend(chosen: dict[str, _Point], curves: dict[str, list[_Point]], spare: int) -> None:
    """Take single steps, the most worthwhile first, while one fits."""
    while True:
        best: tuple[float, str, _Point] | None = None
        for name, points in curves.items():
            now = chosen[name]
            for point in points:
                if now.cost < point.cost <= now.cost + spare:
                    worth = (now.loss - point.loss) / (point.cost - now.cost)
                    if best is None or worth > best[0]:
                        best = worth, name, point
        if best is None or best[0] <= 0.0:
            return
        spare -= best[2].cost - chosen[best[1]].cost
        chosen[best[1]] = best[2]
