# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's OpenVINO provider: found, registered, and told what to compute in.

It comes in two packages. `onnxruntime-ep-openvino` is a plug-in beside plain onnxruntime, whose library is
registered once a process; its release 1.8 takes Intel's processors alone. `onnxruntime-openvino` is a build
of onnxruntime with the provider inside; it is used where it is installed in onnxruntime's place.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

import onnxruntime as ort

from splitfold.runtime.errors import ProviderError
from splitfold.runtime.target import OPENVINO_PROVIDER, Arithmetic

__all__ = ["PACKAGE", "add_openvino", "why_no_openvino"]

PACKAGE = "onnxruntime-ep-openvino"
"""Distribution of the plug-in; the extra `openvino` installs it."""
_MODULE = "onnxruntime_ep_openvino"
_REGISTERED_AS = "splitfold-openvino"
_DEVICE = "CPU"
_BUILD = "onnxruntime-openvino"
_BUILT_IN = OPENVINO_PROVIDER in ort.get_available_providers()
"""Asked before the plug-in is registered, which the runtime lists from then on, with a device or without."""


def add_openvino(options: ort.SessionOptions, arithmetic: Arithmetic, threads: int) -> list[Any] | None:
    """Let sessions that are opened with `options` run on OpenVINO's CPU device, and return what they name as
    `providers`: nothing where `options` hold the plug-in, which even an empty list would replace.

    Its precision and threads are read from `load_config` alone (1.8.1 ignores the session's threads, and
    warns that it ignores its options `precision` and `num_of_threads`). Its own default computes in bfloat16
    where the processor can, so that the precision is always written.

    Args:
        options: of the session; changed.
        arithmetic: what float operators compute in.
        threads: 0 is the provider's choice.

    Raises:
        ProviderError: it is not installed, or has no device here.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": arithmetic.value}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    configuration = {"load_config": json.dumps({_DEVICE: settings})}
    device = _device()
    if device is None:
        return [(OPENVINO_PROVIDER, {"device_type": _DEVICE, **configuration})]
    options.add_provider_for_devices([device], configuration)
    return None


def why_no_openvino() -> str:
    """Return why OpenVINO cannot be used here, or an empty text."""
    try:
        _device()
    except ProviderError as error:
        return str(error)
    return ""


def _device() -> Any:
    """Return the plug-in's CPU device; None where the provider is built in instead.

    Raises:
        ProviderError: there is none.
    """
    found = _devices()
    if not found and _BUILT_IN:
        return None
    if not found:
        _register()
        found = _devices()
    if not found:
        from splitfold.runtime.costs.machine import processor_name  # it asks the session for the version

        raise ProviderError(
            f"{PACKAGE} is installed, but offers no CPU device on this processor ({processor_name()}): "
            "release 1.8 takes Intel's only. Choose the target cpu, or openvino-or-cpu, which falls back to "
            f"it; {_BUILD}, installed in the place of onnxruntime, takes other processors too."
        )
    return found[0]


def _devices() -> list[Any]:
    """Return OpenVINO's CPU devices; a library that the user registered counts too."""
    return [
        device
        for device in ort.get_ep_devices()
        if device.ep_name == OPENVINO_PROVIDER and device.ep_metadata.get("ov_device") == _DEVICE
    ]


@functools.cache
def _register() -> None:
    """Load the plug-in's library into ONNX Runtime, which takes it once a process.

    Raises:
        ProviderError: the package is not installed, or its library cannot be loaded.
    """
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime's OpenVINO provider is not installed ({PACKAGE}; wheels for Linux and Windows on "
            'x86-64): pip install "splitfold[openvino]". The target openvino-or-cpu falls back to the CPU '
            "provider where it lacks."
        ) from error
    try:
        ort.register_execution_provider_library(_REGISTERED_AS, module.get_library_path())
    except Exception as error:
        raise ProviderError(
            f"the library of {PACKAGE} does not fit onnxruntime {ort.__version__}: {error}"
        ) from error
