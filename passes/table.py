# SPDX-License-Identifier: Apache-2.0
"""The one table of passes, for the text form."""

from __future__ import annotations

from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.choose_carriers import ChooseCarriersPass
from splitfold.passes.clip_softmax import ClipSoftmaxPass
from splitfold.passes.drop_nan_guards import DropNanGuardsPass
from splitfold.passes.flatten_heads import FlattenHeadsPass
from splitfold.passes.fold_clips import FoldClipsPass
from splitfold.passes.fold_multipliers import FoldMultipliersPass
from splitfold.passes.fold_scales import FoldScalesPass
from splitfold.passes.fuse_attention import FuseAttentionPass
from splitfold.passes.fuse_cached_attention import FuseCachedAttentionPass
from splitfold.passes.fuse_norms import FuseNormsPass
from splitfold.passes.fuse_rotary import FuseRotaryPass
from splitfold.passes.gate_attention import GateAttentionPass
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.merge_projections import MergeProjectionsPass
from splitfold.passes.merge_transposes import MergeTransposesPass
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.quantize_embeddings import QuantizeEmbeddingsPass
from splitfold.passes.quantize_parts import QuantizePartsPass
from splitfold.passes.quantize_weights import QuantizeWeightsPass
from splitfold.passes.replace_softmax import ReplaceSoftmaxPass
from splitfold.passes.simplify_quantizers import SimplifyQuantizersPass
from splitfold.passes.simplify_reshapes import SimplifyReshapesPass
from splitfold.passes.simulate_quantization import SimulateQuantizationPass
from splitfold.passes.split_activations import SplitActivationsPass
from splitfold.passes.split_layers import SplitLayersPass
from splitfold.passes.split_outliers import SplitOutliersPass
from splitfold.passes.unfuse_norms import UnfuseNormsPass
from splitfold.passes.widen_blocks import WidenBlocksPass

__all__ = ["PASSES"]

PASSES: tuple[type[Pass], ...] = (
    CanonicalizePass,
    DropNanGuardsPass,
    FoldClipsPass,
    FoldMultipliersPass,
    FoldScalesPass,
    QuantizeActivationsPass,
    QuantizeDynamicPass,
    QuantizeWeightsPass,
    WidenBlocksPass,
    QuantizeEmbeddingsPass,
    QuantizePartsPass,
    SimplifyReshapesPass,
    SimplifyQuantizersPass,
    MergeTransposesPass,
    MergeProjectionsPass,
    SimulateQuantizationPass,
    SplitActivationsPass,
    SplitLayersPass,
    SplitOutliersPass,
    AssignPrecisionPass,
    ChooseCarriersPass,
    ClipSoftmaxPass,
    GateAttentionPass,
    ReplaceSoftmaxPass,
    FuseAttentionPass,
    FuseCachedAttentionPass,
    FuseRotaryPass,
    FuseNormsPass,
    FlattenHeadsPass,
    UnfuseNormsPass,
    LegalizePass,
)
