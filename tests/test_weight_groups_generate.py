"""Text from a transformer of Hugging Face with weights in groups: with its cache, token by token, as the same network with rounded weights writes it."""

from __future__ import annotations

import copy

import torch
import transformers as hf
from test_weight_groups import by_pytorch
from torch import nn

from lightning_cco import quantize


def network() -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": None}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_the_tokens_are_those_of_rounded_weights() -> None:
    model, ids = network(), torch.randint(0, 96, (2, 8))
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if (
                weight.dim() > 1 and "wpe" not in name
            ):  # GPT-2's own layers hold their weights as (inputs, outputs); its places are a constant table
                weight.copy_(by_pytorch(weight, 4, 32, 0 if "wte" in name else 1))
    recipe = {
        "global_quantization_settings": {
            "weights_num_bits": 4,
            "weights_group_size": 32,
            "weight_only": True,
            "skip_tail_quantization": False,
        },
        "training_settings": {"weight_estimator": "minmax"},
    }
    quantized = quantize(model, recipe, (), {"input_ids": ids})
    quantized.calibrate([{"input_ids": ids}])
    assert {quantized.plan.decisions[name].weights_group_size for name in quantized.plan.weight_only} == {32}
    assert len(quantized.plan.weight_only) == 10  # embedding, four products a block, head
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **options)
    assert torch.equal(written, expected.generate(ids, **options))
    assert torch.equal(written, model.generate(ids, **options, use_cache=False))
    quantized.remove()
    assert not torch.equal(written, model.generate(ids, **options))
