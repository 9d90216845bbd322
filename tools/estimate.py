"""What a capture will take, computed from a listing of its corpus and a probe of its teacher."""

from __future__ import annotations

from pydantic import Field

from logitstore.settings import Settings


class CorpusFigures(Settings):
    """A corpus as listed, nothing of it read but file ends.

    Attributes:
        files, stored_bytes: as stored.
        text_bytes: after decompression; of the text column only for Parquet, of whole lines for JSON.
        units: work units.
    """

    files: int
    stored_bytes: int
    text_bytes: int
    units: int


class ProbeFigures(Settings):
    """What a sample of the corpus showed.

    Attributes:
        units: that the sample was taken from, spread evenly over the corpus.
        text_bytes: of the sample, counted as in `CorpusFigures`.
        documents, dead_letters: in the sample; dead letters are among the documents.
        tokenized_positions: of the whole sample.
        tokenize_seconds: reading and tokenizing it.
        scored_positions, scored_records: that went through the teacher.
        score_seconds: scoring and writing them, the teacher loaded and warm.
        row_group_bytes: of them in a shard.
        footer_bytes: of that shard.
        support_entries: kept in all.
        teacher_loss: nats per token, on the scored positions.
        load_seconds: of the teacher.
        device: that it ran on, with the number of threads where that is the CPU.
    """

    units: int
    text_bytes: int = Field(gt=0)
    documents: int
    dead_letters: int
    tokenized_positions: int = Field(gt=0)
    tokenize_seconds: float
    scored_positions: int = Field(gt=0)
    scored_records: int
    score_seconds: float = Field(gt=0)
    row_group_bytes: int
    footer_bytes: int
    support_entries: int
    teacher_loss: float
    load_seconds: float
    device: str


class Estimate(Settings):
    """What the whole capture takes, extrapolated.

    Attributes:
        positions: of the whole corpus.
        dead_letter_share: of the documents.
        bytes_per_position: of a shard's row groups.
        store_bytes: of all shards.
        positions_per_second: of one actor, tokenizing and writing included, uploading not.
        actor_hours: of work, loading left out.
        actors: that share it.
        hours: with so many actors, one loading included.
        cost: of the actor hours, each actor's loading included, in the currency of the price; None without a price.
    """

    positions: int
    dead_letter_share: float
    bytes_per_position: float
    store_bytes: int
    positions_per_second: float
    actor_hours: float
    actors: int
    hours: float
    cost: float | None


def estimate_capture(
    corpus: CorpusFigures, probe: ProbeFigures, *, actors: int, price_per_hour: float | None = None
) -> Estimate:
    """Extrapolate a probe to its corpus, in proportion to the bytes of text.

    Args:
        corpus: as listed.
        probe: of a sample of it.
        actors: that run at once; never more than there are units.
        price_per_hour: of one actor.
    """
    actors = max(1, min(actors, corpus.units))
    positions = corpus.text_bytes * probe.tokenized_positions / probe.text_bytes
    bytes_per_position = probe.row_group_bytes / probe.scored_positions
    seconds_per_position = (
        probe.score_seconds / probe.scored_positions + probe.tokenize_seconds / probe.tokenized_positions
    )
    actor_hours = positions * seconds_per_position / 3600
    load_hours = probe.load_seconds / 3600
    return Estimate(
        positions=round(positions),
        dead_letter_share=probe.dead_letters / max(1, probe.documents),
        bytes_per_position=bytes_per_position,
        store_bytes=round(positions * bytes_per_position + corpus.units * probe.footer_bytes),
        positions_per_second=1 / seconds_per_position,
        actor_hours=actor_hours,
        actors=actors,
        hours=actor_hours / actors + load_hours,
        cost=None if price_per_hour is None else price_per_hour * (actor_hours + actors * load_hours),
    )
