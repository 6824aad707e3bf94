"""The tokenizer: [CLS] first, lower case, no larger than asked for, the same in every process and from a file."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.tiny import Window
from tests.training.easy import easy_records
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS, TokenizerKind, encode, learn_tokenizer

TEXTS = [record["text"] for record in easy_records(60)] + ["Café d'été, 99 %!"]
KINDS: tuple[TokenizerKind, ...] = ("wordpiece", "bpe")
MANY_LETTERS = ["".join(map(chr, range(first, first + 10))) for first in range(0x4E00, 0x4E00 + 200, 10)]
"""More than 300 entries give room to, each as frequent as all others."""
LEARN = """
import hashlib
from tests.training.test_tokenizer import MANY_LETTERS, TEXTS
from training.tokenizer import learn_tokenizer
for texts in TEXTS, MANY_LETTERS:
    print(hashlib.sha256(learn_tokenizer(texts, {kind!r}, 300).to_str().encode()).hexdigest())
"""


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return learn_tokenizer(TEXTS, request.param, 300)


def test_every_text_begins_with_cls(tokenizer: Tokenizer) -> None:
    for ids in encode(tokenizer, [*TEXTS, "unheard-of words", "x"], Window(16)):
        assert ids[0] == CLASSIFY_ID
        assert len(ids) > 1
        assert CLASSIFY_ID not in ids[1:]


def test_the_special_tokens_stand_where_the_model_expects_them(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (PAD_ID, CLASSIFY_ID, MASK_ID) == (0, 2, 3)
    assert tokenizer.decode([CLASSIFY_ID, PAD_ID]) == "", "special tokens are none of the text"


def test_case_makes_no_difference(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, ["A CHARMING Film"], Window(16)) == encode(tokenizer, ["a charming film"], Window(16))


def test_words_come_back_as_they_went_in(tokenizer: Tokenizer) -> None:
    text = "a charming film was awful"
    assert tokenizer.decode(encode(tokenizer, [text], Window(64))[0]).strip() == text


@pytest.mark.parametrize("tail_tokens", [0, 1, 3, 6])
def test_of_long_texts_the_beginning_and_the_end_are_read(tail_tokens: int, tokenizer: Tokenizer) -> None:
    text = "a charming film , then a dull one"
    whole = tokenizer.encode(text).ids
    (long,) = encode(tokenizer, [text], Window(7, tail_tokens))
    assert long == whole[: 7 - tail_tokens] + whole[len(whole) - tail_tokens :]
    assert encode(tokenizer, [text], Window(len(whole), tail_tokens)) == [whole]


@pytest.mark.parametrize(("kind", "vocabulary"), [("wordpiece", 40), ("wordpiece", 300), ("bpe", 260), ("bpe", 300)])
def test_the_vocabulary_is_never_larger_than_asked_for(kind: TokenizerKind, vocabulary: int) -> None:
    letters = "".join(map(chr, range(ord("ა"), ord("ჰ") + 1)))  # 33 Georgian letters that follow one another
    assert learn_tokenizer([*TEXTS, letters], kind, vocabulary).get_vocab_size() <= vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_letters_never_seen_are_encoded_all_the_same(kind: TokenizerKind) -> None:
    assert len(encode(learn_tokenizer(TEXTS, kind, 300), ["日本 🎬 ж"], Window(32))[0]) > 1


def test_it_comes_back_from_a_file_as_it_was(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert encode(again, TEXTS, Window(16)) == encode(tokenizer, TEXTS, Window(16))
    assert again.to_str() == tokenizer.to_str()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer_in_every_process(kind: TokenizerKind) -> None:
    learned = [learn_tokenizer(texts, kind, 300).to_str() for texts in (TEXTS, MANY_LETTERS)]
    here = [hashlib.sha256(one.encode()).hexdigest() for one in learned]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LEARN.format(kind=kind)]
    there = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert [line for line in there.stdout.split() if len(line) == 64] == here


def test_many_texts_are_encoded_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.tokenizer.ENCODED_AT_ONCE", 7)
    texts = [record["text"] for record in easy_records(30)]
    learned = learn_tokenizer(texts, "wordpiece", 300)
    assert encode(learned, texts, Window(9)) == [learned.encode(text).ids[:9] for text in texts]
