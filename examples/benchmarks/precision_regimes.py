# SPDX-License-Identifier: Apache-2.0
"""What plans of the mixed-precision benchmark are made of, and what they may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitfold.passes.layer_cost import weight_bytes_in, weight_count
from splitfold.passes.limits import Limit, Unit
from splitfold.passes.precision import Precision
from splitfold.passes.signals.subject import Subject

__all__ = ["Regime", "carriers", "joint", "weights_only"]

WIDTHS = range(2, 9)
INPUT_BITS = 8


@dataclass(frozen=True)
class Regime:
    """What precisions a plan is made of, and its budgets.

    Attributes:
        name: in files and options.
        title: of the table.
        choices: precisions.
        budgets: by name, bits a weight; where `share` is set, the share of the bits that int8 stores, which
            only the layers tell.
        unit: whether those are bits of codes, or of all that is stored.
        fixed: measured too with one precision for all layers, whatever it costs.
    """

    name: str
    title: str
    choices: tuple[Precision, ...]
    budgets: Mapping[str, float]
    unit: Unit = Unit.CODE_BITS
    share: bool = False
    fixed: tuple[Precision, ...] = ()

    def limits(self, subject: Subject) -> dict[str, Limit]:
        """The limits by name."""
        whole = int8_bits(subject) if self.share else 1.0
        return {name: Limit(whole * amount, self.unit) for name, amount in self.budgets.items()}


def int8_bits(subject: Subject) -> float:
    """Bits a weight that int8 with a scale and zero point for each channel stores."""
    stored = sum(weight_bytes_in(layer, Precision.int8_dynamic()) for layer in subject.layers)
    return 8 * stored / sum(weight_count(layer) for layer in subject.layers)


def joint(budgets: Sequence[int]) -> Regime:
    """Weights and inputs of all layers at once; a layer's input has as many bits as its weights."""
    return Regime(
        "joint",
        "weights and inputs of all layers simulated in 2 to 8 bits",
        tuple(Precision.simulate(bits, bits) for bits in WIDTHS),
        _named(budgets),
    )


def weights_only(budgets: Sequence[int]) -> Regime:
    """Weights of all layers at once, inputs in 8 bits."""
    return Regime(
        "weights",
        f"weights of all layers simulated in 2 to 8 bits, inputs in {INPUT_BITS}",
        tuple(Precision.simulate(bits, INPUT_BITS) for bits in WIDTHS),
        _named(budgets),
    )


def carriers(choices: Sequence[str]) -> Regime:
    """Real carriers at half of what int8 stores."""
    made = tuple(map(Precision.parse, choices))
    fixed = tuple(choice for choice in made if not choice.is_float)
    budgets = {"half of int8": 0.5}
    return Regime("carriers", "real carriers", made, budgets, Unit.BITS, share=True, fixed=fixed)


def _named(budgets: Sequence[int]) -> dict[str, float]:
    return {f"{bits} bits": float(bits) for bits in budgets}
