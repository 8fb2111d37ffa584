# SPDX-License-Identifier: Apache-2.0
"""Scripts that measure splitfold on real models beside onnxruntime's own quantizers."""
