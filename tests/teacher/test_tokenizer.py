from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from logitstore.errors import ConfigError
from logitstore.teacher.tokenizer import TeacherTokenizer, fingerprint_tokenizer, load_tokenizer

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def test_tokenizer_after_saving_and_loading_has_the_same_fingerprint(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == fingerprint_tokenizer(tokenizer)
    assert (loaded.vocab_size, loaded.end_of_text_id) == (len(tokenizer), 0)


def test_fingerprint_of_another_vocabulary_differs(make_tokenizer: MakeTokenizer) -> None:
    assert fingerprint_tokenizer(make_tokenizer(290)) != fingerprint_tokenizer(make_tokenizer(289))


def test_fingerprint_after_encoding_is_unchanged(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer(["some text"] * 3, truncation=True, max_length=2, padding=False)
    assert fingerprint_tokenizer(tokenizer) == before


def test_fingerprint_of_other_special_ids_differs(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert fingerprint_tokenizer(tokenizer) != before


def test_vocab_size_with_ids_left_out_counts_up_to_the_largest(make_tokenizer: MakeTokenizer) -> None:
    class WithGap(PreTrainedTokenizerFast):  # type: ignore[misc]
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "far": 400}

    tokenizer = WithGap(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="<|endoftext|>")
    assert TeacherTokenizer(tokenizer, "gap").vocab_size == 401


def test_encode_of_a_long_text_neither_cuts_nor_warns(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "amet consectetur 123 " * 100
    (token_ids,) = loaded.encode([text])
    assert len(token_ids) > 200
    assert loaded.decode(token_ids) == text


def test_encode_adds_no_special_tokens(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = TeacherTokenizer(make_tokenizer(), "t")
    assert tokenizer.end_of_text_id not in tokenizer.encode(["with open"])[0]


def test_load_of_a_tokenizer_without_end_of_text_is_refused(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected an end-of-text token, found none"):
        load_tokenizer(str(tmp_path))


def test_load_of_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot be loaded: .*; give a folder with a tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_tokenizer_without_torch_works(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from logitstore.teacher.tokenizer import load_tokenizer\n"
        f"print(len(load_tokenizer({str(tmp_path)!r}).encode(['some text'])[0]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 0


def test_chat_template_is_told_apart_from_none_and_from_another(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    found = []
    for template in (None, "{{ messages }}", "{{ messages }}!", {"default": "{{ messages }}", "tools": ""}):
        tokenizer.chat_template = template
        found.append(TeacherTokenizer(tokenizer, "made").chat_template_fingerprint)
    assert found[0] is None
    assert len(set(found)) == 4
