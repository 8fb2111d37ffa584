# SPDX-License-Identifier: Apache-2.0
"""The one table of passes, for the text form."""

from __future__ import annotations

from splitfold.passes.assign_precision import AssignPrecisionPass
from splitfold.passes.base import Pass
from splitfold.passes.canonicalize import CanonicalizePass
from splitfold.passes.fold_scales import FoldScalesPass
from splitfold.passes.legalize import LegalizePass
from splitfold.passes.quantize_activations import QuantizeActivationsPass
from splitfold.passes.quantize_dynamic import QuantizeDynamicPass
from splitfold.passes.quantize_embeddings import QuantizeEmbeddingsPass
from splitfold.passes.quantize_parts import QuantizePartsPass
from splitfold.passes.quantize_weights import QuantizeWeightsPass
from splitfold.passes.simulate_quantization import SimulateQuantizationPass
from splitfold.passes.split_activations import SplitActivationsPass
from splitfold.passes.split_layers import SplitLayersPass
from splitfold.passes.split_outliers import SplitOutliersPass
from splitfold.passes.unfuse_norms import UnfuseNormsPass

__all__ = ["PASSES"]

PASSES: tuple[type[Pass], ...] = (
    CanonicalizePass,
    FoldScalesPass,
    QuantizeActivationsPass,
    QuantizeDynamicPass,
    QuantizeWeightsPass,
    QuantizeEmbeddingsPass,
    QuantizePartsPass,
    SimulateQuantizationPass,
    SplitActivationsPass,
    SplitLayersPass,
    SplitOutliersPass,
    AssignPrecisionPass,
    UnfuseNormsPass,
    LegalizePass,
)
