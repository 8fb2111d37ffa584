# SPDX-License-Identifier: Apache-2.0
"""Bundles: round trip, bytes stored once, generation with both parts, and folders that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from small import mlp, samples
from test_generation import counting

from splitfold.compiler import Artifact, compile
from splitfold.runtime.bundle import DECODE, PREFILL, SHARED_FILE, Bundle
from splitfold.runtime.digest import content_digest
from splitfold.runtime.errors import ArtifactError, GenerationError
from splitfold.runtime.generation import Generator
from splitfold.runtime.model_file import weight_bytes


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    blocks = compile(mlp(), pipeline="canonicalize,quantize-weights{block=16}", speed=None)
    return Bundle({DECODE: blocks, PREFILL: compile(blocks.model, pipeline="widen-blocks", speed=None)})


def largest() -> ir.Model:
    """The most likely token is the largest so far, not the sum."""
    model = counting()
    next(node for node in model.graph if node.op_type == "ReduceSum").op_type = "ReduceMax"
    return model


def plain(model: ir.Model) -> Artifact:
    return Artifact(model, {"target": "cpu"})


def test_round_trip(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.save(tmp_path / "both")
    found = Bundle.load(folder)
    feeds = {"x": samples(5)}
    for name, part in bundle.parts.items():
        assert content_digest(found.parts[name].model) == content_digest(part.model)
        expected = part.session().run(feeds)["y"]
        assert np.array_equal(found.parts[name].session().run(feeds)["y"], expected)
        bare = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert np.array_equal(bare.run(["y"], feeds)[0], expected)
    again = bundle.save(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_equal_bytes_are_stored_once(bundle: Bundle, tmp_path: Path) -> None:
    def stored(parts: dict[str, Artifact]) -> int:
        return (Bundle(parts).save(tmp_path / "-".join(parts)) / SHARED_FILE).stat().st_size

    decode, prefill = (bundle.parts[name] for name in (DECODE, PREFILL))
    alone, both = stored({DECODE: decode}), stored({DECODE: decode, PREFILL: prefill})
    assert weight_bytes(prefill.model) > 0.8 * weight_bytes(decode.model)  # what is stored is not nothing
    assert both < 1.3 * alone
    assert stored({DECODE: decode, "twin": decode}) == alone


def test_a_prompt_goes_to_the_prefill(tmp_path: Path) -> None:
    both = Bundle({DECODE: plain(counting()), PREFILL: plain(largest())})
    for opened in (both, both.save(tmp_path / "both"), str(tmp_path / "both")):
        assert Generator.open(opened).generate([1, 2], limit=3).tokens == (2, 5, 10)  # then sums
    alone = Bundle({DECODE: plain(counting())})
    assert Generator.open(alone).generate([1, 2], limit=2).tokens == (3, 6)
    with pytest.raises(GenerationError, match="no part 'decode': other"):
        Generator.open(Bundle({"other": plain(counting())}))


def test_folders_that_are_no_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = bundle.save(tmp_path / "both")
    with pytest.raises(ArtifactError, match=r"several artifacts \(decode, prefill\): Bundle.load"):
        Artifact.load(folder)
    with pytest.raises(ArtifactError, match="is no bundle"):
        Bundle.load(bundle.parts[DECODE].save(tmp_path / "one"))
    with pytest.raises(ArtifactError, match="not empty"):
        bundle.save(folder)
    with (folder / SHARED_FILE).open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(ArtifactError, match="not the file that was verified"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a part"):
        Bundle({name: plain(counting())})
    with pytest.raises(ValueError, match="at least one part"):
        Bundle({})
