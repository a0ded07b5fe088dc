"""Text to token ids and back: bytes, a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.json.

All three are one class over the `tokenizers` library and one file format, tokenizer.json; the bytes tokenizer is a
byte-level BPE without merges. Text is data only: a document that happens to contain `<|endoftext|>` is spelled out
and never encodes to the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .errors import UserError
from .rules import SMALLEST_BPE

END_OF_TEXT = "<|endoftext|>"
"""Separates documents in the tokenizers made here."""

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"

# End tokens of published tokenizers whose tokenizer_config.json is not at hand.
KNOWN_END_TOKENS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "<|eot_id|>",
    "[SEP]",
)

# A document longer than this is encoded in pieces, so that memory stays bounded.
PIECE_CHARACTERS = 1 << 20
BATCH_CHARACTERS = 1 << 21


class Tokenizer:
    """Encodes text; made by `load_tokenizer`, `byte_tokenizer` or `train_bpe`.

    Attributes: `vocab_size` (ids are below it), `end_token` (id that ends a document), `end_text` (its spelling).
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_text: str) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        end_token = backend.token_to_id(end_text)
        if end_token is None:
            raise UserError(f"the tokenizer has no token {end_text!r}, which should end documents")
        self._backend = backend
        self.end_text = end_text
        self.end_token: int = end_token
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return [token for ids, _ in self._encode_pieces([text]) for token in ids]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Token ids of all texts in a row, the end token after each, as a stream of lists; uses all cores."""
        for ids, ends_document in self._encode_pieces(texts):
            yield [*ids, self.end_token] if ends_document else ids

    def _encode_pieces(self, texts: Iterable[str]) -> Iterator[tuple[list[int], bool]]:
        pieces = (piece for text in texts for piece in _mark_last(_cut(text, PIECE_CHARACTERS)))
        for batch in _batches(pieces, BATCH_CHARACTERS):
            encodings = self._backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for (_, is_last), encoding in zip(batch, encodings, strict=True):
                yield encoding.ids, is_last

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some token ids; bytes that are no UTF-8 become U+FFFD, the end token its spelling."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def fingerprint(self) -> str:
        """Differs between tokenizers that encode or end documents differently."""
        return hashlib.sha256((self._backend.to_str() + self.end_text).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and a tokenizer_config.json that names the end token; both load in transformers."""
        (folder / FILE_NAME).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_text}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder_or_file: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a folder.

    The end token is the `eos_token` of a tokenizer_config.json beside it, else the first known name it has.
    Raises UserError where there is no such file, it is broken, or no end token is found.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"data.tokenizer: {path} is no file; use bytes, bpe:N such as bpe:2048, or a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
    return Tokenizer(backend, _end_text(path, backend))


def byte_tokenizer() -> Tokenizer:
    """Each byte is its own token, id = value; 256 is the end token."""
    vocabulary = {character: byte for byte, character in _byte_alphabet().items()}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, END_OF_TEXT)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens, the end token (id 0) and all bytes included; a small text may give fewer.

    The same texts give the same tokenizer.
    """
    if size < SMALLEST_BPE:
        raise UserError(
            f"tokenizer: bpe:{size} cannot hold all bytes and the end token; use bpe:{SMALLEST_BPE} or more"
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _cut(text, PIECE_CHARACTERS))
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def parse_bpe_size(spec: str) -> int | None:
    """N of `bpe:N`, None where the spec does not start with `bpe`; raises UserError where N is no legal size."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not size.isdecimal():
        raise UserError(f"data.tokenizer: {spec} names no size; use for example bpe:2048")
    if int(size) < SMALLEST_BPE:
        raise UserError(
            f"data.tokenizer: {spec} cannot hold all bytes and the end token; use bpe:{SMALLEST_BPE} or more"
        )
    return int(size)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in byte-level vocabularies: itself if printable, else 256, 257, ..."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


def _end_text(path: Path, backend: tokenizers.Tokenizer) -> str:
    config_path = path.with_name(CONFIG_NAME)
    if config_path.is_file():
        try:
            named = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config_path}: not a JSON object ({error})") from error
        # Older files hold an object with the text in `content`.
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and backend.token_to_id(named) is not None:
            return named
    for name in KNOWN_END_TOKENS:
        if backend.token_to_id(name) is not None:
            return name
    raise UserError(
        f"{path}: no end token found; name one of its tokens in {config_path.name} beside it, "
        f'for example {{"eos_token": "</s>"}}'
    )


def _cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters, cut before a line feed that follows a visible character where there is one.

    Pre-tokenizers that split words never join across such a place, so the pieces encode as the whole would.
    """
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        feed = text.rfind("\n", start + 1, stop)
        while feed > start and text[feed - 1].isspace():
            feed = text.rfind("\n", start + 1, feed)
        stop = feed if feed > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _mark_last(items: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each item with whether it is the last one."""
    for item in items:
        for following in items:
            yield item, False
            item = following
        yield item, True


def _batches(pieces: Iterable[tuple[str, bool]], characters: int) -> Iterator[list[tuple[str, bool]]]:
    """Consecutive pieces grouped until they hold about so many characters."""
    batch: list[tuple[str, bool]] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece[0])
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
