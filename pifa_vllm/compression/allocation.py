"""Who gets which rank: from densities to ranks that keep the model within its budget."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pifa_vllm.compression.decoder import LinearShape
from pifa_vllm.compression.report.schema import Representation
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import lowrank_parameters, lowrank_rank, pifa_parameters, pifa_rank

Density = Callable[[LinearShape], float]

# Of the ranks that a checkpoint has, beside it.
RECIPE_NAME = "recipe.yaml"

# Kept numbers of an [m, n] module of rank r.
PARAMETERS = {"pifa": pifa_parameters, "lowrank": lowrank_parameters}
_RANK = {"pifa": pifa_rank, "lowrank": lowrank_rank}


class Rule(BaseModel):
    """One line of a recipe: a density for the modules it matches.

    Attributes:
        match: shell-style pattern on the full module name, `*` crossing dots.
        layers: decoder layers it is limited to, each a number or a range such as "0-3" (both ends included).
        density: kept / dense parameters; 1 keeps the module dense.
    """

    model_config = ConfigDict(extra="forbid")

    match: str = "*"
    layers: list[int | str] | None = None
    density: float = Field(gt=0.0, le=1.0)

    def covers(self, linear: LinearShape) -> bool:
        """Tell whether this rule is about `linear`."""
        if self.layers is not None and not any(_in_range(linear.layer, spec) for spec in self.layers):
            return False
        return fnmatch.fnmatchcase(linear.name, self.match)

    @model_validator(mode="after")
    def _check_layers(self) -> Rule:
        for spec in self.layers or ():
            _in_range(0, spec)
        return self


class Recipe(BaseModel):
    """Densities per module and per layer (MPIFA_NS). The first rule that matches a module decides.

    Attributes:
        density: for modules that no rule matches.
        dense_parameters: of all linear modules of the model that the recipe is for; None fits any model.
        rules: in order of precedence.
    """

    model_config = ConfigDict(extra="forbid")

    density: float = Field(gt=0.0, le=1.0)
    dense_parameters: int | None = None
    rules: list[Rule] = []

    def __call__(self, linear: LinearShape) -> float:
        """Return the density that `linear` is given."""
        return next((rule.density for rule in self.rules if rule.covers(linear)), self.density)

    def check(self, linears: Sequence[LinearShape]) -> None:
        """Check that the model is the recipe's, and that every rule is about some module.

        A misspelt rule must not be passed over in silence.

        Args:
            linears: every compressible module of the model.

        Raises:
            PifaError: naming the rule.
        """
        dense = sum(x.m * x.n for x in linears)
        if self.dense_parameters not in (None, dense):
            raise PifaError(
                f"recipe: it is for a model with {self.dense_parameters:,} parameters in its linear modules "
                f"(dense_parameters), expected {dense:,}, which this model has."
            )
        for index, rule in enumerate(self.rules):
            if not any(rule.covers(linear) for linear in linears):
                layers = "all layers" if rule.layers is None else f"layers {rule.layers}"
                raise PifaError(
                    f"recipe: rules.{index}: expected modules that match {rule.match!r} in {layers}, found none "
                    f"among {linears[0].name} to {linears[-1].name}."
                )


def uniform(density: float, attention: float | None = None, mlp: float | None = None) -> Recipe:
    """Make a recipe of one density, or of one for attention and one for MLP modules.

    Raises:
        PifaError: if a density is not in (0, 1].
    """
    rules: list[dict[str, Any]] = []
    for pattern, value in (("*.self_attn.*", attention), ("*.mlp.*", mlp)):
        if value is not None:
            rules.append({"match": pattern, "density": value})
    for value in (density, attention, mlp):
        if value is not None and not 0.0 < value <= 1.0:
            raise PifaError(f"density: expected a number in (0, 1], found {value}.")
    return Recipe.model_validate({"density": density, "rules": rules})


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        PifaError: naming the file and the field that is wrong.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PifaError(f"{path}: cannot be read as a YAML recipe ({reason}).") from error
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise PifaError(f"{path}: {where}: {first['msg']}, found {first['input']!r}.") from error


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False, width=120)


def allocate(
    linears: Sequence[LinearShape], density: Density, representation: Representation, tile: int
) -> dict[str, int]:
    """Turn densities into ranks, rounding over the whole model.

    Each rank is first rounded down to a multiple of `tile`. What that leaves of the model's budget is then given
    back a tile at a time, first where rounding took the largest share, while a tile still fits. So the kept
    parameters never exceed the budget and fall short of it by less than one tile of the cheapest module.

    Args:
        linears: every compressible module.
        density: wanted density of each.
        representation: which parameter count to budget.
        tile: ranks are multiples of this, but for modules whose whole budget is below one tile.

    Raises:
        PifaError: if a density leaves a module nothing.

    Returns:
        Rank by module name; modules that stay dense (density 1, or no rank below min(m, n) saves anything) are
        left out.
    """
    count, exact_rank = PARAMETERS[representation], _RANK[representation]
    ranks: dict[str, int] = {}
    spare = 0.0
    shapes: dict[str, LinearShape] = {}
    for linear in linears:
        m, n = linear.m, linear.n
        wanted = density(linear)
        full = min(m, n)
        exact = full if wanted >= 1.0 else exact_rank(m, n, wanted)
        if exact >= full:
            continue
        rank = exact // tile * tile or exact
        if rank == 0:
            raise PifaError(
                f"density: {linear.name} [{m}, {n}] keeps nothing at density {wanted:g}, expected one that leaves "
                "every module a rank of 1 or more."
            )
        ranks[linear.name] = rank
        shapes[linear.name] = linear
        spare += wanted * m * n - count(m, n, rank)

    def step(name: str) -> tuple[float, str] | None:
        """(Priority, module) of raising `name` by one tile, None where it had better be dense."""
        linear, rank = shapes[name], ranks[name]
        raised = rank - rank % tile + tile
        if raised >= min(linear.m, linear.n) or count(linear.m, linear.n, raised) > linear.m * linear.n:
            return None
        lost = density(linear) * linear.m * linear.n - count(linear.m, linear.n, rank)
        return -lost / (linear.m * linear.n), name

    queue = [entry for name in ranks if (entry := step(name)) is not None]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        linear, rank = shapes[name], ranks[name]
        raised = rank - rank % tile + tile
        cost = count(linear.m, linear.n, raised) - count(linear.m, linear.n, rank)
        # A module that does not fit now never will: `spare` only falls and its own next tile stays the same.
        if cost <= spare:
            ranks[name] = raised
            spare -= cost
            if (entry := step(name)) is not None:
                heapq.heappush(queue, entry)
    return ranks


def kept_parameters(
    linears: Sequence[LinearShape], ranks: dict[str, int], representation: Representation
) -> int:
    """Count what the compressible modules keep, dense ones included."""
    count = PARAMETERS[representation]
    return sum(count(x.m, x.n, ranks[x.name]) if x.name in ranks else x.m * x.n for x in linears)


def _in_range(layer: int, spec: int | str) -> bool:
    low, _, high = str(spec).partition("-")
    try:
        return int(low) <= layer <= int(high or low)
    except ValueError:
        raise ValueError(f'layers: expected a number or a range such as "0-3", found {spec!r}') from None
