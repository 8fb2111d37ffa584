# SPDX-License-Identifier: Apache-2.0
"""Running and comparing ONNX models: what a deployment machine needs, and no more (numpy, onnx-ir,
onnxruntime)."""
