# SPDX-License-Identifier: Apache-2.0
"""The zoo's text models: encoders, decoders and encoder-decoders over a vocabulary of 500."""

from __future__ import annotations

from typing import Any

import torch
from zoo_base import BATCH, Architecture, DynamicShapes, Inputs, Recipe, architecture

VOCABULARY = 500
LENGTH = 20
TOKENS: DynamicShapes = {
    "input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
    "attention_mask": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
}
TOKENS_AND_TARGETS: DynamicShapes = TOKENS | {
    "decoder_input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER = ENCODER | {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2, "head_dim": 16}
SEQ2SEQ = {
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
T5 = {
    "attn_implementation": "eager",
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
}


def draw_tokens(seed: int) -> Inputs:
    """Random tokens, each row after the first padded at its end with token 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(14, LENGTH, (BATCH, 1), generator=generator)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def draw_tokens_and_targets(seed: int) -> Inputs:
    """The inputs of an encoder-decoder: `draw_tokens` and a shorter row of tokens to decode."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    targets = torch.randint(3, VOCABULARY, (BATCH, 12), generator=generator)
    return draw_tokens(seed) | {"decoder_input_ids": targets}


def _encoder(name: str, model: str, head: str = "Model", **changes: Any) -> Architecture:
    output = "last_hidden_state" if head == "Model" else "logits"
    recipe = Recipe(model + head, model + "Config", ENCODER | changes, output)
    return architecture(name, "encoder", recipe, draw_tokens, TOKENS)


def _decoder(name: str, model: str, head: str = "ForCausalLM", gains=None, **changes: Any) -> Architecture:
    output = "last_hidden_state" if head == "Model" else "logits"
    recipe = Recipe(model + head, model + "Config", DECODER | changes, output, gains=gains or {})
    return architecture(name, "decoder", recipe, draw_tokens, TOKENS)


def _seq2seq(name: str, model: str, settings, part: str = "", gains=None) -> Architecture:
    draw, shapes = (draw_tokens, TOKENS) if part or "Encoder" in model else (draw_tokens_and_targets, TOKENS_AND_TARGETS)
    config = model.removesuffix("EncoderModel").removesuffix("Model").removesuffix("ForConditionalGeneration") + "Config"
    recipe = Recipe(model, config, settings, "logits" if "For" in model else "last_hidden_state", part, gains or {})
    return architecture(name, "seq2seq", recipe, draw, shapes)

ENCODERS = (
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta"),
    _encoder("xlm-roberta", "XLMRoberta", "ForTokenClassification", num_labels=10),
    _encoder("distilbert", "DistilBert", "ForSequenceClassification", num_labels=10),
    _encoder("albert", "Albert", embedding_size=32),
    _encoder("electra", "Electra", embedding_size=32),
    _encoder("deberta-v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"],
             position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False),
    _encoder("mpnet", "MPNet"),
    _encoder("mobilebert", "MobileBert", embedding_size=32, intra_bottleneck_size=32),
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
    _decoder("mistral", "Mistral", sliding_window=8, **GROUPED),
    _decoder("qwen2", "Qwen2", num_key_value_heads=2),
    _decoder("qwen3", "Qwen3", **GROUPED),
    _decoder("gemma", "Gemma", num_key_value_heads=1, head_dim=16),
    _decoder("gemma2", "Gemma2", sliding_window=8, **GROUPED),
    _decoder("gemma3", "Gemma3Text", "Model", sliding_window=8, **GROUPED),
    _decoder("phi", "Phi"),
    _decoder("phi3", "Phi3", num_key_value_heads=2),
    _decoder("gpt-neox", "GPTNeoX"),
    _decoder("gpt-neo", "GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
    _decoder("gptj", "GPTJ", rotary_dim=8),
    _decoder("codegen", "CodeGen", rotary_dim=8),
    _decoder("gpt-bigcode", "GPTBigCode"),
    _decoder("bloom", "Bloom"),
    _decoder("falcon", "Falcon"),
    _decoder("mpt", "Mpt"),
    _decoder("stablelm", "StableLm", num_key_value_heads=2),
    _decoder("cohere", "Cohere", num_key_value_heads=2),
    _decoder("olmo2", "Olmo2", num_key_value_heads=2),
    _decoder("granite", "Granite", num_key_value_heads=2),
    _decoder("starcoder2", "Starcoder2", num_key_value_heads=2),
    _decoder("biogpt", "BioGpt"),
    _decoder("xglm", "XGLM", d_model=64,num_layers=2,attention_heads=4,ffn_dim=128),
    _decoder("glm", "Glm", num_key_value_heads=2,head_dim=16),
    _decoder("nemotron", "Nemotron", num_key_value_heads=2),
    _decoder("mamba", "Mamba"),
    _decoder("mixtral", "Mixtral", num_key_value_heads=2, num_local_experts=4),
)
SEQ2SEQS = (
    _seq2seq("t5-encoder", "T5EncoderModel", T5, gains={".q": 0.25}),
    _seq2seq("mt5-encoder", "MT5EncoderModel", T5, gains={".q": 0.25}),
    _seq2seq("t5", "T5ForConditionalGeneration", T5 | {"use_cache": False,"decoder_start_token_id":0}, gains={".q": 0.25}),
    _seq2seq("bart-encoder", "BartModel", SEQ2SEQ, "encoder"),
    _seq2seq("bart", "BartModel", SEQ2SEQ),
    _seq2seq("mbart-encoder", "MBartModel", SEQ2SEQ,  "encoder"),
    _seq2seq("pegasus-encoder", "PegasusModel", SEQ2SEQ,  "encoder"),
    _seq2seq("marian", "MarianModel", SEQ2SEQ),
    _seq2seq("m2m100-encoder", "M2M100Model", SEQ2SEQ,  "encoder"),
)
