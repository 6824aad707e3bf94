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
from service.texts import Encoded, encode, encode_ends
from tests.service.fakes import byte_tokenizer, fake_bundle
from tests.tiny import Window
from training.tokenizer import TokenizerKind, cut, learn_tokenizer

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
def bundle_of(kind: Kind, max_tokens: int, tail_tokens: int = 0) -> Bundle:
    bundle = fake_bundle()
    window = {"max_tokens": max_tokens, "tail_tokens": tail_tokens}
    return replace(bundle, manifest=bundle.manifest.model_copy(update=window), tokenizer=tokenizer(kind))


@cache
def tokenizer(kind: Kind) -> Tokenizer:
    made = byte_tokenizer() if kind == "bytes" else learn_tokenizer(LEARNED_FROM, kind, 320)
    made.encode_special_tokens = True  # as of a bundle that was loaded
    return made


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, window=st.integers(1, 20).flatmap(lambda most: st.tuples(st.just(most), st.integers(0, most - 1))))
@example(text="film" * 30, window=(6, 0))  # too long for a word, as its beginning is not
@example(text="film" * 30, window=(6, 3))
@example(text="it is" + " " * 90 + "a", window=(4, 0))
@example(text="a" + " " * 90 + "it is", window=(4, 2))
@example(text="a" + "\0" * 90 + "b", window=(2, 0))
@example(text="\u0301" * 90, window=(2, 0))
@example(text="\u0301" * 90, window=(2, 1))
@example(text="a film. " * 9 + "\u0301" * 9 + "e\u0301 it'll", window=(9, 5))
def test_a_text_read_in_part_has_the_ids_of_the_whole(kind: Kind, text: str, window: tuple[int, int]) -> None:
    bundle = bundle_of(kind, *window)
    (whole,) = bundle.tokenizer.encode_batch_fast([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "READ_AT_FIRST", 1)  # so that it often ends near what the model takes
        patch.setattr(texts, "READ_NEXT", 2)
        (found,) = encode(bundle, [text])
    assert found == Encoded(cut(whole.ids, Window(*window)), len(whole) > window[0])
    assert found.is_empty == (len(whole) <= 1)


@pytest.mark.parametrize("read", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_wherever_the_cut_falls_the_ids_are_those_of_the_whole(
    kind: Kind, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "READ_AT_FIRST", read)
    monkeypatch.setattr(texts, "READ_NEXT", read)
    said = "It'll be e\u0301 99 % a b c ... they've 'll d'été? i 't s ! " * 4
    for end in range(40):
        text = said[: len(said) - end]
        (whole,) = tokenizer(kind).encode_batch_fast([text])
        for most in range(2, 20):
            for tail_tokens in range(0, most, 3):
                (found,) = encode(bundle_of(kind, most, tail_tokens), [text])
                assert found.ids == cut(whole.ids, Window(most, tail_tokens)), (text, most, tail_tokens)


@pytest.mark.parametrize("tail_tokens", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["A charming film, they've said. ", "日本。", "\xa0film", "1-"])
def test_little_is_read_of_a_long_text_with_or_without_blanks(kind: Kind, text: str, tail_tokens: int) -> None:
    assert encode_ends(bundle_of(kind, 16, tail_tokens), text * 10_000) is not None
    assert encode_ends(bundle_of(kind, 16, tail_tokens), "x" * 10_000) is None
