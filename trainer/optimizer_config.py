"""Settings of how gradients become steps, and how the learning rate moves."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from logitstore.settings import Settings
from trainer.stream_config import Fraction

# Of 1, what a moment begins as would stay for ever.
Momentum = Annotated[float, Field(ge=0, lt=1)]
_OF_MUON = ("adamw_learning_rate", "momentum")


class OptimizerSettings(Settings):
    """How gradients become steps.

    Attributes:
        kind: `adamw`; `adamw8bit`, which keeps its two moments in 8 bits; `muon` for the matrices of the body, with an
            AdamW for embeddings, head, norms and biases.
        learning_rate: at its peak.
        adamw_learning_rate: of the AdamW beside Muon, at its peak; None is the same as Muon's, whose steps are scaled
            to the size of AdamW's.
        betas: of AdamW.
        momentum: of Muon.
        weight_decay: of matrices only.
        gradient_clip: bounds the norm of the whole gradient.
    """

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    adamw_learning_rate: float | None = Field(default=None, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    momentum: Momentum = 0.95
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clip: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for name in _OF_MUON:
            if self.kind != "muon" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: expected kind muon beside it, found {self.kind}")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_what_is_muons(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain AdamW's settings are what they were in checkpoints from before there was anything else."""
        values: dict[str, Any] = serialize(self)
        left_out = {"muon": (), "adamw8bit": _OF_MUON, "adamw": ("kind", *_OF_MUON)}[self.kind]
        return {name: value for name, value in values.items() if name not in left_out}


class ScheduleSettings(Settings):
    """How the learning rate moves over the run.

    Attributes:
        kind: `wsd` warms up, stays, and decays over the last part; `cosine` decays all the way after the warm-up;
            `constant` only warms up.
        warmup_steps: None takes 2% of the run.
        decay_fraction: last part of the run over which `wsd` decays.
        final_fraction: of the peak, reached at the end by `wsd` and `cosine`.
    """

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int | None = Field(default=None, ge=0)
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.0
