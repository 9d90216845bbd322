"""The quickstart's corpus: source text of the Python standard library that every interpreter carries."""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# One file in 16 is held out. The shipped teacher never saw these files either (make_teacher.py asks the same
# function), so its figures on held-out records are not flattered by memory.
HELD_OUT_ONE_IN = 16
# Longer files are tables (unicode names, opcodes, test data) rather than source text.
LONGEST_FILE_BYTES = 300_000
LONGEST_MEAN_LINE_BYTES = 120
# Of a document in the quickstart's corpus: a few long ones would be all that is held out.
LONGEST_DOCUMENT_CHARACTERS = 30_000


def build_stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative_path: str) -> bool:
    """Whether a standard library file, named by its path below the library's root, is kept for evaluation."""
    return zlib.crc32(relative_path.encode()) % HELD_OUT_ONE_IN == 0


def read_sources(root: Path, *, with_tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (path below root, text) of every plain source file, in path order.

    Third-party packages below the root, files that are not UTF-8 and tables of data are left out; test suites too,
    unless asked for.
    """
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or "dist-packages" in relative.parts:
            continue
        if not with_tests and {"test", "tests", "idle_test"} & set(relative.parts):
            continue
        raw = path.read_bytes()
        if not 0 < len(raw) <= LONGEST_FILE_BYTES or len(raw) > LONGEST_MEAN_LINE_BYTES * (raw.count(b"\n") + 1):
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield relative.as_posix(), text


def write_corpus(folder: Path, *, train_bytes: int, held_out_bytes: int) -> dict[str, int]:
    """Write `train.jsonl` and `held_out.jsonl`, a document per library file; returns the documents in each.

    Files of ordinary length are taken in an order that mixes the library's packages, until the text reaches the size
    asked for.
    """
    ordinary = (file for file in read_sources(build_stdlib_root()) if len(file[1]) <= LONGEST_DOCUMENT_CHARACTERS)
    files = sorted(ordinary, key=lambda file: zlib.crc32(f"order {file[0]}".encode()))
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, kept, size in (("train", False, train_bytes), ("held_out", True, held_out_bytes)):
        documents, taken = [], 0
        for path, text in files:
            if is_held_out(path) is kept and taken < size:
                documents.append({"path": path, "text": text})
                taken += len(text.encode())
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        written[name] = len(documents)
    return written
