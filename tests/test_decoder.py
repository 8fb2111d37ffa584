# SPDX-License-Identifier: Apache-2.0
"""Causal language models with a cache compute, step by step, what torch computes of the whole sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="the decoders need the extra 'torch'")
pytest.importorskip("transformers", reason="the decoders need transformers (extra 'minilm')")

import torch
import transformers
from decoders import POSITIONS, VOCABULARY, build, captured, whole

from splitfold.compiler import Tolerance, presets
from splitfold.compiler.decoder import Logits, capture_decoder
from splitfold.compiler.driver import compile
from splitfold.compiler.errors import CaptureError
from splitfold.passes.pipeline import Pipeline
from splitfold.runtime.cache import CacheShape
from splitfold.runtime.errors import GenerationError, SessionError
from splitfold.runtime.feeds import Array
from splitfold.runtime.generation import End, Generator
from splitfold.runtime.sampling import Sampling
from splitfold.runtime.session import Session

STEPS = (5, 1, 1, 2, 1)
PADDING = 3
ROUGH = Tolerance(cosine=0.7)
"""Large random weights lose more than trained ones."""


def step_by_step(model: ir.Model, ids: Array, mask: Array) -> list[Array]:
    """Return the logits of each of `STEPS`."""
    session, cache = Session(model, threads=1), CacheShape.of(model)
    past, done, found = cache.empty(len(ids)), 0, []
    for count in STEPS:
        end = done + count
        outputs = session.run({"input_ids": ids[:, done:end], "attention_mask": mask[:, :end]} | past)
        layout = zip(cache.layout.past, cache.layout.present, strict=True)
        past, done = {name: outputs[made] for name, made in layout}, end
        found.append(outputs["logits"])
    return found


def sequences() -> tuple[Array, Array]:
    """Two sequences, the second one padded on the left."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, sum(STEPS)))
    mask = np.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("mistral", marks=pytest.mark.slow)])
def test_steps_are_the_whole_sequence(name: str) -> None:
    ids, mask = sequences()
    found = np.concatenate(step_by_step(captured(name), ids, mask), axis=1)
    expected = whole(name, ids, mask)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1, PADDING:], expected[1, PADDING:], atol=1e-4)


def test_the_last_logits_alone() -> None:
    ids, mask = sequences()
    expected = whole("opt", ids, mask)
    last = step_by_step(captured("opt", Logits.LAST), ids, mask)
    for logits, end in zip(last, np.cumsum(STEPS), strict=True):
        np.testing.assert_allclose(logits, expected[:, end - 1 : end], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_passes_keep_it(name: str) -> None:
    ids, mask = sequences()
    steps = presets.exact() + Pipeline.parse("fuse-cached-attention{require=all}")
    artifact = compile(captured(name), pipeline=steps, speed=None)
    kinds = [node.op_type for node in artifact.model.graph]
    assert kinds.count("Attention") == len(CacheShape.of(artifact.model).layout.past) // 2
    assert "Softmax" not in kinds
    found = np.concatenate(step_by_step(artifact.model, ids, mask), axis=1)
    expected = whole(name, ids, mask)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1, PADDING:], expected[1, PADDING:], atol=1e-4)


def test_the_preset_for_decoders_is_exact_but_for_its_codes(tmp_path: Path) -> None:
    ids, mask = sequences()
    steps = presets.decoder()
    fused = Pipeline(tuple(step for step in steps.steps if not step.name.startswith("quantize-")))
    artifact = compile(captured("llama"), pipeline=fused, speed=None)
    kinds = [node.op_type for node in artifact.model.graph]
    assert (kinds.count("Attention"), kinds.count("RotaryEmbedding"), kinds.count("RMSNormalization")) == (
        2,
        4,
        5,
    )
    assert kinds.count("MatMul") == 2 * 4 + 1  # queries with keys and values, output, gate with up, down
    assert not {"Softmax", "Transpose", "Pow", "Cos"} & set(kinds[kinds.index("RotaryEmbedding") :])
    found = np.concatenate(step_by_step(artifact.model, ids, mask), axis=1)
    expected = whole("llama", ids, mask)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1, PADDING:], expected[1, PADDING:], atol=1e-4)
    coded = compile(captured("llama"), pipeline=steps, speed=None, tolerance=ROUGH)
    assert [node.op_type for node in coded.model.graph].count("MatMulNBits") == 2 * 4 + 1
    generator = Generator.open(coded.save(tmp_path / "artifact"))
    assert len(generator.generate([1, 5], limit=6).tokens) == 6


def test_names_and_axes_are_told() -> None:
    model = captured("llama")
    assert [value.name for value in model.graph.inputs] == [
        "input_ids", "attention_mask", "past.0.key", "past.0.value", "past.1.key", "past.1.value",
    ]  # fmt: skip
    shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["attention_mask"] == "[batch,past + sequence]"
    assert shapes["past.1.value"] == "[batch,2,past,8]"
    assert shapes["present.1.value"] == "[batch,2,past + sequence,8]"
    assert shapes["logits"] == f"[batch,sequence,{VOCABULARY}]"
    assert "model.embed_tokens.weight" in model.graph.initializers


def test_the_module_stays_as_it_was() -> None:
    module = build("opt")
    captured("opt", Logits.LAST)
    assert module.config._attn_implementation == "sdpa"
    assert not module.training


def test_greedy_text_is_that_of_transformers() -> None:
    prompt = [1, 5, 9, 30]
    with torch.no_grad():
        expected = build("llama").generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found = Generator.open(captured("llama")).generate(prompt, limit=12)
    assert list(found.tokens) == expected[0, len(prompt) :].tolist()
    assert len(set(found.tokens)) > 3  # not one token again and again
    assert found.end is End.LIMIT
    assert (found.prefill.tokens, found.decode.tokens) == (len(prompt), 11)


def test_what_ends_a_text() -> None:
    generator = Generator.open(captured("llama"))
    free = generator.generate([1, 5], limit=8).tokens
    stopped = generator.generate([1, 5], limit=8, stop=[free[3]])
    assert stopped.end is End.STOP
    assert stopped.tokens == free[: free.index(free[3])]
    full = generator.generate([1, 5], limit=100)
    assert full.end is End.POSITIONS
    assert len(full.tokens) + 2 == POSITIONS + 1  # the last one has no position of its own yet
    assert generator.generate([1, 5], limit=0).tokens == ()
    with pytest.raises(GenerationError, match=f"{POSITIONS + 1} tokens, the model knows {POSITIONS}"):
        generator.generate([1] * (POSITIONS + 1), limit=1)
    with pytest.raises(GenerationError, match="prompt is empty"):
        generator.generate([], limit=1)
    with pytest.raises(SessionError, match="failed"):
        generator.generate([VOCABULARY + 5], limit=1)


def test_a_seed_gives_the_same_text_and_streams_it() -> None:
    generator = Generator.open(captured("llama"))

    def text(seed: int) -> tuple[int, ...]:
        return generator.generate([1], limit=10, sampling=Sampling(1.0, 20, seed)).tokens

    assert text(1) == text(1) != text(2)
    assert tuple(generator.stream([1], limit=10, sampling=Sampling(1.0, 20, 1))) == text(1)


def test_int4_weights_head_and_embedding(tmp_path: Path) -> None:
    steps = "quantize-weights{bits=4,block=32},quantize-embeddings{min-bytes=0,bits=4}"
    artifact = compile(captured("llama"), pipeline=steps, speed=None, tolerance=ROUGH)
    kinds = [node.op_type for node in artifact.model.graph]
    assert kinds.count("MatMulNBits") == 2 * 7 + 1
    assert kinds.count("GatherBlockQuantized") == 1
    assert all(item["low_bit"] for item in artifact.manifest["realised"].values())
    assert "model.layers.1.mlp.down_proj" in artifact.manifest["realised"]
    generator = Generator.open(artifact.save(tmp_path / "artifact"))
    assert len(generator.generate([1, 5], limit=6).tokens) == 6


def test_a_tied_embedding_is_held_in_low_precision_twice() -> None:
    steps = "quantize-weights{bits=4,block=32},quantize-embeddings{min-bytes=0}"
    artifact = compile(captured("gpt2"), pipeline=steps, speed=None, tolerance=ROUGH)
    assert artifact.manifest["realised"]["lm_head"]["kernel"] == "MatMulNBits"
    floats = [
        value.name
        for value in artifact.model.graph.initializers.values()
        if value.dtype is ir.DataType.FLOAT and value.shape == ir.Shape([VOCABULARY, 32])
    ]
    assert not floats


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(CaptureError, match="takes no input_ids"):
        capture_decoder(torch.nn.Linear(2, 2).eval())
    with pytest.raises(CaptureError, match="pass a torch module"):
        capture_decoder("model.onnx")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(CaptureError, match="has an encoder"):
        capture_decoder(t5.eval())
    with pytest.raises(CaptureError, match=r"in training mode: call \.eval"):
        capture_decoder(transformers.GPT2LMHeadModel(build("gpt2").config).train())
    with pytest.raises(CaptureError, match=r"is not float32: call \.float"):
        capture_decoder(transformers.GPT2LMHeadModel(build("gpt2").config).half().eval())
