# SPDX-License-Identifier: Apache-2.0
"""Small seeded models of many transformers architectures, as a quantizer meets them when trained.

Each of `ARCHITECTURES` exports with `torch.export` and to ONNX within seconds. Importing this module
needs torch only; transformers is imported when an entry is built.
"""

from __future__ import annotations

from zoo_base import Architecture, MainOutput
from zoo_signals import AUDIO, CNNS, TOWERS, VITS
from zoo_text import DECODERS, ENCODERS, SEQ2SEQS

__all__ = ["ARCHITECTURES", "Architecture", "MainOutput"]

ARCHITECTURES: tuple[Architecture, ...] = (*ENCODERS, *DECODERS, *SEQ2SEQS, *VITS, *CNNS, *AUDIO, *TOWERS)
