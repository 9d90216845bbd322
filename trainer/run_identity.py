"""What makes a run the one it is: it goes on from a checkpoint of which all of this is the same."""

from __future__ import annotations

from typing import Any

from trainer.config import TrainSettings
from trainer.document_weights import DocumentWeights
from trainer.stores import RunStores
from trainer.vocabularies.student_reader import StudentReader

# Settings that may change when a run goes on: where it reads and writes, how it is cut up, what it reports. Stores
# and tables of weights count by fingerprints of what is in them.
_FREE_SETTINGS = frozenset(
    {
        "store",
        "manifest",
        "further_teachers",
        "further_corpora",
        "skip_steps",
        "cache",
        "scratch",
        "document_weights",
        "micro_batch_sequences",
        "micro_batch_tokens",
        "pack_sequences",
        "stream",
        "fused_loss",
        "parallel",
        "activation_checkpointing",
        "max_skipped_steps",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "log_records",
        "output",
        "device",
    }
)


def build_identity(
    settings: TrainSettings, stores: RunStores, document_weights: DocumentWeights | None, reader: StudentReader | None
) -> dict[str, Any]:
    """Name and value of everything that must stay the same for a run to go on from its checkpoint."""
    identity: dict[str, Any] = {"store": stores.teachers[0].fingerprint}
    further = zip(stores.teachers[1:], settings.teacher_weights[1:], strict=True)
    for number, (store, weight) in enumerate(further):
        identity[f"further_teachers.{number}"] = {"store": store.fingerprint, "weight": weight}
    if document_weights is not None:
        identity["document_weights"] = document_weights.identity
    if reader is not None:
        identity["student_tokenizer"] = reader.tokenizer.fingerprint
    return {**identity, **describe_settings(settings)}


def describe_settings(settings: TrainSettings) -> dict[str, Any]:
    """Name and value of the settings that must stay the same for a run to go on; those of sections by their keys."""
    identity: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json", exclude=set(_FREE_SETTINGS)).items():
        if isinstance(value, dict):
            identity.update({f"{name}.{key}": part for key, part in value.items()})
        else:
            identity[name] = value
    if settings.order_seed == settings.seed:
        identity["order_seed"] = None  # as it is in runs that do not name it
    return identity
