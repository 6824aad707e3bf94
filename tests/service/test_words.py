"""What is looked up word by word has the ids that the tokenizer gives, and what cannot be is left to the tokenizer."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service import words
from service.words import LONGEST_WORD, NEW_WORDS, word_ids
from tests.service.fakes import byte_tokenizer
from training.tokenizer import learn_tokenizer

LEARNED_FROM = ["It'll be a charming film, they've said; isn't it?", "99 % of 1,000 [MASK]"] * 3
PLAIN = "\t\n\r" + string.digits + string.ascii_letters + string.punctuation + " "
PIECES = ["film", "CHARMING", "it'll", "they've", "'", "''", "...", "[CLS]", "##ing", "[UNK]", "  ", "x" * LONGEST_WORD]


def wordpiece() -> Tokenizer:
    made = learn_tokenizer(LEARNED_FROM, "wordpiece", 320)
    made.encode_special_tokens = True  # as of a bundle that was loaded
    return made


TOKENIZER = wordpiece()


def of_tokenizer(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode_batch_fast([text])[0].ids
    return ids


@given(st.lists(st.lists(st.sampled_from(PIECES) | st.text(PLAIN, max_size=6), max_size=6).map("".join), max_size=8))
def test_plain_texts_have_the_tokenizers_ids_at_first_and_once_their_words_are_known(texts: list[str]) -> None:
    known = word_ids(TOKENIZER)
    assert known is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "NEW_WORDS", 100)
        patch.setattr(words, "LONGEST_WORD", 1000)
        for text in [*texts, *texts]:
            assert known.ids(text) == of_tokenizer(text)


@given(st.lists(st.text(max_size=20), max_size=8))
def test_other_texts_have_the_tokenizers_ids_or_none(texts: list[str]) -> None:
    known = word_ids(TOKENIZER)
    assert known is not None
    for text in texts:
        assert known.ids(text) in (None, of_tokenizer(text))


def test_a_text_with_many_new_words_is_for_the_tokenizer_until_they_are_known() -> None:
    known, text = word_ids(TOKENIZER), " ".join(f"word{number}" for number in range(3 * NEW_WORDS))
    assert known is not None
    assert [known.ids(text) is None for _ in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("text", ["caf\u00e9", "a\x0bb", "a\0b", "a\x7fb", "\u65e5\u672c", "x" * (LONGEST_WORD + 1)])
def test_what_is_not_plain_is_for_the_tokenizer(text: str) -> None:
    known = word_ids(TOKENIZER)
    assert known is not None
    assert known.ids(text) is None


def test_words_in_memory_are_bounded_and_forgetting_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 50)
    known = word_ids(TOKENIZER)
    assert known is not None
    for number in range(500):
        text = f"a charming film {number}"
        assert known.ids(text) == of_tokenizer(text)
        assert len(known._known) <= 50


def changed(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    document = json.loads(TOKENIZER.to_str())
    change(document)
    made = Tokenizer.from_str(json.dumps(document))
    made.encode_special_tokens = True
    return made


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["normalizer"].update(lowercase=False),
        lambda document: document["normalizer"].update(clean_text=False),
        lambda document: document.update(normalizer=None),
        lambda document: document.update(pre_tokenizer={"type": "Whitespace"}),
        lambda document: document["post_processor"]["single"].append({"SpecialToken": {"id": "[CLS]", "type_id": 0}}),
        lambda document: document["added_tokens"].append(
            document["added_tokens"][0] | {"id": 5, "content": "film", "special": False}
        ),
    ],
)
def test_a_tokenizer_with_other_rules_is_not_imitated(change: Callable[[dict[str, Any]], None]) -> None:
    assert word_ids(changed(lambda document: None)) is not None
    assert word_ids(changed(change)) is None


def test_nor_is_one_of_another_kind_or_that_knows_special_tokens_in_texts() -> None:
    for other in (byte_tokenizer(), learn_tokenizer(LEARNED_FROM, "bpe", 320), Tokenizer.from_str(TOKENIZER.to_str())):
        assert word_ids(other) is None
