# SPDX-License-Identifier: Apache-2.0
"""The zoo's text models: encoders, decoders and encoder-decoders over a vocabulary of 500."""

from __future__ import annotations

from typing import Any

import torch
from zoo_base import BATCH, Architecture, DynamicShapes, Inputs, Recipe, architecture

VOCABULARY = 500
LENGTH = 20
TOKEN_AXES = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
TOKENS: DynamicShapes = {"input_ids": TOKEN_AXES, "attention_mask": TOKEN_AXES}
PAIRS: DynamicShapes = TOKENS | {"decoder_input_ids": TOKEN_AXES}
Settings = dict[str, Any]

ENCODER: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: Settings = ENCODER | {"use_cache": False}
SEQ2SEQ: Settings = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "use_cache": False,
}
T5: Settings = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
DEBERTA_V2: Settings = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
GROUPED: Settings = {"num_key_value_heads": 2, "head_dim": 16}
LOCAL: Settings = {"sliding_window": 8}
UNSCALED_T5 = {".q": 0.25}
UNSCALED_NEO = {"q_proj": 0.25}


def draw_tokens(seed: int) -> Inputs:
    """Random tokens, every row but the first padded at its end with token 0.

    The padding is shorter than the local attention windows, lest a row has nothing to attend to.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH - 6, LENGTH, (BATCH, 1), generator=generator)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def draw_pairs(seed: int) -> Inputs:
    """`draw_tokens` to encode, and shorter rows of tokens to decode."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    targets = torch.randint(3, VOCABULARY, (BATCH, 12), generator=generator)
    return draw_tokens(seed) | {"decoder_input_ids": targets}


def _output(head: str) -> str:
    return "last_hidden_state" if head in ("Model", "EncoderModel") else "logits"


def _encoder(
    name: str, model: str, head: str = "Model", gains: dict[str, float] | None = None, **changes: Any
) -> Architecture:
    recipe = Recipe(model + head, model + "Config", ENCODER | changes, _output(head), gains=gains or {})
    return architecture(name, "encoder", recipe, draw_tokens, TOKENS)


def _decoder(
    name: str, model: str, head: str = "ForCausalLM", gains: dict[str, float] | None = None, **changes: Any
) -> Architecture:
    recipe = Recipe(model + head, model + "Config", DECODER | changes, _output(head), gains=gains or {})
    return architecture(name, "decoder", recipe, draw_tokens, TOKENS)


def _t5(name: str, model: str, head: str) -> Architecture:
    recipe = Recipe(model + head, model + "Config", T5, _output(head), gains=UNSCALED_T5)
    pairs = head != "EncoderModel"
    return architecture(
        name, "seq2seq", recipe, draw_pairs if pairs else draw_tokens, PAIRS if pairs else TOKENS
    )


def _bart(name: str, model: str, part: str = "") -> Architecture:
    recipe = Recipe(model + "Model", model + "Config", SEQ2SEQ, part=part)
    return architecture(
        name, "seq2seq", recipe, draw_tokens if part else draw_pairs, TOKENS if part else PAIRS
    )


ENCODERS = (
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta"),
    _encoder("xlm-roberta", "XLMRoberta", "ForTokenClassification", num_labels=10),
    _encoder(
        "distilbert",
        "DistilBert",
        "ForSequenceClassification",
        num_labels=10,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
    ),
    _encoder("albert", "Albert", embedding_size=32),
    _encoder("electra", "Electra", embedding_size=32),
    _encoder("deberta-v2", "DebertaV2", **DEBERTA_V2),
    _encoder("mpnet", "MPNet"),
    _encoder("mobilebert", "MobileBert", gains={"": 0.6}, embedding_size=32, intra_bottleneck_size=32),
    _encoder("modernbert", "ModernBert", local_attention=16),
    _encoder("squeezebert", "SqueezeBert", embedding_size=64),
    _encoder("roformer", "RoFormer"),
    _encoder("convbert", "ConvBert", embedding_size=64),
    _encoder("megatron-bert", "MegatronBert", "ForMaskedLM"),
    _encoder("nomic-bert", "NomicBert"),
    _encoder("esm", "Esm"),
    _encoder("rembert", "RemBert"),
)
DECODERS = (
    _decoder("gpt2", "GPT2", "LMHeadModel"),
    _decoder("opt", "OPT", ffn_dim=128, word_embed_proj_dim=64),
    _decoder("llama", "Llama", **GROUPED),
    _decoder("mistral", "Mistral", **GROUPED, **LOCAL),
    _decoder("qwen2", "Qwen2", num_key_value_heads=2),
    _decoder("qwen3", "Qwen3", **GROUPED),
    _decoder("gemma", "Gemma", num_key_value_heads=1, head_dim=16),
    _decoder("gemma2", "Gemma2", **GROUPED, **LOCAL),
    _decoder("gemma3", "Gemma3Text", "Model", **GROUPED, **LOCAL),
    _decoder("phi", "Phi"),
    _decoder("phi3", "Phi3", num_key_value_heads=2),
    _decoder("gpt-neox", "GPTNeoX"),
    _decoder(
        "gpt-neo", "GPTNeo", gains=UNSCALED_NEO, attention_types=[[["global", "local"], 1]], window_size=8
    ),
    _decoder("gptj", "GPTJ", rotary_dim=8),
    _decoder("gpt-bigcode", "GPTBigCode"),
    _decoder("bloom", "Bloom"),
    _decoder("falcon", "Falcon"),
    _decoder("mpt", "Mpt"),
    _decoder("cohere", "Cohere", num_key_value_heads=2),
    _decoder("olmo2", "Olmo2", num_key_value_heads=2),
    _decoder("granite", "Granite", num_key_value_heads=2, attention_multiplier=0.25),
    _decoder("starcoder2", "Starcoder2", num_key_value_heads=2),
    _decoder("glm", "Glm", **GROUPED),
)
SEQ2SEQS = (
    _t5("t5-encoder", "T5", "EncoderModel"),
    _t5("mt5-encoder", "MT5", "EncoderModel"),
    _t5("t5", "T5", "ForConditionalGeneration"),
    _bart("bart", "Bart"),
    _bart("bart-encoder", "Bart", "encoder"),
    _bart("mbart-encoder", "MBart", "encoder"),
    _bart("m2m100-encoder", "M2M100", "encoder"),
    _bart("marian", "Marian"),
)
