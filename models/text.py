"""Sentences to UMT5 embeddings: the reference's cleaning, the same tokens as in training, zero padding.

There is no attention mask in the DiT's cross-attention, so the padded length is part of the model and padding
is exactly zero. A sentence longer than the model's `text_tokens` is cut before the encoder, not after. Only functions
that compute import torch: commands that only read sentences import this file too.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers of Hangul, the empty cell of Braille


def clean(text: str, *, lowercase: bool) -> str:
    """The cleaned sentence for the encoder. Cleaning is not idempotent (entities), so do it once.

    White space runs become one space, HTML entities are unescaped once (resulting white space stays), double
    quotes and backslashes are removed. The training sets are lower-cased before this.
    """
    if lowercase:
        text = text.lower()
    text = re.sub(r"\s+", " ", text).strip()
    text = html.unescape(text)
    return re.sub(r'["\\]+', "", text)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no surrogates, which stand for bytes that are not text."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)


def has_words(cleaned: str) -> bool:
    """Whether a cleaned sentence has a visible character: a letter, a digit or a sign."""
    return any(unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANK_LETTERS for letter in cleaned)


def pad(embedding: "Tensor", length: int) -> "Tensor":
    """Embedding [L D] -> [length D], zeros after the last token; L <= length."""
    assert embedding.shape[0] <= length, f"{embedding.shape[0]} tokens do not fit in {length}"
    from torch.nn.functional import pad as pad_tensor

    return pad_tensor(embedding, (0, 0, 0, length - embedding.shape[0]))


class Embeds(Protocol):
    """Returns the embedding of a sentence: a text encoder, or a store of its results."""

    def __call__(self, text: str, *, max_tokens: int) -> "Tensor":
        """Embedding [L D] of cleaned text, L <= max_tokens, unpadded."""


class RecentTexts:
    """A text encoder that keeps its newest results on their device: windows of a video need the same sentences."""

    def __init__(self, encoder: "TextEncoder", *, most_bytes: int = 128 << 20) -> None:
        """most_bytes: for all embeddings; 128 MiB hold 1,600 sentences of 10 tokens of UMT5-XXL in bf16."""
        self.encoder, self._most_bytes = encoder, most_bytes
        self._kept: dict[tuple[str, int], Tensor] = {}  # the newest last

    def __call__(self, text: str, *, max_tokens: int) -> "Tensor":
        """Embedding [L D] of cleaned text, L <= max_tokens, unpadded, as from `TextEncoder`."""
        found = self._kept.pop((text, max_tokens), None)
        if found is None:
            found = self.encoder(text, max_tokens=max_tokens)
        self._kept[text, max_tokens] = found
        while sum(one.nbytes for one in self._kept.values()) > self._most_bytes:
            del self._kept[next(iter(self._kept))]
        return found


class TextEncoder:
    """A frozen UMT5 encoder with its tokenizer; it never pads, so no sentence depends on others."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", model: "UMT5EncoderModel") -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    def token_ids(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Ids of cleaned text; the last one is the end of sentence, also when cut to `max_tokens`."""
        return self.tokenizer(text, truncation=max_tokens is not None, max_length=max_tokens)["input_ids"]

    def token_count(self, text: str) -> int:
        """Number of tokens of cleaned text, with the end of sentence, without a cut."""
        return len(self.token_ids(text))

    def __call__(self, text: str, *, max_tokens: int) -> "Tensor":
        """Embedding [L D] of cleaned text, L <= max_tokens, unpadded, in the dtype of the weights."""
        return self.together([self.token_ids(text, max_tokens=max_tokens)])[0]

    def together(self, ids: Sequence[Sequence[int]]) -> "Tensor":
        """Embeddings [B L D] of sentences of L tokens each, as from `token_ids`, in the dtype of the weights.

        There is no padding, so no sentence depends on another. Products of other sizes may round differently.
        """
        import torch

        from flowmask.models.device import to_device

        tokens = to_device(torch.tensor(ids), self.model.device)
        with torch.no_grad():
            return self.model(input_ids=tokens).last_hidden_state  # transformers reads the values of a mask
