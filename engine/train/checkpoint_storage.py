"""Where the shards of a checkpoint lie: in one folder that all hosts share, or on each host's own disk."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.errors import UserError
from engine.ranks.collectives import gathered
from engine.ranks.runtime import Runtime
from engine.train.checkpoint_files import FileFacts

SEEN_WITHIN_S = 40.0
"""Longer than an NFS client keeps what it knows of a folder (acdirmin, 30 s)."""
Marker = dict[str, Any]
"""Contents of a COMPLETE file."""


@dataclass(frozen=True)
class Written:
    """Files of a checkpoint that one rank has written."""

    host: str
    rank: int
    files: Mapping[str, FileFacts]
    """Facts by name of file."""
    errors: Sequence[str]
    """Errors that it has met, each with its file."""


class Storage(Protocol):
    """Strategy that checkpoint.storage names: whose files lie in the folder that a rank sees."""

    is_keeper: bool
    """Whether this rank looks after the folder that it sees."""
    share: tuple[int, int]
    """Number of the part of a checkpoint's files that this rank checks, and number of parts."""
    where: str
    """Beginning of a message about a file: whose folder it is in."""

    def seen(self, markers: Mapping[str, Marker | None]) -> Marker | None:
        """Returns this host's marker of a checkpoint, from those by host; None where it has none."""
        ...

    def files(self, marker: Marker) -> Collection[str]:
        """Returns the names of the files that are to be in this host's folder."""
        ...

    def in_this_folder(self, written: Sequence[Written]) -> list[Written]:
        """Returns those whose files are in this host's folder."""
        ...

    def mistaken(self, folder: Path, written: Sequence[Written]) -> str | None:
        """Returns what shows that the hosts' folders are not as checkpoint.storage says; None when nothing does."""
        ...

    def require_own_shards(self, tag: str, markers: Mapping[str, Marker | None]) -> None:
        """Raises UserError when ranks are not where their shards are. Collective."""
        ...

    def require_convertible(self, tag: str) -> None:
        """Raises UserError when other ranks or another ZeRO stage cannot read the shards."""
        ...


def storage_of(name: Literal["shared", "local"], runtime: Runtime) -> Storage:
    """Returns what checkpoint.storage names."""
    return SharedFolder(runtime) if name == "shared" else FolderPerHost(runtime)


class SharedFolder:
    """One folder for all hosts; rank 0 keeps it."""

    def __init__(self, runtime: Runtime) -> None:
        self.is_keeper = runtime.is_rank_zero
        self.share = runtime.rank, runtime.world_size
        self.where = ""

    def seen(self, markers: Mapping[str, Marker | None]) -> Marker | None:
        return next(iter(markers.values()))

    def files(self, marker: Marker) -> Collection[str]:
        names: Collection[str] = marker["files"]
        return names

    def in_this_folder(self, written: Sequence[Written]) -> list[Written]:
        return list(written)

    def mistaken(self, folder: Path, written: Sequence[Written]) -> str | None:
        unseen = _not_seen(folder, {name: facts for share in written for name, facts in share.files.items()})
        if not unseen:
            return None
        return (
            f"{', '.join(unseen[:4])}, which other ranks wrote, cannot be seen here: the hosts do not share "
            "output_dir. Name a folder that they share, or set checkpoint.storage=local"
        )

    def require_own_shards(self, tag: str, markers: Mapping[str, Marker | None]) -> None:
        return

    def require_convertible(self, tag: str) -> None:
        return


class FolderPerHost:
    """A folder on each host, with the shards of its ranks; its first rank keeps it."""

    def __init__(self, runtime: Runtime) -> None:
        self._rank = runtime.rank
        self.is_keeper = runtime.local_rank == 0
        self.share = runtime.local_rank, runtime.local_size
        self.where = f"{platform.node()}: "

    def seen(self, markers: Mapping[str, Marker | None]) -> Marker | None:
        return markers.get(platform.node())

    def files(self, marker: Marker) -> Collection[str]:
        names: Collection[str] = marker["on_this_host"]
        return names

    def in_this_folder(self, written: Sequence[Written]) -> list[Written]:
        return [share for share in written if share.host == platform.node()]

    def mistaken(self, folder: Path, written: Sequence[Written]) -> str | None:
        # each host writes the model's states
        own = {name for share in self.in_this_folder(written) for name in share.files}
        of_others = [name for share in written for name in share.files if name not in own]
        if not any((folder / name).exists() for name in of_others):
            return None
        return (
            f"{of_others[0]}, which another host wrote, is here too: the hosts share output_dir. Set "
            "checkpoint.storage=shared"
        )

    def require_own_shards(self, tag: str, markers: Mapping[str, Marker | None]) -> None:
        kept = (markers.get(platform.node()) or {}).get("ranks", ())
        text = f"{platform.node()} keeps ranks {kept} and runs rank {self._rank} now"
        misplaced = [text for text in gathered(text if self._rank not in kept else None) if text is not None]
        if misplaced:
            raise UserError(
                f"cannot continue {tag}: with checkpoint.storage=local shards stay where they were written, but "
                f"{'; '.join(misplaced[:4])}. Restore the order of the hosts, or copy all shards into one shared "
                "output_dir and set checkpoint.storage=shared"
            )

    def require_convertible(self, tag: str) -> None:
        raise UserError(
            f"cannot continue {tag} with other ranks, another ZeRO stage or another layout of shards: with "
            "checkpoint.storage=local they are on several hosts. Copy them into one shared output_dir, and set "
            "checkpoint.storage=shared"
        )


def _not_seen(folder: Path, written: Mapping[str, FileFacts]) -> list[str]:
    """Returns the files that do not come into sight in their full size. Network file systems show those of other hosts
    late."""
    until = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes NFS ask its server again
        sizes = {name: _size(folder / name) for name in written}
        unseen = [name for name, facts in written.items() if sizes[name] != facts.size]
        if not unseen or time.monotonic() > until:
            return unseen
        time.sleep(0.5)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
