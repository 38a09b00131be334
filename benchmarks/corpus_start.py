"""What a start costs on one rank of 64 when the corpus grows: time to open it, to the first batch, and memory.

    python benchmarks/corpus_start.py [--tokenizer FOLDER] [--millions 1 100] [--work FOLDER]

Each corpus is one real shard of 7,800 sequences, hard-linked as often as it takes, under a manifest that lists every
link: all of its files can be opened, mapped and hashed. One fresh process a row. "hash" is what resume compares; "far"
is the first batch 70 % into an epoch; the batches are of 32 sequences, and the steps of 64 x 32. Memory is what the
process has of its own beyond what it had before it read the manifest (not counted: pages of mapped shards, which the
system takes back when it needs them). The wait for checksums (engine/data/shard_check.py, 8 ranks a host) is measured
beside it; here all of them are of one file's bytes, which lie in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import header, in_a_fresh_process, machine, resident_mib

from engine.data.loader import CorpusLoader
from engine.data.manifest import Manifest, ShardEntry, SourceEntry, corpus_hash, load_manifest, tokenizer_sha256
from engine.data.shard_check import ShardCheck
from engine.data.shards import id_type, shard_name, write_shard
from engine.data.share import StepShare
from engine.hub.tokenizer import load_tokenizer

WORLD, MICRO_BATCH, SEQ_LEN, IN_A_SHARD, STEPS = 64, 32, 128, 7800, 200


def build(folder: Path, tokenizer: Any, sequences: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    first = folder / shard_name(0)
    rows = [rng.integers(1000, 20_000, rng.integers(90, SEQ_LEN + 1)) for _ in range(IN_A_SHARD)]
    info = write_shard(folder, 0, "", rows, dtype=id_type(len(tokenizer)), dropped=0)
    shards = []
    for number in range(-(-sequences // IN_A_SHARD)):
        name = shard_name(number)
        if number:
            os.link(first, folder / name)
        shards.append(
            ShardEntry(
                file=name,
                source=0,
                sequences=info.sequences,
                tokens=info.tokens,
                size=info.size,
                sha256=hashlib.sha256(first.read_bytes()).hexdigest() if not number else shards[0].sha256,
            )
        )
    total = len(shards) * info.sequences
    source = SourceEntry(
        path="synthetic",
        weight=1.0,
        sha256="",
        stamp="",
        documents=total,
        sequences=total,
        tokens=len(shards) * info.tokens,
        dropped=0,
        bad_lines=0,
    )
    Manifest(
        tokenizer=tokenizer.name_or_path,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocab_size=len(tokenizer),
        seq_len=SEQ_LEN,
        pack="contiguous",
        unit="sentence",
        short_seq_prob=0.0,
        min_tokens=8,
        shard_mb=4,
        seed=0,
        on_bad_line="error",
        sources=[source],
        shards=shards,
    ).write(folder)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def measure(folder: Path, tokenizer_path: str, rank: int) -> dict[str, float]:
    tokenizer = load_tokenizer(tokenizer_path, "tokenizer")
    base = resident_mib("RssAnon")
    manifest, parse_s = timed(lambda: load_manifest(folder))
    _, hash_s = timed(lambda: corpus_hash(manifest))
    loader, open_s = timed(
        lambda: CorpusLoader(
            folder,
            StepShare(WORLD * MICRO_BATCH, MICRO_BATCH, rank=rank, world=WORLD),
            manifest=manifest,
            tokenizer=tokenizer,
            eval_sequences=256,
            seed=0,
        )
    )
    _, first_s = timed(lambda: loader.step(0))
    far = int(0.7 * loader.order.slots / (WORLD * MICRO_BATCH))
    _, far_s = timed(lambda: loader.step(far))
    opened_mib = resident_mib("RssAnon") - base
    _, steps_s = timed(lambda: [loader.step(step) for step in range(STEPS)])
    check, start_s = timed(lambda: ShardCheck(folder, manifest, part=rank % 8, parts=8))
    _, settle_s = timed(check.settle)
    return {
        "parse_s": parse_s,
        "hash_s": hash_s,
        "open_s": open_s,
        "first_s": first_s,
        "far_s": far_s,
        "step_s": steps_s / STEPS,
        "opened_mib": opened_mib,
        "later_mib": resident_mib("RssAnon") - base,
        "mapped": len(loader._store._open),
        "settle_s": start_s + settle_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="models/all-MiniLM-L6-v2")
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--work", help="folder for the corpora (one shard's bytes and a link for each shard)")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.tokenizer, int(args.measure[1]))))
        return
    work = Path(tempfile.mkdtemp(dir=args.work))
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer")
    try:
        print(f"{machine(torch.device('cpu'), ['numpy', 'pyarrow'])}\n")
        print(
            header(
                "sequences",
                "shards",
                "rank",
                "manifest, s",
                "its hash, s",
                "open, s",
                "first batch, s",
                "far batch, s",
                "later batches, s",
                "memory, MiB",
                f"after {STEPS} steps, MiB",
                "wait for checksums, s",
            )
        )
        for millions in args.millions:
            folder = work / f"{millions}M"
            build(folder, tokenizer, millions * 1_000_000)
            shards = len(list(folder.glob("shard-*.arrow")))
            for rank in (0, WORLD - 1):
                row = in_a_fresh_process("--tokenizer", args.tokenizer, "--measure", str(folder), str(rank))
                print(
                    f"| {millions} M | {shards:,} | {rank} of {WORLD} | {row['parse_s']:.3f} | {row['hash_s']:.3f} | "
                    f"{row['open_s']:.3f} | {row['first_s']:.3f} | {row['far_s']:.3f} | {row['step_s']:.4f} | "
                    f"{row['opened_mib']:.0f} | {row['later_mib']:.0f} | {row['settle_s']:.1f} |",
                    flush=True,
                )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
