"""Checks beside the training that the bytes of a corpus are those that its manifest records."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from engine.data.manifest import Manifest, ShardEntry
from engine.data.shards import AGAIN, check_size
from engine.errors import UserError
from engine.ranks.collectives import gathered, summed
from engine.ranks.environment import local_size

SETTLE_S = 3.0
"""Seconds that a start waits for the check: a tenth of what it takes anyway, and at 1 GB/s and rank 3 GB are verified
before anything else is done. What is left goes on while the job trains, so that no start grows with its corpus."""
NICE = 10
"""Niceness of the thread after that: it then uses what the training leaves over."""


def share_of_this_host(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns (part, parts) for ShardCheck. The ranks of a host check every shard once, together; another host may have
    a copy of its own."""
    part = int(environ.get("LOCAL_RANK", "0"))
    return part, max(local_size(environ) or 1, part + 1)


class ShardCheck:
    """A thread that reads every parts-th shard, in order, and starts at once: first the sizes of all of them, then the
    checksums (hashlib lets go of the interpreter's lock). It ends at the first shard that is not as recorded."""

    def __init__(self, folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> None:
        self._folder, self._manifest = folder, manifest
        self._entries = manifest.shards[part::parts]
        self._problem: UserError | None = None
        self._over = False
        """Whether every rank has found its shards to be whole, which all of them know."""
        self._until = time.monotonic() + SETTLE_S
        self._thread = threading.Thread(target=self._run, name="shard-check", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Waits until the check has ended, or SETTLE_S after its start. Raises what it has found, as `agree` does."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        self.agree()

    def before_step(self, met: UserError | None = None) -> None:
        """Raises what was found meanwhile, on every rank: one that raised alone would let the others fail in the middle
        of a collective, with a traceback and a code of their own. Every rank calls it before each step.

        met: what keeps this rank from making the step; not raised once the check is over.
        """
        self._problem = self._problem or met
        if not self._over:
            self._over = not self.agree()

    def agree(self) -> bool:
        """Returns whether the check is still going on. Raises UserError, naming the file, once a shard was found that
        is not as recorded. Collective where the ranks have met: all of them raise what one has found."""
        going_on, found = self._thread.is_alive(), self._problem
        still_on, any_found = summed([going_on, found is not None])
        if any_found:
            texts = gathered(None if found is None else str(found))
            raise UserError(next(text for text in texts if text is not None))
        return still_on > 0

    def _run(self) -> None:
        try:
            for entry in self._entries:
                check_size(self._folder / entry.file, entry)
            lowered = False
            for entry in self._entries:
                if not lowered and time.monotonic() > self._until:
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # Linux: of this thread alone
                    lowered = True
                self._check_bytes(entry)
        except UserError as error:
            self._problem = error

    def _check_bytes(self, entry: ShardEntry) -> None:
        path = self._folder / entry.file
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); copy it again, or delete it and {AGAIN}"
            ) from None
        if found == entry.sha256:
            return
        owner = next((other.file for other in self._manifest.shards if other.sha256 == found), None)
        what = f"holds what belongs in {owner}" if owner is not None else "its bytes have changed since it was written"
        raise UserError(
            f"{path}: {what} (sha256 {found[:12]}, the manifest says {entry.sha256[:12]}); copy it again, or delete it "
            f"and {AGAIN}"
        )
