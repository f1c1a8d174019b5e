# SPDX-License-Identifier: Apache-2.0
"""The tokenizer a GGUF file describes, for byte-level BPE with the `smollm` pre-tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dynsplit.capture import CaptureError

if TYPE_CHECKING:
    from gguf import GGUFReader

_NORMAL_TOKEN = 1  # GGUF token type: plain vocabulary; others are control or unused tokens.


def _byte_of_symbol() -> dict[str, int]:
    """The byte each symbol of a byte-level vocabulary stands for.

    Printable Latin-1 bytes stand for themselves; the others are numbered from U+0100 upwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return table


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CaptureError(f"the GGUF file has no field {key}")
    return field.contents()


class GgufTokenizer:
    """Text to token ids, and token ids to the exact bytes they stand for.

    Special tokens are never parsed out of the text, and none is added.
    """

    def __init__(self, reader: GGUFReader) -> None:
        """Reads vocabulary and merges.

        Raises:
            CaptureError: the file describes another kind of tokenizer.
        """
        model = _field(reader, "tokenizer.ggml.model")
        pre = _field(reader, "tokenizer.ggml.pre")
        if (model, pre) != ("gpt2", "smollm"):
            raise CaptureError(f"tokenizer {model}/{pre} is not supported, only gpt2/smollm")
        tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
        types: list[int] = _field(reader, "tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
        bpe = models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges)
        self._tokenizer = Tokenizer(bpe)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        byte_of = _byte_of_symbol()
        self._is_normal = [kind == _NORMAL_TOKEN for kind in types]
        self._bytes = [
            bytes(byte_of[symbol] for symbol in text) if normal else text.encode()
            for text, normal in zip(tokens, self._is_normal, strict=True)
        ]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._bytes)

    def is_normal(self, token_id: int) -> bool:
        """Whether the token is plain vocabulary, not a control token."""
        return self._is_normal[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of a token; not always valid UTF-8 on its own."""
        return self._bytes[token_id]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; joining their bytes gives back its UTF-8 form."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
