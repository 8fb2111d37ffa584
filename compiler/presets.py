# SPDX-License-Identifier: Apache-2.0
"""Presets: functions that return a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Pass
from splitfold.passes.bias_correction import BiasCorrection
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.drop_nan_guards import DropNanGuardsPass
from splitfold.passes.errors import SpecError
from splitfold.passes.flatten_heads import FlattenHeadsPass
from splitfold.passes.fold_multipliers import FoldMultipliersPass
from splitfold.passes.fold_scales import FoldScalesPass, ScaleMethod
from splitfold.passes.fuse_attention import FuseAttentionPass
from splitfold.passes.fuse_cached_attention import FuseCachedAttentionPass
from splitfold.passes.fuse_norms import FuseNormsPass
from splitfold.passes.fuse_rotary import FuseRotaryPass
from splitfold.passes.merge_projections import MergeProjectionsPass
from splitfold.passes.merge_transposes import MergeTransposesPass
from splitfold.passes.pipeline import Pipeline
from splitfold.passes.precision import Precision
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.quantize_embeddings import QuantizeEmbeddingsPass
from splitfold.passes.quantize_weights import QuantizeWeightsPass, WeightMethod
from splitfold.passes.simplify_reshapes import SimplifyReshapesPass
from splitfold.passes.static_int8 import StaticForm
from splitfold.passes.unfuse_norms import UnfuseNormsPass
from splitfold.runtime.errors import did_you_mean
from splitfold.runtime.target import Carrier, Target

__all__ = ["PRESETS", "decoder", "exact", "int4", "int8", "int8_dynamic", "low_bit", "mixed", "preset"]

_STATIC_SQNR = 20.0
"""dB below which a layer's static form is not taken."""
_DYNAMIC_SQNR = 15.0
"""dB below which a layer stays in float: what a per-tensor grid cannot hold either way."""
_LOW_BITS = 3
_DECODER_BLOCK = 128


def _simplified() -> tuple[Pass, ...]:
    """Return what every preset begins with: canonical form, and less work around the arithmetic."""
    return (
        CanonicalizePass(),
        DropNanGuardsPass(),
        SimplifyReshapesPass(),
        MergeTransposesPass(),
        FoldMultipliersPass(),
    )


def exact() -> Pipeline:
    """Return the lossless pipeline: canonical form, the removal of work that computes nothing, and attention
    as one operator."""
    return Pipeline.of(*_simplified(), FuseAttentionPass())


def int8(target: Target | None = None) -> Pipeline:
    """Return static int8 where a layer's own error allows it, dynamic int8 for the linear layers it does not,
    float for the rest.

    Needs calibration data. Embedding tables are held in int8.

    Args:
        target: where it is to run; default the CPU provider. On one that has no dynamic int8 the bound of
            dynamic int8 is that of static int8; on one without MatMulIntegerToFloat it is written as Q/DQ.
    """
    place = target or Target.cpu()
    bound = _STATIC_SQNR if place.carries(Carrier.DYNAMIC_INT8) else _DYNAMIC_SQNR
    form = StaticForm.INTEGER if place.carries(Carrier.INTEGER_MATMUL) else StaticForm.QDQ
    return Pipeline.of(
        *_simplified(),
        FoldScalesPass(),
        QuantizeActivationsPass(min_sqnr=bound, form=form, correct_bias=BiasCorrection.CONVOLUTIONS),
        QuantizeDynamicPass(min_sqnr=_DYNAMIC_SQNR),
        QuantizeEmbeddingsPass(),
        FuseAttentionPass(),
        UnfuseNormsPass(),
    )


def int8_dynamic() -> Pipeline:
    """Return dynamic int8 for linear layers and int8 embedding tables; needs no calibration data."""
    return Pipeline.of(
        *_simplified(),
        FoldScalesPass(data_free=True),
        QuantizeDynamicPass(),
        QuantizeEmbeddingsPass(),
        FuseAttentionPass(),
        UnfuseNormsPass(),
    )


def int4() -> Pipeline:
    """Return 4-bit weights in blocks of 32 with zero points, and int8 embedding tables; needs no calibration
    data."""
    return Pipeline.of(
        *_simplified(), QuantizeWeightsPass(bits=4, block=32), QuantizeEmbeddingsPass(), FuseAttentionPass()
    )


def decoder() -> Pipeline:
    """Return what a causal language model with a cache writes text fastest with: norms, rotary positions and
    attention as one operator each, heads side by side, and 4-bit weights in symmetric blocks of 128, their
    ranges found by least squares, those that read the same in one product; needs no calibration data.

    Blocks of 32, as `int4` has them, are nearer to float and take 1.4 times as long a token.
    """
    return Pipeline.of(
        *_simplified(),
        FuseNormsPass(),
        FuseRotaryPass(),
        FuseCachedAttentionPass(),
        FlattenHeadsPass(),
        QuantizeWeightsPass(method=WeightMethod.MSE, bits=4, block=_DECODER_BLOCK, symmetric=True),
        QuantizeEmbeddingsPass(),
        MergeProjectionsPass(),
    )


def low_bit() -> Pipeline:
    """Return 3-bit weights in blocks of 32: AWQ's scales first, then GPTQ.

    Needs calibration data. They are stored in 4 bits, for which the CPU provider has a kernel.
    """
    return Pipeline.of(
        *_simplified(),
        FoldScalesPass(method=ScaleMethod.AWQ, bits=_LOW_BITS),
        QuantizeWeightsPass(method=WeightMethod.GPTQ, bits=_LOW_BITS, act_order=True),
        FuseAttentionPass(),
    )


def mixed() -> Pipeline:
    """Return the pipeline whose plans `compile` searches where a drop of a metric is given and no pipeline:
    each layer in float, static int8, dynamic int8 or 4-bit weights.

    Needs calibration data.
    """
    choices = (Precision.float(), Precision.int8_static(), Precision.int8_dynamic(), Precision.blocks(4))
    return Pipeline.of(
        *_simplified(),
        FoldScalesPass(),
        AssignPrecisionPass(choices=choices),
        QuantizeEmbeddingsPass(),
        FuseAttentionPass(),
        UnfuseNormsPass(),
    )


PRESETS: Mapping[str, Callable[[], Pipeline]] = {
    "exact": exact,
    "int8": int8,
    "int8-dynamic": int8_dynamic,
    "int4": int4,
    "decoder": decoder,
    "low-bit": low_bit,
}


_BY_TARGET: Mapping[str, Callable[[Target], Pipeline]] = {"int8": int8}


def preset(name: str, target: Target | None = None) -> Pipeline:
    """Return the pipeline of the preset of this name, as it is for `target`; default the CPU provider.

    Raises:
        SpecError: there is none.
    """
    if name not in PRESETS:
        raise SpecError(f"unknown preset '{name}'.{did_you_mean(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    if target is not None and name in _BY_TARGET:
        return _BY_TARGET[name](target)
    return PRESETS[name]()
