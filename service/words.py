"""Plain texts to ids: what they say they mostly say in words that were cut before, and need not be cut again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

MOST_WORDS = 20_000  # in memory: 3 MB of ordinary ones, 8 at worst, for each bundle
LONGEST_WORD = 32  # letters; a longer one is rare, and dear to keep
NEW_WORDS = 8  # of one text; of more of them the tokenizer makes ids faster, all at once
ODD = re.compile(r"[^\t\n\r -~]")
WORD = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")


class WordIds:
    """The ids of single words under one tokenizer.

    Within ASCII, BERT's normalizer does no more than lower the case and take every blank for a space, and its
    pre-tokenizer splits at these and around every sign. So there, and there only, a text's ids are those of its words.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer.encode("").ids  # the class token
        self._known: dict[str, Sequence[int]] = {}

    def ids(self, text: str) -> list[int] | None:
        """All of a text's ids; None where it is not plain, or has too many new words for this to be the faster way."""
        if not text.isascii() or not (text.isprintable() or ODD.search(text) is None):
            return None
        ids, known, new = self._before.copy(), self._known, 0
        for word in WORD.findall(text.lower()):
            found = known.get(word)
            if found is None:
                new += 1
                if new > NEW_WORDS or len(word) > LONGEST_WORD:
                    return None
                found = self._learn(word)
            ids += found
        return ids

    def _learn(self, word: str) -> Sequence[int]:
        if len(self._known) >= MOST_WORDS:
            self._known.clear()  # the common ones are back at once
        (cut,) = self._tokenizer.encode_batch_fast([word])
        found = self._known[word] = tuple(cut.ids[len(self._before) :])
        return found


def word_ids(tokenizer: Tokenizer) -> WordIds | None:
    """None where the tokenizer cuts by other rules than BERT's for lower case, or puts anything behind a text."""
    document = json.loads(tokenizer.to_str())
    normalizer, template = document["normalizer"] or {}, document["post_processor"] or {}
    alike = (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and normalizer["lowercase"]
        and document["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and document["model"]["type"] == "WordPiece"
        and (not template or (template["type"] == "TemplateProcessing" and "Sequence" in template["single"][-1]))
        and tokenizer.encode_special_tokens
        and all(token["special"] for token in document["added_tokens"])
    )
    return WordIds(tokenizer) if alike else None
