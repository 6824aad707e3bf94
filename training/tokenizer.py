"""Learns the tokenizer from the training texts; it is saved as one `tokenizer.json` and served as it is."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeVar

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

PAD, UNKNOWN, CLASSIFY, MASK = "[PAD]", "[UNK]", "[CLS]", "[MASK]"
SPECIAL_TOKENS = [PAD, UNKNOWN, CLASSIFY, MASK]
PAD_ID, CLASSIFY_ID, MASK_ID = 0, 2, 3
ENCODED_AT_ONCE = 1000

TokenizerKind = Literal["wordpiece", "bpe"]


def learn_tokenizer(texts: Sequence[str], kind: TokenizerKind, vocabulary: int) -> Tokenizer:
    """A lower-casing tokenizer of at most `vocabulary` entries; every encoding begins with [CLS]."""
    tokenizer = _learn_wordpiece(texts, vocabulary) if kind == "wordpiece" else _learn_bpe(texts, vocabulary)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLASSIFY} $A", special_tokens=[(CLASSIFY, CLASSIFY_ID)]
    )
    return tokenizer


def _learn_wordpiece(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Learned in two passes, so that the same texts always give the same tokenizer.

    The trainer numbers the letters that continue a word in an order that differs from process to process, and ties
    between merges follow the numbers. So a first pass finds those letters, and the second is given them in order.
    """
    most = vocabulary // 4
    alphabet = _most_frequent_letters(texts, most)
    letters = _train_wordpiece(texts, 0, most, alphabet, SPECIAL_TOKENS)
    continuing = sorted(token for token in letters if token.startswith("##"))
    tokenizer = _wordpiece(_train_wordpiece(texts, vocabulary, most, alphabet, [*SPECIAL_TOKENS, *continuing]))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _most_frequent_letters(texts: Sequence[str], most: int) -> list[str]:
    """So many letters where the texts have more, or none: the trainer draws between those that are equally frequent."""
    if len(set().union(*texts)) <= most:
        return []
    normalizer, counts = _wordpiece({}).normalizer, Counter[str]()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    del counts[" "]
    if (left_out := len(counts) - most) > 0:
        tqdm.write(f"{left_out:,} of {len(counts):,} letters have no place in the vocabulary and are read as {UNKNOWN}")
    return sorted(counts, key=lambda letter: (-counts[letter], letter))[:most]


def _train_wordpiece(
    texts: Sequence[str], vocabulary: int, most: int, alphabet: list[str], fixed: list[str]
) -> dict[str, int]:
    """Token to id: `fixed` first, then the `alphabet` or up to `most` letters, then what `vocabulary` has room for."""
    tokenizer = _wordpiece({})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=fixed,
        limit_alphabet=most,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer.get_vocab()


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _learn_bpe(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


Token = TypeVar("Token")


class Window(Protocol):
    """How much of a text is read: `max_tokens`, of which a longer one's last `tail_tokens`."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def tail_tokens(self) -> int: ...


def encode(tokenizer: Tokenizer, texts: Sequence[str], window: Window) -> list[list[int]]:
    """The ids of each text, cut to the window."""
    return [cut(ids, window) for ids in encode_whole(tokenizer, texts)]


def cut(tokens: list[Token], window: Window) -> list[Token]:
    """What the window takes of a text's tokens."""
    if len(tokens) <= window.max_tokens:
        return tokens
    return tokens[: window.max_tokens - window.tail_tokens] + tokens[len(tokens) - window.tail_tokens :]


def encode_whole(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """All ids of each text, some texts at a time: the library's encodings take a hundred bytes a token."""
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + ENCODED_AT_ONCE])):
            yield encoding.ids


def encode_offsets(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[tuple[int, int]]]:
    """The characters of its text that each token stands for; none for the first, [CLS]."""
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        for encoding in tokenizer.encode_batch(list(texts[start : start + ENCODED_AT_ONCE])):
            yield encoding.offsets
