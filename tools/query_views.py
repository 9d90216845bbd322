"""What `logitstore query` offers to SQL: the committed shards of a store as views of DuckDB, with decoded logprobs.

The views that decode are those of docs/queries.md, which people run without this package.
"""

from __future__ import annotations

from collections.abc import Sequence

# A row per entry of a support; `value` is what the codec stored. Lists in one SELECT are unnested side by side.
_ENTRIES = """
    SELECT unit, record,
        unnest(flatten(list_transform(support_counts, lambda count, i: repeat([i - 1], count)))) AS position,
        unnest(flatten(list_transform(support_counts, lambda count: range(count)))) AS slot,
        unnest(support_ids) AS token_id,
        {draws} AS draws,
        unnest({value}) AS value
    FROM records
"""
_POSITIONS = """
    SELECT unit, record,
        unnest(range(len(loss_mask))) AS position,
        unnest(token_ids[:-2]) AS token_id,
        unnest(token_ids[2:]) AS next_token_id,
        unnest(loss_mask) AS is_taught,
        unnest(support_counts) AS support_count,
        unnest(tail_logprob) AS tail_logprob,
        unnest(entropy) AS entropy,
        unnest(next_token_logprob) AS next_token_logprob
    FROM records
"""
# Level n of the compact codec, rescaled to the mass that the tail leaves.
_COMPACT_SUPPORTS = """
    WITH entries AS ({entries}), levels AS (
        SELECT *, sum(value) OVER (PARTITION BY unit, record, position ORDER BY slot)::DOUBLE AS level FROM entries
    ), logprobs AS (
        SELECT * EXCLUDE (value, level),
            CASE WHEN draws = 0 THEN 2 * ln(1 - least(level, 632) / 640) - greatest(level - 632, 0) / 4 END AS logprob
        FROM levels
    ), masses AS (
        SELECT *, sum(exp(logprob)::FLOAT) OVER (PARTITION BY unit, record, position) AS mass FROM logprobs
    )
    SELECT * EXCLUDE (mass, tail_logprob) REPLACE (
        logprob + CASE WHEN mass > 0 AND tail_logprob < 0 THEN ln((1 - exp(tail_logprob::DOUBLE)) / mass) ELSE 0 END
        AS logprob
    )
    FROM masses JOIN (SELECT unit, record, position, tail_logprob FROM positions) USING (unit, record, position)
"""
# Drawn entries share the tail's mass by how often they were drawn.
_DRAWN_SUPPORTS = """
    SELECT * EXCLUDE (all_draws, tail_logprob) REPLACE (
        CASE WHEN draws > 0 THEN tail_logprob + ln(draws / all_draws) ELSE logprob END AS logprob
    )
    FROM (SELECT *, sum(draws) OVER (PARTITION BY unit, record, position) AS all_draws FROM ({supports}))
    JOIN (SELECT unit, record, position, tail_logprob FROM positions) USING (unit, record, position)
"""
_DOCUMENTS = """
    SELECT unit, record,
        unnest(document_ids) AS document_id,
        unnest(document_starts) AS first_token,
        unnest(document_offsets) AS first_token_of_document,
        {label} AS label
    FROM records
"""
VIEWS = {
    "records": "one row per sequence, with lists: the columns of the shards",
    "positions": "one row per position: ids, next-token logprob, entropy, tail",
    "supports": "one row per kept or drawn token of a position, logprobs decoded",
    "documents": "one row per document of a record",
    "row_groups": "one row per row group: its unit, source, sums and sizes; reads no shard",
    "dead_letters": "the documents that could not be used",
    "vocabulary": "ids and their texts; text(id) looks one up",
}


def list_statements(columns: Sequence[str]) -> list[str]:
    """SQL that makes the views over shards, which the variable `files` names.

    Args:
        columns: that the shards have.
    """
    has_draws = "support_draws" in columns
    is_compact = "support_steps" in columns
    entries = _ENTRIES.format(
        draws="unnest(support_draws)" if has_draws else "0",
        value="support_steps" if is_compact else "support_logprobs",
    )
    supports = (
        _COMPACT_SUPPORTS.format(entries=entries)
        if is_compact
        else f"SELECT * RENAME (value AS logprob) FROM ({entries})"
    )
    supports = _DRAWN_SUPPORTS.format(supports=supports) if has_draws else supports
    label = "unnest(document_labels)" if "document_labels" in columns else "NULL"
    views = {
        "records": "SELECT * FROM read_parquet(getvariable('files'))",
        "positions": _POSITIONS,
        "supports": supports,
        "documents": _DOCUMENTS.format(label=label),
    }
    return [f"CREATE VIEW {name} AS {query}" for name, query in views.items()]
