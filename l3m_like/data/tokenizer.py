"""Text to token ids and back: bytes, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l3m_like.core.errors import UserError
from l3m_like.data.paths import DataMissing, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES = 256
#: what the end-of-document token is called in published tokenizers
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class TextTokenizer:
    """What text processors share. The constructor reads no file.

    Args:
        path: ``"bytes"`` (UTF-8 bytes 0..255, and 256 = end of document) or the path of a Hugging Face ``tokenizer.json`` (read
            at first use).
        vocab_size: the model's. With bytes exactly 257; with a file at least its number of tokens (published models have more
            rows than tokens, for alignment).
        end: the end-of-document token of a ``tokenizer.json``, by its text; None: the first of ``END_NAMES`` that it has.

    Raises:
        UserError: ``vocab_size`` disagrees with the tokenizer; unknown end token.
    """

    def __init__(self, path: str, vocab_size: int, end: str | None = None) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.end = end
        if self.is_bytes:
            if vocab_size != BYTES + 1:
                raise UserError(
                    f"vocab_size is {vocab_size}, but tokenizer 'bytes' has {BYTES + 1} tokens (256 bytes and the end of a "
                    f"document). Set vocab_size: {BYTES + 1}."
                )
            if end is not None:
                raise UserError(f"end: '{end}' has no meaning with tokenizer 'bytes' (its end is {BYTES}). Remove it.")

    @property
    def is_bytes(self) -> bool:
        return self.path == "bytes"

    @cached_property
    def end_id(self) -> int:
        """The id of the end-of-document token."""
        if self.is_bytes:
            return BYTES
        names = END_NAMES if self.end is None else (self.end,)
        found = [token for token in map(self.id_of, names) if token is not None]
        if not found:
            raise UserError(f"end: {self.path} has none of the tokens {list(names)}. Name its end token in `end`.")
        return found[0]

    def id_of(self, token: str) -> int | None:
        """The id of the token that is called ``token``, None if there is none (bytes have no names)."""
        return None if self.is_bytes else self._file.token_to_id(token)

    def encode(self, text: str) -> np.ndarray:
        """ids int64 [T] of ``text``, without the end token."""
        if self.is_bytes:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
        # of a batch: that call lets other threads run meanwhile, which the one for a single text does not
        (encoding,) = self._file.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64)

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """``encode(text)``, and int64 [T, 2]: the characters (first, after the last) of ``text`` that each token is made from.

        The tokens of one character that has several of them all span that character.
        """
        if self.is_bytes:
            points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)  # UTF-8 bytes
            first = np.repeat(np.arange(len(points)), sizes)
            return self.encode(text), np.stack([first, first + 1], axis=1)
        (encoding,) = self._file.encode_batch([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the end token gives nothing, broken UTF-8 the replacement character."""
        if self.is_bytes:
            return bytes(token for token in ids if token < BYTES).decode("utf-8", errors="replace")
        return self._file.decode([int(token) for token in ids if token != self.end_id])

    def show(self, ids: Sequence[int]) -> str:
        """As ``decode``, for people: special tokens by their text; the end of a document with bytes is ``<end>``."""
        if self.is_bytes:
            return "<end>".join(self.decode(part) for part in _split(ids, BYTES))
        return self._file.decode([int(token) for token in ids], skip_special_tokens=False)

    def write(self, folder: Path) -> None:
        """Copy a ``tokenizer.json`` to ``folder``, and beside it what transformers reads its class and end token from."""
        shutil.copyfile(self._place, folder / "tokenizer.json")
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._file.id_to_token(self.end_id)}
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for, [V]; special tokens, and ids that are no tokens, stand for none."""
        if self.is_bytes:
            return [bytes([byte]) for byte in range(BYTES)] + [b""]
        special = {id for id, token in self._file.get_added_tokens_decoder().items() if token.special}
        names = {id: name for name, id in self._file.get_vocab(with_added_tokens=True).items() if id not in special}
        of = _byte_level if "ByteLevel" in str(self._file.decoder) else _by_pieces
        return [of(names[id]) if id in names else b"" for id in range(self.vocab_size)]

    @property
    def _place(self) -> Path:
        """Where the file is."""
        folder = Path(self.path).expanduser()
        if (folder / "tokenizer.json").is_file():
            raise UserError(f"tokenizer: '{self.path}' is a folder. Name the file in it: {folder / 'tokenizer.json'}.")
        try:
            (path,) = resolve(self.path)
        except DataMissing as error:
            place = "is a folder without a tokenizer.json" if folder.is_dir() else f"is not there: no file at {folder.absolute()}"
            fix = "Give the path of a Hugging Face tokenizer.json, or 'bytes'."
            raise DataMissing(self.path, f"tokenizer: '{self.path}' {place}. {fix}") from error
        return path

    @cached_property
    def _file(self) -> Tokenizer:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own threads would only get in the way of ours
        from tokenizers import Tokenizer, processors  # heavy, and not needed for bytes

        path = self._place
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer: {path} is not a tokenizer.json: {error}") from error
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if size > self.vocab_size:
            raise UserError(
                f"vocab_size is {self.vocab_size}, but tokenizer '{self.path}' has {size} tokens. Set vocab_size: {size} or more."
            )
        # the file's own would add special tokens, which nothing here asks for, or leave spaces out of the tokens' spans
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
        return tokenizer


def _split(ids: Sequence[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == at:
            parts.append([])
        else:
            parts[-1].append(int(token))
    return parts


def _byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary (GPT-2, Llama 3, Qwen), in which every byte is written as one character."""
    return bytes(_BYTE_OF[character] for character in token) if all(c in _BYTE_OF for c in token) else token.encode()


def _by_pieces(token: str) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary: a space is written as U+2581, a byte without a token as ``<0xE2>``."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_of() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of()
