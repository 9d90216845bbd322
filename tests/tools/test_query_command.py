"""`logitstore query`: views of every kind of store hold what the store does, and results come in every form."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import train_sentencepiece_like
from made_up import build_identity, build_plan, build_records, put_shard
from made_up_draws import build_drawn_records
from tiny_models import save_model
from tokenizers import decoders

from logitstore.corpus.documents import DeadLetter
from logitstore.shard.codec import Codec, CompactCodec, Float16Codec, Float32Codec
from logitstore.shard.writer import ShardSettings
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TopKMethod
from logitstore.teacher.tokenizer import load_tokenizer
from tools.query_output import QueryResult, write_json

CODECS: list[Codec] = [Float32Codec(), Float16Codec(), CompactCodec()]
METHODS: list[Method] = [TopKMethod(k=8), SampleMethod(), HeadTailMethod()]


def fill(url: str, spill: Path, codec: Codec = CODECS[2], method: Method = METHODS[0], **teacher: Any) -> LogitStore:
    """A store of two committed units, one in no manifest yet, and a file of an attempt that lost."""
    files = StoreFiles(url)
    shard = ShardSettings(codec=codec, row_group_bytes=2000)
    plan = create_plan(files, build_plan(3, shard=shard, method=method, teacher=build_identity(**teacher)))
    for unit in range(2):
        build = build_records if method.kind == "top_k" else build_drawn_records
        records = build(10, unit=unit) if method.kind == "top_k" else build_drawn_records(10, method.kind, unit=unit)
        commit = put_shard(files, plan, unit, records, build_attempt(), spill)
        put_shard(files, plan, unit, records[:3], build_attempt(), spill)
        letter = DeadLetter(document_id="a.jsonl@7", reason="empty", detail="line 2")
        counted = {"documents": commit.documents + 1, "dead_letter_counts": {"empty": 1}, "dead_letters": (letter,)}
        commit_unit(files, commit.model_copy(update=counted))
        if unit == 0:
            write_manifest(files, plan.compute_fingerprint())
    return LogitStore.open(url, "live")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_supports_are_those_of_the_store(tmp_path: Path, codec: Codec, method: Method, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path, codec, method)
    rows = logitstore.json("query", store.url, "SELECT * FROM supports ORDER BY unit, record, position, slot")
    expected = []
    for record in store:
        for position in range(record.num_positions):
            ids, logprobs = record.signal.support_at(position)
            draws = record.signal.draws_at(position)
            for slot in range(len(ids)):
                address = (record.address.unit, record.address.index, position, slot, int(ids[slot]))
                expected.append((*address, 0 if draws is None else int(draws[slot]), float(logprobs[slot])))
    assert [tuple(row.values())[:6] for row in rows] == [row[:6] for row in expected]
    assert [row["logprob"] for row in rows] == pytest.approx([row[6] for row in expected], abs=3e-6)


def test_positions_are_those_of_the_store_at_a_manifest_or_now(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT unit, record, position, token_id, next_token_id, next_token_logprob, entropy FROM positions"
    rows = logitstore.json("query", store.url, sql)
    expected = {
        (record.address.unit, record.address.index, position): (
            int(record.token_ids[position]),
            int(record.token_ids[position + 1]),
            float(record.signal.next_token_logprob[position]),
            float(record.signal.entropy[position]),
        )
        for record in store
        for position in range(record.num_positions)
    }
    assert {tuple(row.values())[:3]: tuple(row.values())[3:] for row in rows} == expected
    in_manifest = logitstore.json("query", store.url, sql, "--manifest", 1)
    assert {row["unit"] for row in in_manifest} == {0}


def test_other_views_say_what_the_store_says(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    [row] = logitstore.json("query", store.url, "SELECT count(*) AS n, sum(positions)::INT AS p FROM row_groups")
    assert row == {"n": store.num_row_groups, "p": store.compute_statistics().positions}
    letters = logitstore.json("query", store.url, "SELECT * FROM dead_letters ORDER BY unit")
    assert letters == [
        {"unit": unit, "reason": "empty", "document_id": "a.jsonl@7", "detail": "line 2"} for unit in range(2)
    ]
    documents = logitstore.json("query", store.url, "SELECT DISTINCT document_id FROM documents")
    assert {row["document_id"] for row in documents} == {
        span.document_id for record in store for span in record.documents
    }


def test_text_of_tokens_is_the_tokenizers(tmp_path: Path, logitstore: Any) -> None:
    folder = save_model("llama", tmp_path / "teacher")
    tokenizer = load_tokenizer(str(folder))
    own = {"model": str(folder), "tokenizer_fingerprint": tokenizer.fingerprint}
    store = fill(str(tmp_path / "store"), tmp_path, **own)
    sql = "SELECT next_token_id AS id, text(next_token_id) AS text FROM positions LIMIT 20"
    for row in logitstore.json("query", store.url, sql):
        assert row["text"] == tokenizer.decode([row["id"]])


def test_text_without_a_tokenizer_is_refused(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    _, stderr = logitstore("query", store.url, "SELECT text(3)", exit_code=2)
    assert "expected a tokenizer for text, found none" in stderr


def test_rows_are_the_same_in_every_form(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT unit, record, position, entropy FROM positions ORDER BY ALL"
    rows = [tuple(row.values()) for row in logitstore.json("query", store.url, sql)]
    printed = list(csv.reader(io.StringIO(logitstore("query", store.url, sql, "--csv")[0])))
    assert printed[0] == ["unit", "record", "position", "entropy"]
    assert [(*map(int, row[:3]), pytest.approx(float(row[3]))) for row in printed[1:]] == rows
    for suffix in ("csv", "json", "parquet"):
        path = tmp_path / f"rows.{suffix}"
        assert f"{len(rows):,} rows" in logitstore("query", store.url, sql, "--output", path)[1]
    assert (tmp_path / "rows.csv").read_text().count("\n") == len(rows) + 1
    assert [tuple(row.values()) for row in json.loads((tmp_path / "rows.json").read_text())] == rows
    assert [tuple(row.values()) for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()] == rows


def test_table_is_cut_and_says_so(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    stdout, stderr = logitstore("query", store.url, "SELECT i FROM range(300) AS r(i)")
    assert [line.strip() for line in stdout.splitlines()[2:]] == [str(i) for i in range(200)]
    assert "only the first 200 rows" in stderr
    stdout, stderr = logitstore("query", store.url, "SELECT 'a' AS x, NULL AS y, 'NaN'::FLOAT AS z")
    assert ("nan" in stdout, stderr) == (True, "")


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT 'NaN'::FLOAT AS a, '-inf'::DOUBLE AS b, ['inf'::DOUBLE, 1.5] AS c, DATE '2026-01-02' AS d"
    assert logitstore.json("query", store.url, sql) == [{"a": None, "b": None, "c": [None, 1.5], "d": "2026-01-02"}]


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("SELEC 1", "Parser Error"),
        ("SELECT * FROM docs", "the views are records, positions, supports"),
        ("SELECT nothing FROM positions", "nothing"),
    ],
)
def test_sql_that_duckdb_does_not_understand_is_told_with_the_views(
    tmp_path: Path, logitstore: Any, sql: str, complaint: str
) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    _, stderr = logitstore("query", store.url, sql, exit_code=2)
    assert "expected SQL of DuckDB, found" in stderr
    assert complaint in stderr


def test_store_behind_fsspec_is_queried_through_it(tmp_path: Path, logitstore: Any) -> None:
    url = f"memory://{tmp_path.name}/store"
    store = fill(url, tmp_path)
    [row] = logitstore.json("query", url, "SELECT count(*) AS n, avg(entropy) AS mean FROM positions")
    assert row["n"] == store.compute_statistics().positions
    assert math.isfinite(row["mean"])


def test_store_without_records_and_shards_that_are_gone_are_told(tmp_path: Path, logitstore: Any) -> None:
    files = StoreFiles(str(tmp_path / "empty"))
    create_plan(files, build_plan(1))
    _, stderr = logitstore("query", files.url, "SELECT 1", exit_code=2)
    assert "expected committed records, found none" in stderr
    store = fill(str(tmp_path / "store"), tmp_path)
    for path in Path(store.url, "data").iterdir():
        path.unlink()
    _, stderr = logitstore("query", store.url, "SELECT * FROM positions", exit_code=4)
    assert "run 'logitstore verify" in stderr


@pytest.mark.parametrize("name", ["rows.txt", "nowhere/rows.csv"])
def test_file_that_cannot_be_written_is_refused(tmp_path: Path, logitstore: Any, name: str) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    _, stderr = logitstore("query", store.url, "SELECT 1 AS x", "--output", tmp_path / name, exit_code=2)
    assert "--output" in stderr


def test_forms_exclude_each_other(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    _, stderr = logitstore("query", store.url, "SELECT 1", "--csv", "--json", exit_code=2)
    assert "expected one of --csv, --json and --output" in stderr


def test_names_in_capitals_are_found(tmp_path: Path, logitstore: Any, teacher_folder: Path) -> None:
    own = {"model": str(teacher_folder), "tokenizer_fingerprint": load_tokenizer(str(teacher_folder)).fingerprint}
    store = fill(str(tmp_path / "store"), tmp_path, **own)
    sql = "SELECT count(*) AS n, (SELECT count(*) FROM Vocabulary) AS ids, TEXT(7) AS seven FROM DEAD_LETTERS"
    [row] = logitstore.json("query", store.url, sql)
    text = load_tokenizer(str(teacher_folder)).decode([7])
    assert row == {"n": 2, "ids": store.plan.teacher.vocab_size, "seven": text}


def test_sums_of_integers_are_numbers_and_bytes_are_digits_in_json(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT sum(positions) AS positions, any_value(sha256) AS digest, 1.5::DECIMAL(4, 2) AS d FROM row_groups"
    [row] = logitstore.json("query", store.url, sql)
    assert row["positions"] == store.compute_statistics().positions
    assert bytes.fromhex(row["digest"]) in [bytes(digest) for digest in store.manifest.digests]
    assert row["d"] == 1.5


def test_columns_of_equal_names_are_all_there(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a"
    assert logitstore.json("query", store.url, sql) == [{"a": 1, "a_1": 2, "a_1_1": 3, "a_2": 4}]
    assert logitstore("query", store.url, sql)[0].split()[-4:] == ["1", "2", "3", "4"]


def test_records_with_their_lists_are_shown_and_written(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT * FROM records ORDER BY unit, record LIMIT 1"
    head, row = csv.reader(io.StringIO(logitstore("query", store.url, sql, "--csv")[0]))
    assert json.loads(dict(zip(head, row, strict=True))["token_ids"]) == store[0].token_ids.tolist()
    shown = logitstore("query", store.url, sql)[0]
    [line] = [line for line in shown.splitlines() if " token_ids " in line]
    assert line.split("token_ids")[1].strip().startswith(f"[{store[0].token_ids[0]}, ")
    assert len(line) <= 100


def test_row_that_fails_late_leaves_no_half_file(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    sql = "SELECT CASE WHEN i < 150000 THEN i ELSE error('late') END AS i FROM range(200000) AS r(i)"
    path = tmp_path / "rows.parquet"
    logitstore("query", store.url, "SELECT 7 AS x", "--output", path)
    for form in (["--output", path], ["--csv"]):  # a table of the first rows may be done before
        _, stderr = logitstore("query", store.url, sql, *form, exit_code=2)
        assert "expected SQL of DuckDB, found Invalid Input Error: late" in stderr
    assert pq.read_table(path).to_pylist() == [{"x": 7}]
    assert [found.name for found in tmp_path.glob("*rows*")] == ["rows.parquet"]


def test_type_that_parquet_has_not_is_told(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    path = tmp_path / "rows.parquet"
    _, stderr = logitstore("query", store.url, "SELECT INTERVAL 1 DAY AS i", "--output", path, exit_code=2)
    assert "expected columns that Parquet has" in stderr
    assert not path.exists()


@pytest.mark.parametrize("sql", ["", " \n"])
def test_no_query_is_refused(tmp_path: Path, logitstore: Any, sql: str) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    _, stderr = logitstore("query", store.url, sql, exit_code=2)
    assert "expected a query, found none" in stderr


def test_names_and_texts_do_not_steer_the_terminal(tmp_path: Path, logitstore: Any) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    shown, _ = logitstore("query", store.url, 'SELECT chr(27) || chr(8238) AS "a\x1b[31m"')
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_batches_of_json_are_one_document_and_no_list_of_all_rows() -> None:
    schema = pa.schema([("i", pa.int64())])
    batches = (pa.record_batch([[i, i + 1]], schema=schema) for i in (0, 2))
    file = io.BytesIO()
    assert write_json(QueryResult(schema=schema, batches=batches), file) == 4
    assert json.loads(file.getvalue()) == [{"i": i} for i in range(4)]
    empty = io.BytesIO()
    assert write_json(QueryResult(schema=schema, batches=iter(())), empty) == 0
    assert json.loads(empty.getvalue()) == []


def test_text_keeps_the_space_that_begins_a_word(tmp_path: Path, logitstore: Any) -> None:
    tokenizer = train_sentencepiece_like(None)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)  # as Llama 2 has it
    folder = str(tmp_path / "teacher")
    tokenizer.save_pretrained(folder)
    own = {"model": folder, "tokenizer_fingerprint": load_tokenizer(folder).fingerprint, "vocab_size": len(tokenizer)}
    store = fill(str(tmp_path / "store"), tmp_path, **own, padded_vocab_size=len(tokenizer))
    token_id, token = next((i, t) for t, i in tokenizer.get_vocab().items() if t.startswith("▁") and t[1:].isalpha())
    assert logitstore.json("query", store.url, f"SELECT text({token_id}) AS t") == [{"t": f" {token[1:]}"}]


@pytest.mark.slow
def test_interrupt_is_heard_while_duckdb_computes(tmp_path: Path) -> None:
    store = fill(str(tmp_path / "store"), tmp_path)
    endless = "SELECT sum(a.i * b.i) FROM range(9000000) AS a(i), range(9000000) AS b(i)"
    sql = f"COPY (SELECT 1) TO '{tmp_path}/started.csv'; {endless}"
    command = [sys.executable, "-m", "tools.query", store.url, sql]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "started.csv").exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert "interrupted" in process.communicate(timeout=60)[1]
            assert process.returncode == 130
        finally:
            process.kill()
