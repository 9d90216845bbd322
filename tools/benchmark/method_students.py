"""Students that are taught side by side by what each capture method keeps of one teacher, on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from logitstore.teacher.draws import DrawKeys, build_draw_key
from logitstore.teacher.protocol import HeadTailMethod, Method, SampleMethod, TopKMethod
from logitstore.teacher.sparsify import SparseRows, sparsify
from tools.benchmark.tables import tell_step
from tools.quickstart import TEACHER
from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources
from trainer.batch import TrainBatch
from trainer.evaluate import Evaluation, build_evaluation, compute_evaluation_sums
from trainer.loss.head import read_head
from trainer.loss.module import SparseDistillationLoss
from trainer.loss.settings import LossSettings
from trainer.optimizer import Optimizers, build_optimizer, compute_learning_rate_scale, set_learning_rate
from trainer.optimizer_config import OptimizerSettings, ScheduleSettings

LENGTH = 256
_SCHEDULE = ScheduleSettings(kind="wsd", decay_fraction=0.3)
_ROWS_AT_ONCE = 1024  # teacher's distributions that are sparsified at a time
_EVALUATION_SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One way to be taught: what is kept of the teacher, and the loss over it; `method` None keeps everything."""

    name: str
    loss: LossSettings
    method: Method | None = None


def _distill(kind: str) -> LossSettings:
    return LossSettings.model_validate({"kind": kind, "weight": 1.0})


LESSONS = (
    Lesson(name="cross-entropy", loss=_distill("cross_entropy"), method=TopKMethod(k=1)),  # of which it uses nothing
    Lesson(name="top-12, renormalized", loss=_distill("renormalized_kl"), method=TopKMethod(k=12)),
    Lesson(name="top-50, renormalized", loss=_distill("renormalized_kl"), method=TopKMethod(k=50)),
    Lesson(name="top-12, bucket", loss=_distill("bucket_kl"), method=TopKMethod(k=12)),
    Lesson(name="top-50, bucket", loss=_distill("bucket_kl"), method=TopKMethod(k=50)),
    Lesson(name="sample, 50 draws", loss=_distill("weighted_cross_entropy"), method=SampleMethod(num_draws=50)),
    Lesson(name="head_tail, 1/28", loss=_distill("weighted_cross_entropy"), method=HeadTailMethod(threshold=1 / 28)),
    Lesson(name="whole distribution", loss=_distill("weighted_cross_entropy")),
)


@dataclass(frozen=True, kw_only=True)
class School:
    """How long and how large: `width` and `layers` are the student's, `learning_rate` its peak."""

    steps: int
    sequences: int
    width: int
    layers: int
    learning_rate: float
    held_out_positions: int
    evaluations: int


@dataclass(kw_only=True, eq=False)
class Pupil:
    """A student in training, and what was measured of it: (positions seen, figures)."""

    lesson: Lesson
    seed: int
    model: PreTrainedModel
    optimizer: Optimizers
    loss: SparseDistillationLoss
    history: list[tuple[int, Evaluation]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a method keeps of P distributions: [P, K] ids, target weights and logprobs, [P] tail; padded with -inf."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprob: torch.Tensor
    entries: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A lesson at one seed: entries kept per position, and the student's figures over the run."""

    lesson: str
    seed: int
    entries: float
    history: tuple[tuple[int, Evaluation], ...]


def load_teacher_config() -> LlamaConfig:
    """Config of the quickstart's teacher."""
    return LlamaConfig.from_pretrained(TEACHER)


def teach(
    lessons: Sequence[Lesson],
    seeds: Sequence[int],
    school: School,
    on_evaluation: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Train a student for every lesson and seed; of one seed, all begin with the same weights.

    Args:
        lessons, seeds: one student for each pair.
        school: how long and how large.
        on_evaluation: called with what was measured so far.
    """
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).eval()  # as it is shipped
    training, held_out = encode_library()
    pupils = [build_pupil(lesson, seed, school, teacher.config) for seed in seeds for lesson in lessons]
    entries = {lesson.name: 0.0 for lesson in lessons}
    marks = {round(school.steps * (i + 1) / school.evaluations) for i in range(school.evaluations)}
    started = time.monotonic()
    for step, token_ids in enumerate(draw_batches(training, school)):
        logits = compute_logits(teacher, token_ids[:, :-1]).flatten(0, 1)
        kept = {lesson.name: keep(logits, token_ids, lesson, step) for lesson in lessons}
        for pupil in pupils:
            train_step(pupil, token_ids, kept[pupil.lesson.name], step, school)
        for name, found in kept.items():
            entries[name] += found.entries
        if step + 1 in marks:
            evaluate_pupils(pupils, teacher, held_out, school, positions=(step + 1) * school.sequences * LENGTH)
            on_evaluation(list_outcomes(pupils, entries, step + 1))
        if (step + 1) % 25 == 0:
            tell_step(f"step {step + 1} of {school.steps}, {time.monotonic() - started:,.0f} s")
    return list_outcomes(pupils, entries, school.steps)


def list_outcomes(pupils: Sequence[Pupil], entries: Mapping[str, float], steps: int) -> list[Outcome]:
    """What was measured by now; `entries` are sums over the steps of the mean per position."""
    return [
        Outcome(lesson=p.lesson.name, seed=p.seed, entries=entries[p.lesson.name] / steps, history=tuple(p.history))
        for p in pupils
    ]


def encode_library() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the interpreter's library: what students learn from, and files that nobody trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    runs: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for path, text in read_sources(build_stdlib_root(), with_tests=True):
        token_ids = tokenizer(text, verbose=False)["input_ids"]
        runs[is_held_out(path)].append(np.array([*token_ids, tokenizer.eos_token_id], dtype=np.int32))
    return np.concatenate(runs[False]), np.concatenate(runs[True])


def draw_batches(run: np.ndarray, school: School) -> Iterator[torch.Tensor]:
    """Yield [B, LENGTH + 1] token ids: every window of the run at most once per pass, in one order for everybody."""
    starts = np.arange(0, len(run) - LENGTH - 1, LENGTH)
    for step in range(school.steps):
        epoch, first = divmod(step * school.sequences, len(starts) // school.sequences * school.sequences)
        order = np.random.Generator(np.random.Philox(key=epoch)).permutation(len(starts))
        windows = [run[start : start + LENGTH + 1] for start in starts[order[first : first + school.sequences]]]
        yield torch.from_numpy(np.stack(windows).astype(np.int64))


def build_pupil(lesson: Lesson, seed: int, school: School, teacher: LlamaConfig) -> Pupil:
    """A Llama with fresh weights, the teacher's vocabulary and tied embeddings."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=teacher.vocab_size,
            hidden_size=school.width,
            intermediate_size=round(school.width * 2.75),
            num_hidden_layers=school.layers,
            num_attention_heads=max(1, school.width // 16),
            num_key_value_heads=max(1, school.width // 16),
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=teacher.bos_token_id,
            eos_token_id=teacher.eos_token_id,
        )
    )
    settings = OptimizerSettings(learning_rate=school.learning_rate, weight_decay=0.0)
    return Pupil(
        lesson=lesson,
        seed=seed,
        model=model,
        optimizer=build_optimizer(model, settings),
        loss=SparseDistillationLoss(lesson.loss),
        history=[],
    )


@torch.no_grad()
def compute_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V] float32."""
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def keep(logits: torch.Tensor, token_ids: torch.Tensor, lesson: Lesson, step: int) -> Kept:
    """What the lesson's method keeps of [P, V] logits."""
    if lesson.method is None:
        logprobs = logits.log_softmax(-1)
        ids = torch.arange(logits.shape[-1]).expand_as(logprobs)
        return Kept(
            ids=ids,
            logprobs=logprobs,
            tail_logprob=torch.full(logprobs.shape[:1], -math.inf),
            entries=float(logits.shape[-1]),
        )
    next_ids = token_ids[:, 1:].flatten()
    draw_keys = [build_draw_key(0, step, i) for i in range(len(token_ids))]
    randomness = DrawKeys.build(draw_keys, [LENGTH] * len(token_ids), logits.device)
    rows = [
        sparsify(logits[part], next_ids[part], lesson.method, randomness[part])
        for part in (slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(logits), _ROWS_AT_ONCE))
    ]
    return _join(rows)


def _join(chunks: Sequence[SparseRows]) -> Kept:
    """Rows of several calls, padded to the widest."""
    width = max(int(rows.counts.max()) for rows in chunks)
    ids, logprobs = [], []
    for rows in chunks:
        is_kept = torch.arange(rows.ids.shape[1]) < rows.counts[:, None]
        pad = (0, max(0, width - rows.ids.shape[1]))
        ids.append(torch.nn.functional.pad(rows.ids.masked_fill(~is_kept, 0), pad)[:, :width])
        padded = torch.nn.functional.pad(rows.logprobs.masked_fill(~is_kept, -math.inf), pad, value=-math.inf)
        logprobs.append(padded[:, :width])
    counts = torch.cat([rows.counts for rows in chunks])
    return Kept(
        ids=torch.cat(ids),
        logprobs=torch.cat(logprobs),
        tail_logprob=torch.cat([rows.tail_logprob for rows in chunks]),
        entries=float(counts.float().mean()),
    )


def train_step(pupil: Pupil, token_ids: torch.Tensor, kept: Kept, step: int, school: School) -> None:
    """One optimizer step on the mean over all positions."""
    scale = compute_learning_rate_scale(step, school.steps, _SCHEDULE)
    set_learning_rate(pupil.optimizer, school.learning_rate * scale)
    hidden = pupil.model.base_model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    head = read_head(pupil.model.get_output_embeddings(), pupil.model.config)
    if pupil.lesson.method is None:
        log_q = head.compute_logits(hidden).log_softmax(-1)
        total = -(kept.logprobs.exp() * log_q).sum(-1).mean()
    else:
        losses = pupil.loss(
            hidden,
            head,
            next_ids=token_ids[:, 1:].flatten(),
            support_ids=kept.ids,
            support_logprobs=kept.logprobs,
            tail_logprob=kept.tail_logprob,
            support_weights=kept.logprobs.exp() if pupil.lesson.loss.kind == "weighted_cross_entropy" else None,
            position_weight=torch.full((len(hidden),), 1 / len(hidden)),
        )
        total = losses.total
    total.backward()
    torch.nn.utils.clip_grad_norm_(pupil.model.parameters(), 1.0)
    pupil.optimizer.step()
    pupil.optimizer.zero_grad()


@torch.no_grad()
def evaluate_pupils(
    pupils: Sequence[Pupil], teacher: PreTrainedModel, held_out: np.ndarray, school: School, *, positions: int
) -> None:
    """Add figures on the held-out text to every pupil's history, against the teacher's whole distribution."""
    sums: dict[int, np.ndarray] = {}
    num_windows = min(school.held_out_positions, len(held_out) - 1) // LENGTH
    starts = np.linspace(0, len(held_out) - LENGTH - 1, num_windows).astype(int)
    windows = np.stack([held_out[start : start + LENGTH + 1] for start in starts]).astype(np.int64)
    for start in range(0, len(windows), _EVALUATION_SEQUENCES):
        token_ids = torch.from_numpy(windows[start : start + _EVALUATION_SEQUENCES])
        batch = build_dense_batch(token_ids, compute_logits(teacher, token_ids[:, :-1]))
        for number, pupil in enumerate(pupils):
            logits = compute_logits(pupil.model, token_ids[:, :-1])
            sums[number] = sums.get(number, 0.0) + compute_evaluation_sums(logits, batch).numpy()
    for number, pupil in enumerate(pupils):
        pupil.history.append((positions, build_evaluation(sums[number])))


def build_dense_batch(token_ids: torch.Tensor, teacher_logits: torch.Tensor) -> TrainBatch:
    """A batch whose supports are the whole vocabulary, so that every figure is that of the whole distribution."""
    logprobs, ids = teacher_logits.log_softmax(-1).sort(-1, descending=True)
    next_ids = token_ids[:, 1:]
    return TrainBatch(
        input_ids=token_ids[:, :-1],
        next_ids=next_ids,
        attention_mask=torch.ones_like(next_ids),
        loss_mask=torch.ones_like(next_ids, dtype=torch.bool),
        support_ids=ids,
        support_logprobs=logprobs,
        tail_logprob=torch.full(next_ids.shape, -math.inf),
        entropy=-(logprobs.exp() * logprobs).sum(-1),
        next_token_logprob=teacher_logits.log_softmax(-1).gather(-1, next_ids[..., None])[..., 0],
    )


def compute_share_of_full(losses: Mapping[str, float]) -> dict[str, float]:
    """Percent of the way from cross-entropy's loss to that of the whole distribution, by name of lesson."""
    start, end = losses["cross-entropy"], losses["whole distribution"]
    return {name: 100 * (start - value) / (start - end) for name, value in losses.items()}
