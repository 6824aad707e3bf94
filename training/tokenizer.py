"""Learns the tokenizer from the training texts; it is saved as one `tokenizer.json` and served as it is."""

from collections.abc import Sequence
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNKNOWN, CLASSIFY, MASK = "[PAD]", "[UNK]", "[CLS]", "[MASK]"
SPECIAL_TOKENS = [PAD, UNKNOWN, CLASSIFY, MASK]
PAD_ID, CLASSIFY_ID, MASK_ID = 0, 2, 3

TokenizerKind = Literal["wordpiece", "bpe"]


def learn_tokenizer(texts: Sequence[str], kind: TokenizerKind, vocabulary: int) -> Tokenizer:
    """A lower-casing tokenizer of at most `vocabulary` entries; every encoding begins with [CLS]."""
    tokenizer, trainer = _wordpiece(vocabulary) if kind == "wordpiece" else _bpe(vocabulary)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLASSIFY} $A", special_tokens=[(CLASSIFY, CLASSIFY_ID)]
    )
    return tokenizer


def _wordpiece(vocabulary: int) -> tuple[Tokenizer, trainers.WordPieceTrainer]:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, show_progress=False
    )


def _bpe(vocabulary: int) -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The first `max_tokens` ids of each text."""
    return [encoding.ids[:max_tokens] for encoding in tokenizer.encode_batch_fast(list(texts))]
