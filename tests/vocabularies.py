"""Tokenizers of different kinds and sizes, and a store of one of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from made_up import build_identity, build_plan, build_signal, put_shard
from made_up_draws import draw_signal
from taught_stores import build_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from logitstore.corpus.sequences import SequenceSettings
from logitstore.records import DocumentSpan, Record, RecordAddress
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.protocol import Method
from logitstore.teacher.tokenizer import TeacherTokenizer
from trainer.vocabularies.settings import OtherTokenizerSettings
from trainer.vocabularies.student_reader import StudentReader

END = "<|endoftext|>"
DOCUMENTS = (
    "def read(path):\n    with open(path) as stream:\n        return stream.read()\n",
    "for line in lines:\n\tprint('naïve', line)  # Straße 你好\n",
    "import numpy as np\n\n\nclass Reader:\n    def __init__(self, stream):\n        self.stream = stream\n",
    "x = 1\n",
    "return [value for value in values if value is not None]\n",
)


@cache
def _train(size: int, *, is_byte_level: bool) -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=not is_byte_level, unk_token=None if is_byte_level else "<unk>"))
    special, alphabet = [END], []
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as that of Llama 2
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*DOCUMENTS] * 4, trainer)
    return tokenizer.to_str()


def build_byte_level(size: int) -> TeacherTokenizer:
    """Byte-level BPE, trained on DOCUMENTS."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train(size, is_byte_level=True)), eos_token=END
    )
    return TeacherTokenizer(wrapped, f"byte-level-{size}")


def build_sentence_piece(size: int) -> TeacherTokenizer:
    """BPE with space marks, a space before every text, and bytes for what it has no token for."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train(size, is_byte_level=False)), eos_token=END, unk_token="<unk>"
    )
    return TeacherTokenizer(wrapped, f"sentence-piece-{size}")


def build_text_records(
    tokenizer: TeacherTokenizer,
    teacher: PreTrainedModel,
    *,
    unit: int = 0,
    length: int = 40,
    num_texts: int = 8,
    draw: str | None = None,
) -> list[Record]:
    """Records of real text, packed as a capture packs it, with a model's exact signals."""
    generator = np.random.default_rng([3, unit])
    texts = [DOCUMENTS[place] for place in generator.integers(0, len(DOCUMENTS), num_texts)]
    encoded = [np.array([*ids, tokenizer.end_of_text_id]) for ids in tokenizer.encode(texts)]
    token_ids = np.concatenate(encoded).astype(np.int32)
    begins = np.cumsum([0, *map(len, encoded)])[:-1]
    records = []
    for index, first in enumerate(range(0, len(token_ids) - 1, length)):
        ids = token_ids[first : first + length + 1]
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(ids[None, :-1].astype(np.int64))).logits[0]
        of = sorted(
            {
                int(np.searchsorted(begins, first, "right")) - 1,
                *np.flatnonzero((begins > first) & (begins < first + len(ids))).tolist(),
            }
        )
        records.append(
            Record(
                address=RecordAddress(unit=unit, index=index),
                token_ids=ids,
                loss_mask=np.ones(len(ids) - 1, dtype=bool),
                signal=(
                    build_signal(logits.double().numpy(), ids[1:], 8)
                    if draw is None
                    else draw_signal(logits.double().numpy(), ids[1:], draw, generator)
                ),
                documents=tuple(
                    DocumentSpan(
                        document_id=f"{unit}.{number}",
                        start=max(0, int(begins[number]) - first),
                        document_offset=max(0, first - int(begins[number])),
                    )
                    for number in of
                ),
            )
        )
    return records


def fill_text_store(
    folder: Path, tokenizer: TeacherTokenizer, *, num_units: int = 4, method: Method | None = None
) -> LogitStore:
    """A store of such records, the last quarter of its units of the source `held`, beside the teacher's tokenizer."""
    teacher = build_model(seed=1, vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    tokenizer.tokenizer.save_pretrained(folder / "teacher")
    files = StoreFiles(str(folder / "store"))
    identity = build_identity(
        model=str(folder / "teacher"),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
    )
    plan = create_plan(
        files,
        build_plan(
            num_units,
            sources=("train", "train", "train", "held"),
            teacher=identity,
            sequences=SequenceSettings(length=40),
            **({} if method is None else {"method": method}),
        ),
    )
    for unit in range(num_units):
        draw = None if method is None else method.kind
        records = build_text_records(tokenizer, teacher, unit=unit, draw=draw)
        commit_unit(files, put_shard(files, plan, unit, records, build_attempt(), folder))
    write_manifest(files, plan.compute_fingerprint())
    return LogitStore.open(files.url)


def build_reader(store: LogitStore, method: str, tokenizer: str | None = None) -> StudentReader:
    return StudentReader(OtherTokenizerSettings(method=method, tokenizer=tokenizer), [store], student_model=None)
