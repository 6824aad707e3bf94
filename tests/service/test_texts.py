"""A text is read only as far as the model reads it, and nobody can tell."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service import texts
from service.bundle import Bundle
from service.texts import Encoded, encode, encode_beginning
from tests.service.fakes import byte_tokenizer, fake_bundle
from training.tokenizer import TokenizerKind, learn_tokenizer

Kind = TokenizerKind | Literal["bytes"]
KINDS: tuple[Kind, ...] = ("wordpiece", "bpe", "bytes")
LEARNED_FROM = ["It'll be a charming film, they've said; isn't it?", "Café d'été, 99 %!", "日本の映画 très naïve"] * 3
PIECES = [
    *["film", "charming", "FILM", "it'll", "they've", "'", "'l", "d", "l", "99", "%", "!", "...", "[CLS]", "[MASK]"],
    *[" ", "  ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff"],
    *["\0", "\ufffd", "\u0301", "\u0323\u0301", "\u302e", "\U0001d165", "\U0001d16d", "e\u0301", "é", "İ", "ß", "Σ"],
    *["日本", "ひらがな", "한국", "\u1112\u1161\u11ab", "фильм", "ไทย", "🎬", "👩\u200d🚀", "x" * 101, "😀" * 30],
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=60).map("".join)


@cache
def bundle_of(kind: Kind, max_tokens: int) -> Bundle:
    bundle = fake_bundle()
    return replace(
        bundle, manifest=bundle.manifest.model_copy(update={"max_tokens": max_tokens}), tokenizer=tokenizer(kind)
    )


@cache
def tokenizer(kind: Kind) -> Tokenizer:
    made = byte_tokenizer() if kind == "bytes" else learn_tokenizer(LEARNED_FROM, kind, 320)
    made.encode_special_tokens = True  # as of a bundle that was loaded
    return made


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, max_tokens=st.integers(1, 20))
@example(text="film" * 30, max_tokens=6)  # too long for a word, as its beginning is not
@example(text="it is" + " " * 90 + "a", max_tokens=4)
@example(text="a" + "\0" * 90 + "b", max_tokens=2)
@example(text="\u0301" * 90, max_tokens=2)
def test_a_text_read_in_part_has_the_ids_of_the_whole(kind: Kind, text: str, max_tokens: int) -> None:
    bundle = bundle_of(kind, max_tokens)
    (whole,) = bundle.tokenizer.encode_batch_fast([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "READ_AT_FIRST", 1)  # so that it often ends near what the model takes
        patch.setattr(texts, "READ_NEXT", 2)
        (found,) = encode(bundle, [text])
    assert found == Encoded(whole.ids[:max_tokens], len(whole) > max_tokens)
    assert found.is_empty == (len(whole) <= 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["A charming film, they've said. ", "日本。", "\xa0film", "1-"])
def test_little_is_read_of_a_long_text_with_or_without_blanks(kind: Kind, text: str) -> None:
    assert encode_beginning(bundle_of(kind, 16), text * 10_000) is not None
    assert encode_beginning(bundle_of(kind, 16), "x" * 10_000) is None
