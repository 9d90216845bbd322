"""Tiny teachers, built from configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

TOKENIZER_SIZE = 290
PADDED_SIZE = 304
END_OF_TEXT = "<|endoftext|>"
TEXT = "def read(path):\n    with open(path) as stream:\n        return stream.read()\n" * 20

_SIZE = {
    "vocab_size": PADDED_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2_SIZE = {"vocab_size": PADDED_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZE),
    "qwen3": lambda: Qwen3Config(**_SIZE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_SIZE, head_dim=8, final_logit_softcapping=5.0, sliding_window=16),
    "cohere": lambda: CohereConfig(**_SIZE, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**_SIZE, logits_scaling=4.0),
    "gpt2": lambda: GPT2Config(**_GPT2_SIZE, initializer_range=0.5, bos_token_id=0, eos_token_id=0),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in _SIZE.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=PADDED_SIZE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    ),
}


def save_model(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family with the weights that a seed gives, and a tokenizer, below `folder`."""
    config = CONFIGS[family]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.to(dtype).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def train_tokenizer(size: int = TOKENIZER_SIZE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT, "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore"],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
