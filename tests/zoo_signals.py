# SPDX-License-Identifier: Apache-2.0
"""The zoo's image and audio models, and the text and image towers of CLIP and its like."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from zoo_base import BATCH, Architecture, DynamicShapes, Inputs, Recipe, architecture
from zoo_text import ENCODER, SEQ2SEQ, TOKENS, Settings, draw_tokens

BATCH_AXIS = {0: torch.export.Dim.DYNAMIC}
IMAGES: DynamicShapes = {"pixel_values": BATCH_AXIS}
WAVES: DynamicShapes = {"input_values": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
SAMPLES = 6400

VIT: Settings = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: Settings = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
PYRAMID: Settings = {
    "image_size": 64,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [4, 2],
    "hidden_sizes": [32, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
POOLFORMER: Settings = PYRAMID | {"padding": [2, 1], "mlp_ratio": 2.0}
FOCALNET: Settings = {
    "image_size": 64,
    "embed_dim": 32,
    "depths": [1, 1],
    "hidden_sizes": [32, 64],
    "focal_levels": [2, 2],
    "focal_windows": [3, 3],
}
LEVIT: Settings = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [16, 16, 16],
    "down_ops": [["Subsample", 16, 2, 4, 2, 2], ["Subsample", 16, 3, 4, 2, 2]],
}
MOBILEVIT: Settings = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 64],
    "intermediate_size": 64,
}
SWIFTFORMER: Settings = {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 64]}
BASIC: Settings = {"embedding_size": 32, "hidden_sizes": [32, 64, 96], "depths": [1, 1, 1]}
BOTTLENECK: Settings = {"embedding_size": 32, "hidden_sizes": [64, 96, 128], "depths": [1, 1, 1]}
CONVNEXT: Settings = {"hidden_sizes": [32, 64, 96], "depths": [1, 1, 1], "num_stages": 3}
EFFICIENTNET: Settings = {
    "width_coefficient": 0.5,
    "image_size": 64,
    "hidden_dim": 640,
    "in_channels": [32, 16, 24, 40],
    "out_channels": [16, 24, 40, 64],
    "kernel_sizes": [3, 3, 5, 3],
    "strides": [1, 2, 2, 2],
    "num_block_repeats": [1, 1, 2, 1],
    "expand_ratios": [1, 4, 4, 4],
    "depthwise_padding": [],
}
SPEECH: Settings = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
WHISPER: Settings = SEQ2SEQ | {"num_mel_bins": 32, "max_source_positions": 32, "max_target_positions": 32}
AST: Settings = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "patch_size": 8,
    "num_mel_bins": 32,
    "max_length": 64,
    "frequency_stride": 8,
    "time_stride": 8,
}
MOONSHINE: Settings = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "vocab_size": 64,
    "use_cache": False,
}


def _smooth(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Random planes of spread 1 that, like images and spectrograms, are mostly of low frequency."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(BATCH, channels, height // 16, width // 16, generator=generator)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    planes = smooth + 0.5 * torch.randn(BATCH, channels, height, width, generator=generator)
    return planes / planes.std()


def draw_images(seed: int) -> Inputs:
    return {"pixel_values": _smooth(seed, 3, 64, 64)}


def draw_small_images(seed: int) -> Inputs:
    return {"pixel_values": _smooth(seed, 3, 32, 32)}


def draw_spectrograms(seed: int) -> Inputs:
    return {"input_features": _smooth(seed, 1, 32, 64)[:, 0]}


def draw_frames(seed: int) -> Inputs:
    return {"input_values": _smooth(seed, 1, 64, 32)[:, 0]}


def draw_waves(seed: int) -> Inputs:
    """Four tones in noise at 16 kHz, of a loudness between 0.1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    tones = 100.0 + 3000.0 * torch.rand(BATCH, 4, 1, generator=generator)
    loudness = 0.1 + 0.9 * torch.rand(BATCH, 1, generator=generator)
    wave = torch.sin(2.0 * torch.pi * tones * torch.arange(SAMPLES) / 16000.0).sum(1)
    wave = wave + torch.randn(BATCH, SAMPLES, generator=generator)
    return {"input_values": loudness * wave / wave.std()}


def _image(
    family: str,
    name: str,
    model: str,
    settings: Settings,
    head: str = "Model",
    lift: float = 0.0,
    **changes: Any,
) -> Architecture:
    changes = changes if head == "Model" else changes | {"num_labels": 10}
    output = "last_hidden_state" if head == "Model" else "logits"
    recipe = Recipe(model + head, model + "Config", settings | changes, output, lift=lift)
    draw = draw_small_images if settings is VIT else draw_images
    return architecture(name, family, recipe, draw, IMAGES)


_vit = partial(_image, "vit")
_cnn = partial(_image, "cnn")


def _speech(name: str, model: str, head: str = "Model", **changes: Any) -> Architecture:
    output = "last_hidden_state" if head == "Model" else "logits"
    recipe = Recipe(model + head, model + "Config", SPEECH | changes, output)
    return architecture(name, "audio", recipe, draw_waves, WAVES)


def _tower(name: str, model: str, output: str = "last_hidden_state", **changes: Any) -> Architecture:
    text = "Text" in model
    recipe = Recipe(
        model, model.partition("Model")[0] + "Config", (ENCODER if text else VIT) | changes, output
    )
    return architecture(
        name, "clip", recipe, draw_tokens if text else draw_small_images, TOKENS if text else IMAGES
    )


VITS = (
    _vit("vit", "ViT", VIT),
    _vit("vit-classifier", "ViT", VIT, "ForImageClassification"),
    _vit("deit", "DeiT", VIT),
    _vit("beit", "Beit", VIT, use_relative_position_bias=True),
    _vit("dinov2", "Dinov2", VIT),
    _vit("dinov3", "DINOv3ViT", VIT, num_register_tokens=4),
    _vit("yolos", "Yolos", VIT, image_size=[32, 32], num_detection_tokens=10),
    _vit("swin", "Swin", SWIN),
    _vit("swinv2", "Swinv2", SWIN),
    _vit("segformer", "Segformer", PYRAMID, "ForSemanticSegmentation", decoder_hidden_size=64),
    _vit("pvt-v2", "PvtV2", PYRAMID),
    _vit("poolformer", "PoolFormer", POOLFORMER),
    _vit("focalnet", "FocalNet", FOCALNET),
    _vit("levit", "Levit", LEVIT, "ForImageClassification"),
    _vit("mobilevit", "MobileViT", MOBILEVIT),
    _vit("swiftformer", "SwiftFormer", SWIFTFORMER),
)
CNNS = (
    _cnn("resnet-basic", "ResNet", BASIC, layer_type="basic"),
    _cnn("resnet", "ResNet", BOTTLENECK, "ForImageClassification"),
    _cnn("convnext", "ConvNext", CONVNEXT),
    _cnn("convnextv2", "ConvNextV2", CONVNEXT, "ForImageClassification"),
    _cnn("mobilenet-v1", "MobileNetV1", {"depth_multiplier": 0.25}, lift=1.0),
    _cnn("mobilenet-v2", "MobileNetV2", {"depth_multiplier": 0.35}, lift=1.0),
    _cnn("efficientnet", "EfficientNet", EFFICIENTNET),
    _cnn("regnet-x", "RegNet", BASIC, "ForImageClassification", groups_width=16, layer_type="x"),
    _cnn("regnet-y", "RegNet", BASIC, groups_width=16, layer_type="y"),
)
AUDIO = (
    _speech("wav2vec2", "Wav2Vec2"),
    _speech("wav2vec2-ctc", "Wav2Vec2", "ForCTC", do_stable_layer_norm=True, feat_extract_norm="layer"),
    _speech("hubert", "Hubert"),
    _speech("wavlm", "WavLM"),
    _speech("sew", "SEW"),
    architecture(
        "whisper-encoder",
        "audio",
        Recipe("WhisperModel", "WhisperConfig", WHISPER, part="encoder"),
        draw_spectrograms,
        {"input_features": BATCH_AXIS},
    ),
    architecture(
        "ast", "audio", Recipe("ASTModel", "ASTConfig", AST), draw_frames, {"input_values": BATCH_AXIS}
    ),
    architecture(
        "moonshine-encoder",
        "audio",
        Recipe("MoonshineModel", "MoonshineConfig", MOONSHINE, part="encoder"),
        draw_waves,
        {"input_values": BATCH_AXIS},
    ),
)
TOWERS = (
    _tower("clip-text", "CLIPTextModel"),
    _tower("clip-vision", "CLIPVisionModel"),
    _tower("clip-text-projection", "CLIPTextModelWithProjection", "text_embeds", projection_dim=48),
    _tower("clip-vision-projection", "CLIPVisionModelWithProjection", "image_embeds", projection_dim=48),
    _tower("siglip-text", "SiglipTextModel"),
    _tower("siglip-vision", "SiglipVisionModel"),
)
