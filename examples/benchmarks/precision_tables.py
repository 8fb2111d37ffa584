# SPDX-License-Identifier: Apache-2.0
"""Tables and verdicts over plans by many signals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from splitfold.examples.benchmarks.precision_runs import FLOAT, TURNED, Entries
from splitfold.examples.benchmarks.split_tables import Table, spread

__all__ = ["Grid", "Standing", "claim_table", "grid_table", "standings", "summary_table"]

UNIFORM, RANDOM, SENSITIVITY = "uniform", "random", "sensitivity"
CLAIMED, RIVAL = "relevance", "taylor"
CHEAP = 0.05
"""Share of measured sensitivity's time that relevance may cost."""
MIXED_GAIN = 2.0
"""Points by which mixed bits are to beat as many fixed ones where those hurt."""
ALIVE = 0.02
"""Share of the float model's score that the best plan must keep for a budget to tell signals apart."""
APART = 0.05
"""Share of the float model's score by which the best and the worst plan must differ for the same."""
FALLS = ("perplexity",)


@dataclass(frozen=True)
class Grid:
    """All contenders on one model in one regime, a mapping for each seed.

    Attributes:
        model: its name.
        regime: title of the regime.
        seeds: entries by contender.
    """

    model: str
    regime: str
    seeds: Sequence[Entries]

    @property
    def budgets(self) -> list[str]:
        """Names of the budgets."""
        return list(self.seeds[0][FLOAT].values)

    @property
    def measures(self) -> list[str]:
        """What was measured; the first decides."""
        return list(self.seeds[0][FLOAT].values[self.budgets[0]])

    @property
    def falls(self) -> bool:
        """Whether less is better."""
        return self.measures[0] in FALLS

    def complete(self) -> list[str]:
        """Contenders that spent every budget: not the float model, no fixed precision of another size."""
        return [
            name
            for name, entry in self.seeds[0].items()
            if entry.seconds is not None and set(entry.values) == set(self.budgets)
        ]

    def values(self, name: str, budget: str, measure: int = 0) -> list[float]:
        """One number a seed; none where the budget was not kept."""
        what = self.measures[measure]
        rows = [seed[name].values for seed in self.seeds if name in seed]
        return [row[budget][what] for row in rows if budget in row]

    def mean(self, name: str, budget: str) -> float:
        """Mean of the measure that decides."""
        return float(np.mean(self.values(name, budget)))

    def gain(self, budget: str, one: str, other: str) -> float:
        """By how much `one` is better than `other`."""
        difference = self.mean(one, budget) - self.mean(other, budget)
        return -difference if self.falls else difference

    def kept(self, name: str, budget: str) -> float:
        """Share of the float model's score that is left."""
        ratio = self.mean(name, budget) / self.mean(FLOAT, budget)
        return 1 / ratio if self.falls else ratio

    def seconds(self, name: str) -> float:
        """Mean processor seconds; NaN where there are none."""
        found = [seed[name].seconds for seed in self.seeds if name in seed]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else float("nan")


def grid_table(grid: Grid) -> Table:
    """One row a contender."""
    heading = "; ".join([f"{grid.measures[0]} (least to largest)", *grid.measures[1:]])
    columns = ("plan by", *(f"{budget}: {heading}" for budget in grid.budgets), "seconds", "of sensitivity")
    table = Table(
        f"{grid.model}, {grid.regime}: mean of {len(grid.seeds)} draws of calibration data", columns
    )
    base = grid.seconds(SENSITIVITY)
    for name in grid.seeds[0]:
        taken = grid.seconds(name)
        cells = [_cell(grid, name, budget) for budget in grid.budgets]
        table.add(name, *cells, _number(taken, ".2f"), _number(taken / base, ".1%"))
    for name in _claimed(grid.complete()):
        _beats(table, grid, name)
    price = grid.seconds(CLAIMED) / base if CLAIMED in grid.complete() else float("nan")
    if not np.isnan(price):
        table.expect(
            f"{CLAIMED} costs less than {CHEAP:.0%} of measured sensitivity: {price:.1%}", price < CHEAP
        )
    return table


def _cell(grid: Grid, name: str, budget: str) -> str:
    first = grid.values(name, budget)
    if not first:
        return grid.seeds[0][name].reason.split(":")[0] or "-"
    form = ".2f" if max(first) >= 20 else ".3f"
    others = (grid.values(name, budget, at) for at in range(1, len(grid.measures)))
    return "; ".join([spread(first, form), *(f"{np.mean(found):.4f}" for found in others)])


def _number(value: float, form: str) -> str:
    return "" if np.isnan(value) else format(value, form)


def _claimed(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(CLAIMED) and TURNED not in name]


def _beats(table: Table, grid: Grid, name: str) -> None:
    there = [other for other in (UNIFORM, RANDOM) if other in grid.complete()]
    for budget in grid.budgets if there else ():
        gains = {other: grid.gain(budget, name, other) for other in there}
        against = " and ".join(f"{other} ({gain:+.3g})" for other, gain in gains.items())
        table.expect(f"{budget}: {name} beats {against}", all(gain > 0 for gain in gains.values()))


@dataclass(frozen=True)
class Standing:
    """How a contender did over all cells: a model, a regime and a budget each.

    Attributes:
        rank: mean over the cells, 1 is the best; ties share.
        kept: mean share of the float model's score that is left.
        wins: cells in which it beats uniform.
        price: mean share of measured sensitivity's processor seconds over the grids.
    """

    rank: float
    kept: float
    wins: int
    price: float


def cells(grids: Sequence[Grid]) -> list[tuple[Grid, str]]:
    """The budgets that tell signals apart: not those where no plan leaves anything of the model, nor those
    where all plans leave nearly everything, so that ranks would be those of noise."""
    return [(grid, budget) for grid in grids for budget in grid.budgets if _tells(grid, budget)]


def _tells(grid: Grid, budget: str) -> bool:
    shares = [grid.kept(name, budget) for name in grid.complete()]
    return bool(shares) and max(shares) >= ALIVE and max(shares) - min(shares) >= APART


def standings(grids: Sequence[Grid]) -> dict[str, Standing]:
    """By contender, best rank first; only those that took part in every cell."""
    places = cells(grids)
    if not places:
        return {}
    taking = [set(grid.complete()) for grid, _ in places]
    common = [name for name in places[0][0].complete() if all(name in names for names in taking)]
    shares = [{name: grid.kept(name, budget) for name in common} for grid, budget in places]
    found = {}
    for name in common:
        ranks = [_rank(cell, name) for cell in shares]
        wins = sum(UNIFORM in cell and cell[name] > cell[UNIFORM] for cell in shares)
        kept = float(np.mean([cell[name] for cell in shares]))
        found[name] = Standing(float(np.mean(ranks)), kept, wins, _price(places, name))
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def _rank(cell: dict[str, float], name: str) -> float:
    above = sum(share > cell[name] for share in cell.values())
    return above + (sum(share == cell[name] for share in cell.values()) + 1) / 2


def _price(places: Sequence[tuple[Grid, str]], name: str) -> float:
    grids = {id(grid): grid for grid, _ in places}.values()
    return float(np.mean([grid.seconds(name) / grid.seconds(SENSITIVITY) for grid in grids]))


def summary_table(grids: Sequence[Grid]) -> Table:
    """All contenders over all cells, and what follows for the default."""
    found, count = standings(grids), len(cells(grids))
    table = Table(
        f"All contenders over {count} cells: a model, a regime and a budget each",
        (
            "plan by",
            "mean rank",
            "mean share of fp32's score",
            "better than uniform",
            "seconds, of sensitivity",
        ),
    )
    for name, one in found.items():
        price = _number(one.price, ".1%")
        table.add(name, f"{one.rank:.2f}", f"{one.kept:.1%}", f"{one.wins} of {count}", price)
    ours, rivals = _claimed(list(found)), [name for name in found if name.startswith(RIVAL)]
    if ours and rivals:
        _against(table, found, ours, rivals, "mean rank", lambda one: -one.rank)
        _against(table, found, ours, rivals, "mean share", lambda one: one.kept)
    return table


def _against(
    table: Table,
    found: dict[str, Standing],
    ours: Sequence[str],
    rivals: Sequence[str],
    what: str,
    worth: Callable[[Standing], float],
) -> None:
    best, rival = (max(names, key=lambda name: worth(found[name])) for names in (ours, rivals))
    came = worth(found[best]) >= worth(found[rival])
    table.expect(
        f"{what}: the best form of relevance ({best}) is level with Taylor's ({rival}) or better", came
    )


def claim_table(grids: Sequence[Grid]) -> Table:
    """Mixed bits against as many fixed ones on vision transformers, where fixed ones hurt."""
    table = Table(
        "Mixed against fixed bits (the claim of LRP-QViT): accuracy in %",
        ("model", "budget", "fp32", "fixed", "mixed by", "accuracy", "gain, points"),
    )
    for grid in grids:
        ours = [name for name in (SENSITIVITY, *_claimed(grid.complete())) if name in grid.complete()]
        for budget in grid.budgets if UNIFORM in grid.complete() else ():
            hurt = grid.mean(FLOAT, budget) - grid.mean(UNIFORM, budget)
            for name in ours:
                gain = grid.gain(budget, name, UNIFORM)
                numbers = (grid.mean(FLOAT, budget), grid.mean(UNIFORM, budget), grid.mean(name, budget))
                first, fixed, mixed = (f"{number:.2f}" for number in numbers)
                table.add(grid.model, budget, first, fixed, name, mixed, f"{gain:+.2f}")
                if hurt >= MIXED_GAIN:
                    table.expect(
                        f"{grid.model}, {budget}: fixed bits lose {hurt:.1f} points; mixed by {name} win "
                        f"{MIXED_GAIN:g} or more: {gain:+.2f}",
                        gain >= MIXED_GAIN,
                    )
    return table
