"""manifest.json: what a prepared corpus holds. It is written last, so a folder that has it is complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.places import command
from engine.errors import UserError
from engine.records.files import write_whole
from engine.records.fingerprints import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
MANIFEST = "manifest.json"
COMMAND = command("prepare_data")


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    path: str
    weight: float
    sha256: str
    """Hash of the bytes that were read (see SourceReader.digest)."""
    stamp: str
    """Hash of options, file sizes and times: another one means that the source must be read again."""
    documents: int
    sequences: int
    tokens: int
    dropped: int
    """Sequences that were shorter than min_tokens."""
    bad_lines: int
    cut: int = 0
    """Units longer than a sequence, of which only the beginning was kept."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    file: str
    source: int
    """Index into Manifest.sources."""
    sequences: int
    tokens: int
    size: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    """Largest token id + 1."""
    seq_len: int
    pack: str
    unit: str
    short_seq_prob: float
    min_tokens: int
    shard_mb: int
    seed: int
    on_bad_line: str
    sources: list[SourceEntry]
    shards: list[ShardEntry]
    version: int = VERSION

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def sequences(self) -> int:
        return sum(source.sequences for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all sources, special ones included."""
        return sum(source.tokens for source in self.sources)

    @property
    def fill(self) -> float:
        """Share of the positions of all sequences that hold a token."""
        return self.tokens / (self.sequences * self.seq_len)

    def write(self, folder: Path) -> None:
        totals = {"documents": self.documents, "sequences": self.sequences, "tokens": self.tokens, "fill": self.fill}
        text = json.dumps({**asdict(self), "totals": totals}, indent=1) + "\n"
        write_whole(folder / MANIFEST, text.encode())


def load_manifest(path: str | Path) -> Manifest:
    """Reads the manifest of the corpus folder `path`. Raises UserError when it is missing, unreadable or unfinished."""
    folder = Path(path)
    file = folder / MANIFEST
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder that {COMMAND} wrote (it reads text, with --sources)")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; prepare a corpus with {COMMAND} --output_dir {folder}")
    if not file.is_file():
        if any(folder.glob("shard-*")):
            raise UserError(
                f"{folder}: the corpus is not finished (shards, but no {MANIFEST}); start {COMMAND} --output_dir "
                f"{folder} again, it redoes only what is missing"
            )
        raise UserError(f"{folder}: not a prepared corpus (no {MANIFEST}); prepare one with {COMMAND}")
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        if values["version"] != VERSION:
            raise UserError(
                f"{file}: format {values['version']}, but this program reads {VERSION}; run {COMMAND} again"
            )
        del values["totals"]
        values["sources"] = [SourceEntry(**entry) for entry in values["sources"]]
        values["shards"] = [ShardEntry(**entry) for entry in values["shards"]]
        manifest = Manifest(**values)
        _check_sums(file, manifest)
        return manifest
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file}: unreadable ({type(error).__name__}: {error}); run {COMMAND} again") from error


def _check_sums(file: Path, manifest: Manifest) -> None:
    """Raises UserError where a source does not have what its shards have together: a number was changed, and batches
    would be asked for sequences that are not there."""
    for name in ("sequences", "tokens"):
        sums = [0] * len(manifest.sources)
        for shard in manifest.shards:
            sums[shard.source] += getattr(shard, name)
        for number, (source, found) in enumerate(zip(manifest.sources, sums, strict=True)):
            if getattr(source, name) != found:
                raise UserError(
                    f"{file}: sources[{number}] ({source.path}) has {name}={getattr(source, name)}, but its shards "
                    f"have {found} together; copy it again, or run {COMMAND} again"
                )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that decides how text becomes ids; not of truncation and padding, which are settings
    of a call.
    """
    # until transformers > 5.23: a call leaves its truncation and padding on the backend
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def check_tokenizer(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when the corpus was not tokenised with `tokenizer`."""
    found = tokenizer_sha256(tokenizer)
    if found != manifest.tokenizer_sha256:
        raise UserError(
            f"data.path: the corpus was tokenised with {manifest.tokenizer} (hash {manifest.tokenizer_sha256[:12]}), "
            f"but the model's tokenizer is {tokenizer.name_or_path} (hash {found[:12]}); prepare the corpus again with "
            f"{COMMAND} --tokenizer {tokenizer.name_or_path}"
        )


def corpus_hash(manifest: Manifest) -> str:
    return digest([[shard.sha256 for shard in manifest.shards], [source.weight for source in manifest.sources]])
