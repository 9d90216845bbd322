"""`logitstore benchmark vocabularies`: students with another tokenizer, by what the store teaches them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.benchmark.arguments import check_multiple, check_quickstart
from tools.benchmark.tables import print_heading, print_table, print_text

if TYPE_CHECKING:
    from trainer.config import TrainSettings
    from trainer.evaluation import Evaluation

# Name, whether the student has a tokenizer of its own, and the settings that differ.
_LESSONS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("text alone", True, {"other_tokenizer": {"method": "spans"}, "loss": {"kind": "cross_entropy"}}),
    ("spans", True, {"other_tokenizer": {"method": "spans"}}),
    ("spans, temperature 1", True, {"other_tokenizer": {"method": "spans", "temperature": 1.0}}),
    ("sorted probabilities", True, {"other_tokenizer": {"method": "sorted_probabilities"}}),
    ("text alone", False, {"other_tokenizer": {"method": "spans"}, "loss": {"kind": "cross_entropy"}}),
    ("spans", False, {"other_tokenizer": {"method": "spans"}}),
    ("bucket_kl", False, {"loss": {"kind": "bucket_kl"}}),
)


def vocabularies(
    quickstart: Annotated[Path, typer.Argument(metavar="FOLDER", help="What 'logitstore quickstart' has left.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every student.")] = 300,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of 256 positions of the teacher's per step.")] = 8,
    vocab_size: Annotated[int, typer.Option(min=300, help="Ids of the students' own tokenizer.")] = 1000,
    width: Annotated[int, typer.Option(min=16, help="Hidden size of the students, a multiple of 16.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the students.")] = 2,
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the distillation term.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Students of every row.")] = 2,
    results: Annotated[Path | None, typer.Option(help="Write every figure to this file of JSON.")] = None,
) -> None:
    """Train students with a tokenizer of their own, and for comparison with the teacher's, on the quickstart's store.

    All see the same records in the same order; figures are bits per byte of its held-out text, over the spans that
    teacher and student both predict.

    \b
    Example:
      logitstore benchmark vocabularies runs/quickstart
    """

    check_multiple("--width", width, of=16)
    check_quickstart(quickstart)
    command = (
        f"logitstore benchmark vocabularies runs/quickstart --steps {steps} --sequences {sequences} --vocab-size "
        f"{vocab_size} --width {width} --layers {layers} --weight {weight:g} --seeds {seeds}"
    )
    print_heading(command, "torch", "transformers", "tokenizers")
    found: dict[tuple[bool, str], list[Evaluation]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own = train_tokenizer(quickstart / "corpus" / "train.jsonl", vocab_size, Path(folder) / "tokenizer")
        for number, (name, has_own, changes) in enumerate(_LESSONS):
            for seed in range(seeds):
                settings = build_lesson(
                    quickstart, changes, own if has_own else None, steps, sequences, width, layers, weight, seed,
                    Path(folder) / f"{number}-{seed}",
                )  # fmt: skip
                found.setdefault((has_own, name), []).append(train_and_evaluate(settings))
                if results is not None:
                    results.write_text(
                        json.dumps({f"{key}": [one.list_scalars() for one in many] for key, many in found.items()})
                    )
    print_table(
        ["taught by", "tokenizer", "bits per byte", "text compared", "KL per span"],
        [
            [name, "its own" if has_own else "the teacher's", *_describe(evaluations)]
            for (has_own, name), evaluations in found.items()
        ],
    )
    teacher = next(iter(found.values()))[0].teacher_bits_per_byte
    print_text(f"The teacher itself: {teacher:.3f} bits per byte.")


def train_tokenizer(corpus: Path, vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE, of GPT-2's kind, on the texts that the students learn from; its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def build_lesson(
    quickstart: Path,
    changes: dict[str, Any],
    own_tokenizer: Path | None,
    steps: int,
    sequences: int,
    width: int,
    layers: int,
    weight: float,
    seed: int,
    output: Path,
) -> TrainSettings:
    """Settings of one student; of one seed, all read the same records."""
    from logitstore.settings import build_settings
    from tools.quickstart import TEACHER
    from trainer.config import TrainSettings

    values: dict[str, Any] = {
        "store": str(quickstart / "store"),
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": width,
                "intermediate_size": 11 * width // 4,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            }
        },
        "loss": {"weight": weight, **changes.get("loss", {})},
        "global_batch_sequences": sequences,
        "steps": steps,
        "optimizer": {"learning_rate": 6e-3},
        "schedule": {"decay_fraction": 0.3},
        "held_out": {"source": "held_out"},
        "seed": seed,
        "output": str(output),
    }
    if "other_tokenizer" in changes:
        places = {"tokenizer": str(own_tokenizer or TEACHER), "teacher_tokenizer": str(TEACHER)}
        values["other_tokenizer"] = {**changes["other_tokenizer"], **places}
    return build_settings(TrainSettings, values, where="logitstore benchmark vocabularies")


def train_and_evaluate(settings: TrainSettings) -> Evaluation:
    """Train a student; its evaluation in bits per byte, also where it has the teacher's tokenizer."""
    from logitstore.store.logit_store import LogitStore
    from logitstore.stream.selection import select_records
    from tools.quickstart import TEACHER
    from trainer.config import EvaluateSettings
    from trainer.distributed import Processes, choose_device
    from trainer.loop import train
    from trainer.vocabularies.evaluation import evaluate_folder
    from trainer.vocabularies.settings import OtherTokenizerSettings
    from trainer.vocabularies.student_reader import StudentReader

    report = train(settings)
    assert report.evaluation is not None  # it has held-out records
    if settings.other_tokenizer is not None:
        return report.evaluation
    store, folder = LogitStore.open(settings.store), str(report.student)
    as_other = OtherTokenizerSettings(method="spans", tokenizer=str(TEACHER), teacher_tokenizer=str(TEACHER))
    reader = StudentReader(as_other, [store], student_model=None)
    processes = Processes(rank=0, world_size=1, device=choose_device(settings.device))
    _, held_out = select_records(store, None, settings.held_out)
    return evaluate_folder(
        reader, folder, EvaluateSettings(store=settings.store, student=folder), store, held_out, processes
    )


def _describe(evaluations: list[Evaluation]) -> list[str]:
    from tools.benchmark.methods import format_spread

    return [
        format_spread([one.bits_per_byte for one in evaluations], 3),
        f"{100 * (evaluations[0].compared_bytes or 0):.1f}%",
        format_spread([one.span_kl for one in evaluations], 3),
    ]
