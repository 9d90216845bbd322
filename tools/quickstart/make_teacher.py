"""Train the small causal language model that ships with the project as the quickstart's teacher.

    python -m tools.quickstart.make_teacher --extra-root .venv/lib/python3.11/site-packages --steps 5000

The text is the standard library (test suites included, held-out files excluded) and, for breadth, the Python source
of whatever packages lie below `--extra-root`. Half of every batch comes from each. Needs two CPU cores for about an
hour and a half; stops and resumes at a checkpoint. What came out last is described in `teacher/README.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.quickstart.corpus import build_stdlib_root, is_held_out, read_sources

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 512
# Words with at most one leading space, single digits, runs of punctuation, and indentation as one piece: code is
# mostly names and indentation, and a number should not become a rare token.
PRE_TOKENS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+[ \t]*|[ \t]+|\s+"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE ids over the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, model_max_length=SEQUENCE_LENGTH
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Every text followed by end-of-text, in one uint16 run."""
    runs = []
    for start in range(0, len(texts), 256):
        for token_ids in tokenizer(texts[start : start + 256], verbose=False)["input_ids"]:
            runs.append(np.array([*token_ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(runs)


def read_extra(roots: list[Path], seen: set[bytes]) -> Iterator[str]:
    """Texts below the roots that are not copies of one another or of anything in `seen`."""
    for root in roots:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            for _, text in read_sources(folder, with_tests=True):
                digest = hashlib.sha256(text.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield text


def prepare(work: Path, extra_roots: list[Path]) -> None:
    """Write the tokenizer and the three token runs (library, extra, held out) below `work`, once."""
    if (work / "held_out.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    library: list[str] = []
    held_out: list[str] = []
    for path, text in read_sources(build_stdlib_root(), with_tests=True):
        (held_out if is_held_out(path) else library).append(text)
    seen = {hashlib.sha256(text.encode()).digest() for text in library + held_out}
    extra = list(read_extra(extra_roots, seen))
    tokenizer = train_tokenizer(library + extra[:: max(1, len(extra) // 4000)])
    tokenizer.save_pretrained(work / "tokenizer")
    for name, texts in (("library", library), ("extra", extra or library), ("held_out", held_out)):
        token_ids = tokenize(tokenizer, texts)
        print(
            f"{name}: {len(texts):,} files, {len(token_ids):,} tokens, "
            f"{sum(map(len, texts)) / len(token_ids):.2f} characters per token",
            flush=True,
        )
        np.save(work / f"{name}.npy", token_ids)


def build_model() -> LlamaForCausalLM:
    """The teacher with fresh weights: 5.5 million parameters, 11 MB in bfloat16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def build_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside the layers, AdamW for everything else, each with its peak learning rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [(muon, 4e-3), (adamw, 4e-3)]


def compute_schedule(step: int, steps: int, *, warmup: int = 100, decay_part: float = 0.35) -> float:
    """Warm-up, stable, then 1 - sqrt decay to zero over the last part."""
    decay_start = steps - int(steps * decay_part)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return 1.0 - math.sqrt((step - decay_start) / (steps - decay_start))


def draw_batch(runs: list[np.ndarray], step: int, sequences: int) -> torch.Tensor:
    """[sequences, SEQUENCE_LENGTH + 1] ids: the same number of random windows of every run, fixed by the step."""
    generator = np.random.Generator(np.random.Philox(key=step))
    windows = [
        run[start : start + SEQUENCE_LENGTH + 1].astype(np.int64)
        for run in runs
        for start in generator.integers(0, len(run) - SEQUENCE_LENGTH - 1, sequences // len(runs))
    ]
    return torch.from_numpy(np.stack(windows))


def compute_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per token of a [sequences, SEQUENCE_LENGTH + 1] batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, run: np.ndarray, sequences: int = 256) -> float:
    """Mean held-out loss in nats per token over evenly spaced windows."""
    starts = np.linspace(0, len(run) - SEQUENCE_LENGTH - 1, sequences).astype(int)
    batch = torch.from_numpy(np.stack([run[s : s + SEQUENCE_LENGTH + 1].astype(np.int64) for s in starts]))
    return float(np.mean([compute_loss(model, part).item() for part in batch.split(16)]))


def train(work: Path, steps: int, sequences: int) -> LlamaForCausalLM:
    """Train to `steps`, resuming from the checkpoint below `work` where there is one."""
    torch.manual_seed(0)
    model = build_model()
    optimizers = build_optimizers(model)
    checkpoint_path, first_step = work / "checkpoint.pt", 0
    if checkpoint_path.exists():
        checkpoint: dict[str, Any] = torch.load(checkpoint_path)
        model.load_state_dict(checkpoint["model"])
        for (optimizer, _), state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = checkpoint["step"]
    runs = [np.load(work / f"{name}.npy", mmap_mode="r") for name in ("library", "extra")]
    held_out = np.load(work / "held_out.npy", mmap_mode="r")
    compute_compiled_loss = torch.compile(compute_loss, dynamic=False)  # twice the tokens per second on a CPU
    started = time.monotonic()
    for step in range(first_step, steps):
        scale = compute_schedule(step, steps)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        loss = compute_compiled_loss(model, draw_batch(runs, step, sequences))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            line = {"step": step + 1, "loss": round(loss.item(), 4), "lr": round(scale, 4), "seconds": round(seconds)}
            if (step + 1) % 500 == 0 or step + 1 == steps:
                line["held_out_loss"] = round(evaluate(model, held_out), 4)
                torch.save(
                    {
                        "model": model.state_dict(),
                        "step": step + 1,
                        "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                    },
                    checkpoint_path.with_suffix(".tmp"),
                )
                checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)
            print(json.dumps(line), flush=True)
    return model


CARD = """# The quickstart's teacher

A Llama of {parameters:,} parameters ({layers} layers of width {width}, {vocab_size} byte-level BPE ids, sequences of
{length} tokens), stored in bfloat16. It is a teacher to try things with, not a model to use.

- Held-out loss, as shipped: **{loss:.4f} nats per token**, {bits:.3f} bits per byte, on the library files that
  `corpus.is_held_out` names ({held_out_files} here). The quickstart evaluates its students on some of these.
- Training: {steps:,} steps of {sequences} sequences, {tokens:.1f} million tokens, by
  `tools/quickstart/make_teacher.py`.
- Text, half of every batch each: source of the Python {python} standard library, tests included
  ({library:.1f} million tokens), and Python source of the packages in the project's own environment, such as torch,
  transformers and Ray ({extra:.1f} million tokens).

The text is under the PSF licence and the packages' own permissive licences; none of it is shipped here. The weights
are under Apache-2.0 like the rest of the project.
"""


def write_card(output: Path, work: Path, model: LlamaForCausalLM, *, steps: int, sequences: int, loss: float) -> None:
    """Describe the finished teacher beside it, from what was measured."""
    held_out = [text for path, text in read_sources(build_stdlib_root(), with_tests=True) if is_held_out(path)]
    bytes_per_token = sum(len(text.encode()) for text in held_out) / len(np.load(work / "held_out.npy", mmap_mode="r"))
    runs = {name: len(np.load(work / f"{name}.npy", mmap_mode="r")) / 1e6 for name in ("library", "extra")}
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        vocab_size=VOCAB_SIZE,
        length=SEQUENCE_LENGTH,
        steps=steps,
        sequences=sequences,
        tokens=steps * sequences * SEQUENCE_LENGTH / 1e6,
        python=platform.python_version(),
        library=runs["library"],
        extra=runs["extra"],
        loss=loss,
        bits=loss / math.log(2) / bytes_per_token,
        held_out_files=len(held_out),
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"), help="tokens and checkpoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--extra-root", type=Path, action="append", default=[])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--sequences", type=int, default=16, help="sequences per step")
    arguments = parser.parse_args()
    prepare(arguments.work, arguments.extra_root)
    model = train(arguments.work, arguments.steps, arguments.sequences)
    model.bfloat16()  # what ships is what is measured
    held_out_loss = evaluate(model, np.load(arguments.work / "held_out.npy", mmap_mode="r"), sequences=512)
    model.save_pretrained(arguments.output)
    PreTrainedTokenizerFast.from_pretrained(arguments.work / "tokenizer").save_pretrained(arguments.output)
    write_card(
        arguments.output,
        arguments.work,
        model,
        steps=arguments.steps,
        sequences=arguments.sequences,
        loss=held_out_loss,
    )
    print(json.dumps({"held_out_loss_bf16": round(held_out_loss, 4)}))


if __name__ == "__main__":
    main()
