"""The text of token ids, from a tokenizer that is on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from logitstore.errors import ConfigError
from logitstore.teacher.protocol import TeacherIdentity

# The text of ids, given the id before them; None where no tokenizer can tell.
FindText = Callable[[int | None, Sequence[int]], str | None]


def find_tokenizer_folder(name: str) -> str | None:
    """Where the files of a tokenizer lie on this machine, looked up without a network; None where they do not."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return name
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except ValueError:  # a folder that is gone is no name of the hub
            return None
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def load_find_text(
    name: str | None, teacher: TeacherIdentity | None, *, may_fetch: bool
) -> tuple[FindText, str | None]:
    """What turns ids into text, and why it cannot where it cannot.

    Args:
        name: folder or name of the tokenizer; None where nobody says which it was.
        teacher: whose tokenizer it has to be; None where that is not known either.
        may_fetch: whether to ask a hub for it.
    """
    if name is None:
        return _find_nothing, "a shard does not say which tokenizer it is of; --tokenizer FOLDER names one"
    try:
        from logitstore.teacher.tokenizer import load_tokenizer
    except ModuleNotFoundError as error:
        return _find_nothing, f"the package {error.name!r} is not installed: pip install 'logitstore[teacher]'"
    folder = find_tokenizer_folder(name)
    if folder is None and not may_fetch:
        return _find_nothing, f"the tokenizer of {name!r} is not on this machine; '--tokenizer {name}' would fetch it"
    try:
        tokenizer = load_tokenizer(folder or name)
    except ConfigError as error:
        return _find_nothing, f"{error} (--tokenizer FOLDER names another)"
    if teacher is not None and tokenizer.fingerprint != teacher.tokenizer_fingerprint:
        return _find_nothing, f"the tokenizer of {name!r} is not the one that the store was captured with"

    def find_text(before: int | None, token_ids: Sequence[int]) -> str:
        # Many tokenizers drop the space before the first token of a text: decode it behind its neighbour.
        if before is None:
            return tokenizer.decode(token_ids)
        prefix, both = tokenizer.decode([before]), tokenizer.decode([before, *token_ids])
        return both.removeprefix(prefix) if both.startswith(prefix) else tokenizer.decode(token_ids)

    return find_text, None


def _find_nothing(before: int | None, token_ids: Sequence[int]) -> None:
    return None


def find_plain_token(token_ids: Iterable[int], find_text: FindText) -> int | None:
    """A token of plain letters, for others to be decoded behind: tokenizers drop the space that begins a text."""
    for token_id in token_ids:
        text = find_text(None, [token_id])
        if text is None:
            return None
        if text.isascii() and text.strip().isalpha():
            return int(token_id)
    return None
