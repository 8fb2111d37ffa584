# SPDX-License-Identifier: Apache-2.0
"""Graph rewrite passes over `onnx_ir.Model`, the analyses that feed them, and pipelines of them."""
