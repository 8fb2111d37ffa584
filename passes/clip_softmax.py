# SPDX-License-Identifier: Apache-2.0
"""Clipped softmax: attention that can be exactly zero, so that no head needs outliers to do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from splitfold.passes.attention import find_attention
from splitfold.passes.attention_block import Attention, Clipping
from splitfold.passes.base import Context, Contract, Findings, LayerPass
from splitfold.passes.substitution import candidate_blocks, insert_after, written_for
from splitfold.passes.symbolic_shapes import symbolic_shapes

__all__ = ["ClipSoftmaxPass"]

_ALPHA = 3.0
"""The middle of the band 2 to 4 that the paper finds robust (section 5.2)."""
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class ClipSoftmaxPass(LayerPass):
    """Stretch the probabilities of attention to [gamma, zeta] and clip them to [0, 1].

    Bondarenko et al., "Quantizable Transformers", 2023, equation 4: clip((zeta - gamma) softmax(x) + gamma,
    0, 1). A head that wants to do nothing can give exact zeros without huge logits, which are what makes
    activations hard to quantize. It is another function, to be trained or at least fine-tuned with. One
    HardSigmoid computes it. A row whose mask blocks every key, with -inf or the lowest number, gives zeros. A
    softmax that is no attention is left alone.

    Args:
        gamma: lower end, 0 or below; none for -alpha / length.
        alpha: see gamma; 3 where neither is given. It is meant for whole sequences: shorter ones have larger
            probabilities, of which less is clipped.
        zeta: upper end, 1 or above.
        length: number of keys that it is trained with; none for that of the graph, where it is fixed.

    Before::

        y = MatMul(Softmax(scores), v)

    After::

        y = MatMul(HardSigmoid<alpha = zeta - gamma, beta = gamma>(Softmax(scores)), v)
    """

    name: ClassVar[str] = "clip-softmax"
    contract: ClassVar[Contract] = Contract.SEMANTIC
    takes: ClassVar[str] = "the softmax of attention that is written out"
    gamma: float | None = None
    alpha: float | None = None
    zeta: float = 1.0
    length: int | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and self.alpha is not None:
            raise ValueError("gamma and alpha are both given; alpha sets gamma to -alpha / length.")
        if self.gamma is not None and not -1 < self.gamma <= 0:
            raise ValueError(f"gamma is {self.gamma:g}; it lies in (-1, 0], such as -0.025.")
        if self.alpha is not None and not self.alpha >= 0:
            raise ValueError(f"alpha is {self.alpha:g}; it is 0 or above, and 2 to 4 serve best.")
        if not 1 <= self.zeta < 2:
            raise ValueError(f"zeta is {self.zeta:g}; it lies in [1, 2), and 1 serves best.")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is {self.length}; it is a number of keys.")

    def rewrite(self, model: ir.Model, context: Context, findings: Findings) -> bool:
        """See the class."""
        shapes = symbolic_shapes(model)
        blocks = candidate_blocks(self, find_attention(model), findings, self._reason_against)
        for block in blocks:
            clipping = Clipping(self._gamma(block), self.zeta)
            with written_for(block, shapes):
                _clip(block, clipping)
            findings.apply(block.name, f"softmax clipped: gamma={clipping.gamma:.4g}, zeta={clipping.zeta:g}")
        return bool(blocks)

    def _gamma(self, block: Attention) -> float:
        if self.gamma is not None:
            return self.gamma
        dim = block.layout.key_length
        length = self.length or (dim.known if dim is not None else None)
        if length is None:
            raise ValueError(f"{block.name}: the number of keys is unknown")
        return -(_ALPHA if self.alpha is None else self.alpha) / length

    def _reason_against(self, block: Attention) -> str | None:
        if block.probabilities is None:
            return (
                f"its softmax is inside {block.form.value}: export the model with attention written out "
                "(torch: an opset below 23), before the runtime's optimizer fuses it"
            )
        if block.probabilities.clipping is not None:
            held = block.probabilities.clipping
            return f"clipped already: gamma={held.gamma:.4g}, zeta={held.zeta:.4g}"
        dtype = block.probabilities.guarded.dtype
        if dtype not in _DTYPES:
            return f"its probabilities are {dtype}, not FLOAT"
        return self._reason_against_gamma(block)

    def _reason_against_gamma(self, block: Attention) -> str | None:
        dim = block.layout.key_length
        if self.gamma is None and self.length is None and (dim is None or dim.known is None):
            return (
                f"its number of keys ({dim or 'unknown'}) changes from call to call, and gamma = -alpha / "
                "length with it: give length, that of the sequences in training, or gamma itself"
            )
        gamma = self._gamma(block)
        if gamma <= -1:
            return f"gamma = -alpha / length is {gamma:g}, for {dim} keys: it would clip all"
        return "gamma=0 and zeta=1 leave a softmax as it is" if gamma == 0 and self.zeta == 1 else None


def _clip(block: Attention, clipping: Clipping) -> None:
    if block.probabilities is None:
        raise ValueError(f"{block.name}: its softmax is not written out")
    probabilities = block.probabilities.guarded
    attributes = {"alpha": clipping.zeta - clipping.gamma, "beta": clipping.gamma}
    insert_after(probabilities, "HardSigmoid", attributes, f"{probabilities.name}_clipped")
