"""Tiny random models and calibration sequences for tests of either side."""

import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 128}
"""Changes of the shape that group sizes 64 and 128 divide."""

MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": MOE,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
    "lfm2_moe": MOE
    | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "conv_L_cache": 3},
    "deepseek_v3": MOE
    | {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "qwen3_next": MOE
    | {
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "falcon": {"head_dim": None, "num_kv_heads": 4},
    "gpt2": {},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "use_mamba_kernels": False,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "global_head_dim": 16,
    },
    "llama4_text": MOE
    | {
        "num_local_experts": 4,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
    },
}


IMAGES = {
    "image_processor_type": "Gemma3ImageProcessor",
    "processor_class": "Gemma3Processor",
    "size": {"height": 28, "width": 28},
}


def tiny_config(family: str, **changes):
    """Configuration of a two-layer model of one family, 64 wide, with ``changes`` of its shape."""
    shape = SHAPE | FAMILIES[family] | changes
    if "layer_types" in shape:
        shape["layer_types"] = shape["layer_types"][: shape["num_hidden_layers"]]
    return AutoConfig.for_model(family, **{k: v for k, v in shape.items() if v is not None})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character; ids 0 to 7 are special."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<4>", "<image>", "<boi>", "<eoi>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
        },
    )


def save_tiny_model(family: str, folder, seed: int = 0, **changes):
    """Write a random float32 model of ``family`` (also ``gemma3``, multimodal) to ``folder``.

    ``changes`` are of the configuration, such as ``**WIDE`` or ``tie_word_embeddings=True``.
    """
    torch.manual_seed(seed)
    if family == "gemma3":
        config = AutoConfig.for_model(
            "gemma3",
            text_config=tiny_config("gemma3_text", **changes).to_dict(),
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if family == "gemma3":
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return folder


def random_text(documents: int = 24, length: int = 80, seed: int = 0) -> list[str]:
    """Documents of ``length`` random printable characters: so many tokens each."""
    generator = random.Random(seed)
    alphabet = string.ascii_letters + string.digits
    return ["".join(generator.choices(alphabet, k=length)) for _ in range(documents)]


def random_sequences(lengths, seed: int = 0):
    """One 1-D tensor of token ids per length; no padding or special ids in them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, VOCABULARY, (length,), generator=generator) for length in lengths]


def batches(sequences, batch_size: int = 1, side: str = "right"):
    """Batches of ``batch_size`` with padding inside the batch only, in order."""
    result = []
    for start in range(0, len(sequences), batch_size):
        chunk = sequences[start : start + batch_size]
        width = max(len(sequence) for sequence in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(chunk):
            place = (
                slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), None)
            )
            ids[row, place], mask[row, place] = sequence, 1
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def loader(sequences, batch_size: int = 1, side: str = "right"):
    """What ``oneshot(dataset=...)`` takes: a DataLoader over ready batches, in order."""
    return torch.utils.data.DataLoader(
        batches(sequences, batch_size, side), batch_size=None, shuffle=False
    )
