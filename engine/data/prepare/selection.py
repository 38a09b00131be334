"""Which files a local source stands for, and what of a folder is left out."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from engine.config.tools import SourceConfig
from engine.data.prepare.compression import COMPRESSIONS
from engine.data.prepare.contents import KINDS, Contents, inner_ending, look, named_kind
from engine.data.prepare.formats import is_saved_dataset, parquet_rows
from engine.errors import UserError

_Splits = dict[str | None, list[PurePath]]  # names relative to the folder; None: of no split

_BESIDE_DATA = frozenset({"readme", "license", "licence", "notice", "copying", "citation", "changelog"})
_OTHER_KIND = "of other kinds"
_SHOWN = 5


@dataclass
class Selection:
    """The files of a source in the order in which they are read."""

    files: dict[Path, Contents] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names of what a folder holds beside them, by the reason."""

    def left_out_lines(self) -> list[str]:
        """Returns a line for each reason, with the number of files and the first names."""
        lines = []
        for reason, names in self.left_out.items():
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            lines.append(f"{', '.join(sorted(names)[:_SHOWN])}{more} ({len(names):,}): {reason}")
        return lines


def select_file(path: Path, source: SourceConfig) -> Selection:
    """Returns the one file that was named. Raises UserError where no text can be read from it."""
    source.refuse_unused(f"the file {path}", "split", "name")
    contents = look(path, source.column)
    if contents.why:
        raise UserError(f"{path}: {contents.why}")
    if contents.kind == "parquet":
        parquet_rows(path, source.column)
    return _checked(Selection({path: contents}), path, source)


def select_folder(folder: Path, source: SourceConfig) -> Selection:
    """Returns the files of a folder that hold text: those of one split, where its README.md or its names tell splits.

    Raises UserError where there are none, and for a file that claims by its name to hold text and does not.
    """
    selection = Selection()
    names = _data_files(folder, selection)
    splits = _declared_splits(folder, source.name, names) or _named_splits(folder, source, names)
    if names and source.wanted_split not in splits:
        known = ", ".join(sorted(filter(None, splits)))
        raise UserError(f"{folder}: no split {source.wanted_split!r} (splits: {known}); set the source's `split`")
    chosen = splits.pop(source.wanted_split, [])
    for split, files in splits.items():
        if files:
            selection.left_out[f"of split {split!r}" if split else "without a split"] += map(str, files)
    inodes: set[tuple[int, int]] = set()
    for name in sorted(chosen, key=PurePath.as_posix):
        stat = (folder / name).stat()
        if (stat.st_dev, stat.st_ino) in inodes:
            selection.left_out["links to files that are read already"].append(str(name))
        else:
            _add(folder / name, str(name), source, selection)
        inodes.add((stat.st_dev, stat.st_ino))
    if not selection.files:
        left_out = "; ".join(selection.left_out_lines()) or "it is empty"
        endings = ", ".join([*KINDS, *COMPRESSIONS])
        raise UserError(
            f"{folder}: no file in this folder holds text ({left_out}); known endings are {endings}; "
            "a file of another one is read where a source names it"
        )
    return _checked(selection, folder, source)


def _checked(found: Selection, place: Path, source: SourceConfig) -> Selection:
    if all(contents.kind in ("text", "extracted") for contents in found.files.values()):
        source.refuse_unused(f"{place}, which is read as plain text", "field")
    return found


def _add(path: Path, name: str, source: SourceConfig, found: Selection) -> None:
    contents = look(path, source.column)
    claimed = named_kind(path) is not None
    if contents.kind == "foreign" and claimed:
        raise UserError(f"{path}: {contents.why}; or take it out of the folder")
    if contents.why:
        found.left_out[contents.why].append(name)
    elif contents.kind == "text" and not claimed and path.suffix.lower() not in COMPRESSIONS:
        found.left_out[_OTHER_KIND].append(name)
    elif contents.kind == "parquet" and not parquet_rows(path, source.column):
        found.left_out["has no rows"].append(name)
    else:
        found.files[path] = contents


def _data_files(folder: Path, found: Selection) -> list[PurePath]:
    """Returns the files that may hold text by their names, relative to the folder; the others go to `found.left_out`.
    A name without an ending leaves the decision to the contents, and so does an unknown one of a compressed file."""
    names: list[PurePath] = []
    for here, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        inside = Path(here).relative_to(folder)
        for name in [*folders, *files]:
            path = inside / name
            if name.startswith("."):
                found.left_out["hidden"].append(str(path))
            elif name in folders:
                if (folder / path).is_symlink():
                    found.left_out["links to folders, which are not followed"].append(str(path))
                elif is_saved_dataset(folder / path):
                    found.left_out["saved by `datasets`: name this folder itself"].append(str(path))
            elif not (folder / path).is_file():
                found.left_out["no files (broken links, pipes)"].append(str(path))
            elif path.stem.lower() in _BESIDE_DATA:
                found.left_out["about the data, not data"].append(str(path))
            elif path.suffix.lower() not in COMPRESSIONS and inner_ending(path) not in ("", *KINDS):
                found.left_out[_OTHER_KIND].append(str(path))
            elif path.suffix.lower() in COMPRESSIONS and path.stem in files:
                found.left_out["also present unpacked"].append(str(path))
            else:
                names.append(path)
        folders[:] = [name for name in folders if not name.startswith(".") and not is_saved_dataset(Path(here, name))]
    return names


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or take it out") from error


def _declared_splits(folder: Path, config: str | None, names: Iterable[PurePath]) -> _Splits | None:
    """Returns the splits of a cloned data set repository by the configurations in its README.md, as `datasets` reads
    them; None where it declares none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    head, _, _ = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")
    if not head.startswith("---") or "\nconfigs:" not in head:
        return None
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as scratch:  # it leaves a lock file there
            builder = load_dataset_builder(str(folder), config, cache_dir=scratch)
        splits: _Splits = {
            str(split): [PurePath(file).relative_to(folder.absolute()) for file in files]
            for split, files in builder.config.data_files.items()
        }
    except Exception as error:  # datasets raises whatever its readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder}: its README.md: {reason}; set the source's `name`, or complete the folder"
        ) from error
    declared = {name for files in splits.values() for name in files}
    return {**splits, None: [name for name in names if name not in declared]}


def _named_splits(folder: Path, source: SourceConfig, names: Iterable[PurePath]) -> _Splits:
    """Returns the splits that names of folders and files tell. Without one of the name train, files whose names tell
    nothing are it."""
    source.refuse_unused(f"{folder}, whose README.md declares no configurations", "name")
    splits: _Splits = {}
    for name in names:
        splits.setdefault(_split_in_name(name), []).append(name)
    if splits.keys() <= {None}:
        source.refuse_unused(f"{folder}, where no name indicates a split", "split")
    if None in splits and "train" not in splits:
        splits["train"] = splits.pop(None)
    return splits


def _split_in_name(name: PurePath) -> str | None:
    """Returns the split that a file is of by the rules of `datasets`: shards in a folder `data` name theirs, then names
    of folders tell it, then the file's own. A whole name may have capitals (Test.csv), which only we take for one."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    if shard := re.fullmatch(r"data/(\w+(\.\w+)*)-\d{5}-of-\d{5}.*\..*", name.as_posix()):
        return shard.group(1)
    for part in (*name.parent.parts, name.name):
        for split, words in SPLIT_KEYWORDS.items():
            if part.partition(".")[0].lower() in words or re.search(
                rf"(^|[{NON_WORDS_CHARS}])({'|'.join(words)})([{NON_WORDS_CHARS}]|$)", part
            ):
                return str(split)
    return None
