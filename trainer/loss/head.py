"""The last layer of a language model, as the tensors that its logits are made of.

    raw    = hidden weight^T + bias + sum of factor * dropout(hidden) down^T up^T over the low-rank adapters
    logits = soft_cap * tanh(scale * raw / soft_cap), cut to the first vocab_size columns

Nothing here needs transformers or peft: their modules and configs are known by their attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from logitstore.errors import ConfigError

# Where configs of transformers keep a factor of the logits: Cohere, Falcon-H1. Granite keeps a divisor, and
# HyperCLOVA X a factor, under one name.
_FACTOR_NAMES = ("logit_scale", "lm_head_multiplier")
_DIVISOR_OR_FACTOR_NAME = "logits_scaling"
_MODEL_TYPES_THAT_MULTIPLY = ("hyperclovax",)


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankTerm:
    """An adapter beside the head: factor * dropout(hidden) down^T up^T.

    Attributes:
        down: [R, D] float, peft's lora_A.
        up: [V', R] float, peft's lora_B.
        factor: peft's scaling.
        dropout: a module applied to the hidden states; None where there is none.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float = 1.0
    dropout: torch.nn.Module | None = None

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, R]: what `up` is multiplied by; differentiable in `hidden` and `down`."""
        hidden = hidden.to(self.down.dtype)
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        return torch.nn.functional.linear(hidden, self.down) * self.factor


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearHead:
    """A linear map from hidden states to logits, with all that models put on top of it.

    Attributes:
        weight: [V', D] float; may be the embedding's own (tied), to which the gradient is then added.
        bias: [V'] float or None.
        low_rank: adapters.
        scale: of the logits, before the soft cap.
        soft_cap: bound of the logits' absolute value, reached smoothly; None where there is none.
        vocab_size: V <= V'; columns from there on are padding, and get neither probability nor gradient. None takes
            all.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    low_rank: tuple[LowRankTerm, ...] = ()
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None

    @property
    def num_columns(self) -> int:
        """V, without padding."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., V] logits, all at once and by autograd: what the fused loss is held to."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        for term in self.low_rank:
            logits = (logits + torch.nn.functional.linear(term.project(hidden), term.up)).to(logits.dtype)
        logits = logits[..., : self.num_columns] * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def read_head(module: torch.nn.Module, config: object = None, *, vocab_size: int | None = None) -> LinearHead:
    """The head that a module and its model's config describe.

    Args:
        module: `torch.nn.Linear`, or peft's LoRA layer around one; transformers' `model.get_output_embeddings()`.
        config: of the model, for scale and soft cap; None means that it has neither.
        vocab_size: as in `LinearHead`.

    Returns:
        The head over the module's own tensors, not copies. An adapter that is switched off or merged into the weight
        is not in it, so read a head anew after such a change.

    Raises:
        ConfigError: the module is something else, or an adapter more than a plain LoRA; run it with its own logits.
    """
    scale, soft_cap = read_logit_transform(config)
    low_rank: tuple[LowRankTerm, ...] = ()
    linear: Any = module
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        linear, low_rank = module.base_layer, _read_adapters(module)
    if type(linear) is not torch.nn.Linear:
        raise ConfigError(
            f"head: expected torch.nn.Linear or peft's LoRA around one, found {type(linear).__name__}; compute this "
            "model's logits and use the loss on logits"
        )
    return LinearHead(
        weight=linear.weight,
        bias=linear.bias,
        low_rank=low_rank,
        scale=scale,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )


def read_logit_transform(config: object) -> tuple[float, float | None]:
    """Scale and soft cap of the logits, from a config of transformers or anything with its attributes.

    Returns:
        What the head's output is multiplied by (Cohere's `logit_scale`, one over Granite's `logits_scaling`), 1 where
        the config says nothing; the cap (Gemma's `final_logit_softcapping`), None where there is none.
    """
    get_text_config = getattr(config, "get_text_config", None)
    text = config if get_text_config is None else get_text_config()
    scale = math.prod(float(value) for name in _FACTOR_NAMES if (value := getattr(text, name, None)) is not None)
    if (scaling := getattr(text, _DIVISOR_OR_FACTOR_NAME, None)) is not None:
        multiplies = str(getattr(text, "model_type", "")).startswith(_MODEL_TYPES_THAT_MULTIPLY)
        scale *= float(scaling) if multiplies else 1 / float(scaling)
    cap = getattr(text, "final_logit_softcapping", None)
    return scale, None if cap is None else float(cap)


def _read_adapters(layer: Any) -> tuple[LowRankTerm, ...]:
    """The active adapters of peft's LoRA layer.

    Raises:
        ConfigError: one of them does more than add a product of two matrices.
    """
    if layer.disable_adapters or layer.merged:
        return ()
    terms = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if name in getattr(layer, "lora_variant", {}) or up.bias is not None or down.bias is not None:
            raise ConfigError(
                f"head: adapter {name!r}: expected plain LoRA, found a variant of it (DoRA, biases); compute this "
                "model's logits and use the loss on logits"
            )
        dropout = None if isinstance(dropout, torch.nn.Identity) else dropout
        terms.append(LowRankTerm(down=down.weight, up=up.weight, factor=float(layer.scaling[name]), dropout=dropout))
    return tuple(terms)
