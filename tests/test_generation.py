# SPDX-License-Identifier: Apache-2.0
"""Generation without torch: how tokens are drawn, which models can generate, and what their cache is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitfold.runtime.cache import CacheLayout, CacheShape
from splitfold.runtime.errors import GenerationError
from splitfold.runtime.feeds import synthetic_feeds
from splitfold.runtime.generation import Generator
from splitfold.runtime.sampling import Sampler, Sampling

LOGITS = np.array([0.5, 2.0, -1.0, 2.0, 0.0], np.float32)


def counting(past: str = "past", inputs: str = "", heads: str = "1") -> ir.Model:
    """A model whose cache holds the tokens themselves and whose most likely token is their sum."""
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["": 21]>
        m (int64[b, s] input_ids, float[b, {heads}, p, 1] past_key, float[b, 1, p, 1] past_value{inputs})
        => (float[b, 1, 16] logits, float[b, 1, t, 1] key, float[b, 1, t, 1] value)
        <int64[1] two = {{2}}, int64[1] last = {{3}}, int64[1] ones = {{1}}, int64 depth = {{16}},
         float[2] off_on = {{0, 1}}>
        {{
            real = Cast<to: int = 1>(input_ids)
            deep = Unsqueeze(real, ones)
            new = Unsqueeze(deep, last)
            key = Concat<axis: int = 2>(past_key, new)
            value = Concat<axis: int = 2>(past_value, new)
            axes = Concat<axis: int = 0>(ones, two, last)
            sum = ReduceSum<keepdims: int = 0>(key, axes)
            column = Unsqueeze(sum, ones)
            row = Cast<to: int = 7>(column)
            logits = OneHot(row, depth, off_on)
        }}
    """)
    for value, name in zip(model.graph.inputs[1:3], ("key", "value"), strict=True):
        value.name = f"{past}.0.{name}"
    for value in model.graph.outputs[1:]:
        value.name = f"present.0.{value.name}"
    return model


@pytest.mark.parametrize("past", ["past", "past_key_values"])
def test_the_cache_grows_by_what_was_generated(past: str) -> None:
    found = Generator.open(counting(past)).generate([1, 2], limit=3)
    assert found.tokens == (3, 6, 12)  # 1 + 2, 1 + 2 + 3, 1 + 2 + 3 + 6


def test_a_prompt_goes_to_the_session_for_prompts() -> None:
    def largest() -> ir.Model:
        model = counting()
        node = next(node for node in model.graph if node.op_type == "ReduceSum")
        node.op_type = "ReduceMax"
        return model

    found = Generator.open(counting(), prefill=largest()).generate([1, 2], limit=3)
    assert found.tokens == (2, 5, 10)  # the largest of 1 and 2, then sums
    other = counting(inputs=", int64[b, t] attention_mask")
    with pytest.raises(GenerationError, match="'attention_mask' is known to one of model and prefill only"):
        Generator.open(counting(), prefill=other)


def test_positions_are_fed_where_the_model_asks_for_them() -> None:
    model = counting(inputs=", int64[b, s] position_ids, int64[b, t] attention_mask")
    assert Generator.open(model).generate([1, 2], limit=2).tokens == (3, 6)


def test_sums_of_sizes_have_synthetic_feeds() -> None:
    model = counting(inputs=", int64[b, t] attention_mask")
    model.graph.inputs[3].shape = ir.Shape(["b", "p + s"])
    feeds = synthetic_feeds(model, size=5)
    assert feeds["attention_mask"].shape == (2, 10)
    assert feeds["past.0.key"].shape == (2, 1, 5, 1)


def test_models_that_cannot_generate_say_why() -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> m (int64[b, s] ids) => (int64[b, s] y) { y = Neg(ids) }'
    with pytest.raises(
        GenerationError, match=r"has no cache: none of its inputs \(ids\) is called past\.0\.key"
    ):
        Generator.open(ir.from_onnx_text(text))
    with pytest.raises(GenerationError, match="what to feed to input 'images'"):
        Generator.open(counting(inputs=", float[b] images"))
    with pytest.raises(GenerationError, match=r"shape \[b,h,p,1\]: a cache is \[batch, heads"):
        Generator.open(counting(heads="h"))
    model = counting()
    model.graph.outputs.pop(2)
    with pytest.raises(GenerationError, match=r"'present\.0\.value' is missing"):
        CacheLayout.find(model)
    model = counting()
    model.graph.outputs[0].name = "scores"
    with pytest.raises(GenerationError, match="has no 'logits'"):
        Generator.open(model)


def test_an_empty_cache_has_the_models_sizes() -> None:
    shape = CacheShape.of(counting())
    assert shape.layout == CacheLayout.standard(1)
    assert {name: array.shape for name, array in shape.empty(3).items()} == {
        "past.0.key": (3, 1, 0, 1),
        "past.0.value": (3, 1, 0, 1),
    }


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == 1


@pytest.mark.parametrize(
    ("top_k", "kept"), [(0, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3, 4])]
)
def test_draws_follow_the_softmax_of_the_top_k(top_k: int, kept: list[int]) -> None:
    sampler = Sampler(Sampling(temperature=0.7, top_k=top_k, seed=3))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS[kept].astype(np.float64) / 0.7)
    np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.03)
    assert not counts[expected == 0].any()


def test_sampling_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="temperature is -1"):
        Sampling(-1)
    with pytest.raises(ValueError, match="top_k is -2"):
        Sampling(1, -2)
