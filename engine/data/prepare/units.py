"""Units of work: the text of one shard, how sources are cut into them, and how one is tokenised and packed.

A unit's shard depends on nothing but its text, its number and the settings, so neither the number of workers nor an
interruption changes a byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config.marks import Mark, settings
from engine.config.tools import PrepareConfig
from engine.data.manifest import tokenizer_sha256
from engine.data.prepare.packing import Packer, SpecialTokens, special_tokens, tokenize
from engine.data.prepare.sources import SourceReader
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # part of every shard's key: raise it when packing changes


@dataclass(frozen=True)
class WorkUnit:
    """The text of one shard: paragraphs on lines of their own, an empty line between documents."""

    index: int
    text: bytes


@dataclass(frozen=True, kw_only=True)
class UnitSettings:
    """All that decides a shard's bytes, beside its text and its number."""

    tokenizer_sha256: str
    vocab_size: int
    special: SpecialTokens
    seq_len: int
    pack: str
    unit: str
    short_seq_prob: float
    min_tokens: int
    seed: int
    format: int = _FORMAT

    @property
    def capacity(self) -> int:
        """Text tokens in a full sequence."""
        return self.seq_len - len(self.special.prefix) - len(self.special.suffix)

    def key(self, unit: WorkUnit) -> str:
        """Returns the hash that identifies the shard that `unit` becomes."""
        head = json.dumps([asdict(self), unit.index], sort_keys=True).encode()
        return hashlib.sha256(head + b"\n" + unit.text).hexdigest()


def unit_settings(config: PrepareConfig, tokenizer: PreTrainedTokenizerBase) -> UnitSettings:
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    found = UnitSettings(
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        special=special_tokens(
            plain_tokenizer(tokenizer.backend_tokenizer.to_str()),
            separator,
            reserved=tokenizer.all_special_ids,
            unknown=tokenizer.unk_token_id,
        ),
        **settings(config, Mark.RESULT) | {"min_tokens": config.least_tokens},
    )
    if found.min_tokens > found.capacity:
        raise UserError(
            f"min_tokens={found.min_tokens}: a sequence of seq_len={config.seq_len} holds only {found.capacity} "
            "text tokens; lower min_tokens or raise seq_len"
        )
    return found


def plain_tokenizer(tokenizer_json: str) -> Any:
    """Returns the tokenizer without what its file may switch on: truncation and padding (all-MiniLM has both), and
    reading "[SEP]" in a text as the special token."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def cut_units(reader: SourceReader, *, unit_bytes: int, first_index: int) -> Iterator[WorkUnit]:
    """Groups the paragraphs of a source. A unit ends before the first document after `unit_bytes`, or inside a
    document after twice as much. So it holds at most three times `unit_bytes` (a line has at most one)."""
    buffer = bytearray()
    index = first_index
    for paragraph in reader:
        if len(buffer) >= (unit_bytes if paragraph.first else 2 * unit_bytes):
            yield WorkUnit(index, bytes(buffer))
            index += 1
            buffer.clear()
        if buffer:
            buffer += b"\n\n" if paragraph.first else b"\n"
        buffer += paragraph.text.encode()
    if buffer:
        yield WorkUnit(index, bytes(buffer))


def pack_unit(backend: Any, unit: WorkUnit, settings: UnitSettings) -> Packer:
    """Tokenises and packs one unit; its sequences still lack the special tokens around them."""
    packer = Packer(
        capacity=settings.capacity,
        pack=settings.pack,
        unit=settings.unit,
        separator=settings.special.separator,
        short_seq_prob=settings.short_seq_prob,
        min_tokens=settings.min_tokens,
        rng=np.random.default_rng([settings.seed, unit.index]),
    )
    documents = [document.split("\n") for document in unit.text.decode().split("\n\n")]
    for document in tokenize(backend, documents, settings.special):
        packer.add_document(document)
    packer.finish()
    return packer
