"""The models of the matrix from transformers: tiny configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from matrix_case import Case
from torch import nn

LANGUAGE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def words(*shape: int, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": torch.randint(3, 40, shape), **{name: value() for name, value in more.items()}}


def pixels(size: int, count: int = 2) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(count, 3, size, size)}


def padding() -> torch.Tensor:
    return (torch.arange(6) < torch.tensor([[6], [4]])).long()


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**LANGUAGE, max_position_embeddings=16, num_labels=3))


def vit() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.ViTForImageClassification(hf.ViTConfig(**size, image_size=16, patch_size=8, num_labels=3))


def swin() -> nn.Module:
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.0, num_labels=3
    )
    return hf.SwinForImageClassification(config)


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=3))


RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET, num_labels=3))


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        num_labels=3,
        drop_path_rate=0.0,
    )
    return hf.SegformerForSemanticSegmentation(config)


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(**RESNET, out_features=["stage2"])
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        backbone=None,
        **size,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=3,
    )
    return hf.DetrForObjectDetection(config)


def whisper() -> nn.Module:
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.WhisperConfig(
        vocab_size=40, num_mel_bins=8, **size, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=12, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    size = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
    config = hf.Wav2Vec2Config(**LANGUAGE, **size, num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0)
    return hf.Wav2Vec2ForCTC(config)


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LANGUAGE, num_key_value_heads=1, max_position_embeddings=16))


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(**LANGUAGE, num_key_value_heads=1, max_position_embeddings=16, num_local_experts=2, num_experts_per_tok=1)
    return hf.MixtralForCausalLM(config)


def t5() -> nn.Module:
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**size, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8))


def labels() -> torch.Tensor:
    return torch.tensor([0, 2])


def decoder_words() -> torch.Tensor:
    return torch.randint(3, 40, (2, 5))


CASES = [
    Case("hf_bert", bert, words(2, 6, attention_mask=padding, labels=labels)),
    Case("hf_vit", vit, lambda: {**pixels(16)(), "labels": labels()}),
    Case("hf_swin", swin, pixels(16)),
    Case("hf_convnext", convnext, pixels(32)),
    Case("hf_resnet", resnet, pixels(32)),
    Case("hf_segformer", segformer, pixels(32)),
    Case("hf_detr", detr, pixels(32)),
    Case("hf_whisper", whisper, lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": decoder_words()}),
    Case("hf_wav2vec2", wav2vec2, lambda: {"input_values": torch.randn(2, 200)}),
    Case("hf_gpt2", gpt2, words(2, 6)),
    Case("hf_llama", llama, words(2, 6)),
    Case("hf_mixtral", mixtral, words(2, 6)),
    Case("hf_t5", t5, words(2, 6, attention_mask=padding, decoder_input_ids=decoder_words)),
    Case("hf_clip", clip, lambda: {**words(2, 6)(), **pixels(16)()}),
]
