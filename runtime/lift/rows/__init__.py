# SPDX-License-Identifier: Apache-2.0
"""The rows of the operator table, a file a family: plain functions on tensors, as the ONNX specification has
them, and the table `ROWS` of the family."""
