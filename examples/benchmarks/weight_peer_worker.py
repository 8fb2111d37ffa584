# SPDX-License-Identifier: Apache-2.0
"""Quantizes the weights of one file with one peer; runs in the peers' own environment, without splitfold.

    python weight_peer_worker.py job.json

`job.json` holds `model`, `result`, `calibration` (a folder of .npz files, one a batch), `method` (a name in
METHODS), `bits`, `block`, `symmetric`, and `options` (by name, the method's own). It writes `result` and
prints one line of JSON: `seconds` and `processor` seconds of the call itself (imports, reading and writing
excluded), or `error`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx
from onnx import version_converter

if TYPE_CHECKING:
    from splitfold.examples.benchmarks.peer_job import Clock, Job, answered, batches, samples
else:
    from peer_job import Clock, Job, answered, batches, samples

Outcome = tuple[onnx.ModelProto, Clock]
OPSET = 21
"""Blocks of a DequantizeLinear need it."""
ACCURACY_LEVEL = 4


class Reader:
    """Hands out feeds one by one, to onnxruntime."""

    def __init__(self, feeds: list[dict[str, Any]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next feeds, or None."""
        return next(self.feeds, None)


def matmul_nbits(job: Job, model: onnx.ModelProto, config: Any) -> Outcome:
    """`MatMulNBitsQuantizer` with one of its configurations; None is rounding to nearest by its C++ code."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    clock = Clock()
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=job["bits"],
        block_size=job["block"],
        is_symmetric=job["symmetric"],
        accuracy_level=ACCURACY_LEVEL,
        algo_config=config,
    )
    quantizer.process()
    return quantizer.model.model, clock.stop()


def ort_rtn(job: Job, model: onnx.ModelProto) -> Outcome:
    """Round to nearest."""
    return matmul_nbits(job, model, None)


def ort_k_quant(job: Job, model: onnx.ModelProto) -> Outcome:
    """Scales and minima by least squares, as llama.cpp finds them."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    return matmul_nbits(job, model, nbits.KQuantWeightOnlyQuantConfig())


def ort_hqq(job: Job, model: onnx.ModelProto) -> Outcome:
    """Half-quadratic quantization: zero points are searched, and held in float."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    return matmul_nbits(job, model, nbits.HQQWeightOnlyQuantConfig(bits=job["bits"], block_size=job["block"]))


def ort_gptq(job: Job, model: onnx.ModelProto) -> Outcome:
    """GPTQ on all of the calibration data."""
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    class Feeds(Reader, CalibrationDataReader):  # type: ignore[misc]
        pass

    config = nbits.GPTQWeightOnlyQuantConfig(Feeds(batches(job["calibration"])), **job["options"])
    return matmul_nbits(job, model, config)


def nncf_compress(job: Job, model: onnx.ModelProto) -> Outcome:
    """`nncf.compress_weights` of all MatMuls; the options are its own (`data`: whether it gets any)."""
    nncf = importlib.import_module("nncf")
    mode = nncf.CompressWeightsMode.INT4_SYM if job["symmetric"] else nncf.CompressWeightsMode.INT4_ASYM
    if job["bits"] != 4:
        mode = getattr(nncf.CompressWeightsMode, f"INT{job['bits']}_{'SYM' if job['symmetric'] else 'ASYM'}")
    options = dict(job["options"])
    ratio, dataset = options.pop("ratio", 1.0), None
    if "sensitivity_metric" in options:
        options["sensitivity_metric"] = nncf.SensitivityMetric[options["sensitivity_metric"]]
    if options.pop("data", bool(options)):
        feeds = batches(job["calibration"])
        if options.pop("one_by_one", True):
            feeds = samples(feeds)
        dataset = nncf.Dataset(feeds)
        options["subset_size"] = len(feeds)
    gathers = [node.name for node in model.graph.node if node.op_type == "Gather"]
    clock = Clock()
    result = nncf.compress_weights(
        model,
        mode=mode,
        group_size=job["block"],
        ratio=ratio,
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(names=gathers),
        dataset=dataset,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST  # where K is no multiple of the block
        ),
        **options,
    )
    return result, clock.stop()


METHODS: dict[str, Callable[[Job, onnx.ModelProto], Outcome]] = {
    "ort-rtn": ort_rtn,
    "ort-k-quant": ort_k_quant,
    "ort-hqq": ort_hqq,
    "ort-gptq": ort_gptq,
    "nncf": nncf_compress,
}


def prepared(file: str) -> onnx.ModelProto:
    """The model as the peers want it: opset 21, shapes inferred, nodes with names of their own."""
    model = onnx.load(file)
    if any(entry.domain == "" and entry.version < OPSET for entry in model.opset_import):
        model = version_converter.convert_version(model, OPSET)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def work(job: Job) -> Clock:
    """Quantize by the job's method."""
    result, clock = METHODS[job["method"]](job, prepared(job["model"]))
    onnx.save(result, job["result"])
    return clock


if __name__ == "__main__":
    raise SystemExit(answered(work))
