"""Files of sentence-transformers around an encoder: where it lies, and what makes one vector of a text of its states.

They are read without that package, which takes seconds to import. Old and new names of settings mean the same.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import UserError
from engine.hub.files import optional_file, read_json, require_whole

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
READING = "sentence_bert_config.json"
READING_BEFORE = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that READING had in early versions."""
WEIGHTS = "model.safetensors"
MAP_FOLDER = "2_Dense"
"""Place of a Dense layer behind the pooling."""
LIBRARY = "sentence_transformers."
AFTER_POOLING = frozenset(["Dense", "Normalize"])
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Ways of pooling by their switches before `pooling_mode`, in the order in which their vectors stand side by side."""
POOLING_WIDTHS = ("embedding_dimension", "word_embedding_dimension")
"""Names of the width of the states in the settings of a Pooling, today's and the one before."""


@dataclass(frozen=True)
class SentenceModule:
    """One entry of modules.json."""

    kind: str
    """Class of sentence-transformers; the whole type of any other class."""
    folder: str
    """Place of its files in that of the model; empty: the same."""
    entry: dict[str, Any]
    """What modules.json says of it."""
    settings: dict[str, Any]
    """Contents of its config.json."""
    weights: Path | None = None


@dataclass(frozen=True)
class SentenceEncoder:
    """What makes one vector of a text of the last hidden states of an encoder: Pooling, then Dense and Normalize."""

    encoder: SentenceModule
    modules: tuple[SentenceModule, ...]
    """Modules behind the encoder, in their order."""
    reading: dict[str, Any]
    """How texts are read (READING); empty where there is no such file."""
    settings: dict[str, Any]
    """Settings of the whole model (SETTINGS); empty where there is no such file."""

    @property
    def pooling(self) -> tuple[str, ...]:
        """Ways of pooling, in the words of sentence-transformers: mean, cls, lasttoken, max, weightedmean, … Their
        vectors stand side by side."""
        settings = self.modules[0].settings
        mode = settings.get("pooling_mode") or [way for flag, way in POOLING_FLAGS.items() if settings.get(flag)]
        return (mode,) if isinstance(mode, str) else tuple(mode or ["mean"])

    @property
    def dense(self) -> tuple[SentenceModule, ...]:
        """Layers behind the pooling, which have weights"""
        return tuple(module for module in self.modules if module.kind == "Dense")

    @property
    def is_normalized(self) -> bool:
        """Whether the vectors have length 1"""
        return self.modules[-1].kind == "Normalize"

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that are read of a text; None: as many as the tokenizer's model_max_length"""
        return self.reading.get("max_seq_length")

    @property
    def lower_case(self) -> bool:
        """Whether texts are made lower case before the tokenizer reads them"""
        return bool(self.reading.get("do_lower_case"))

    @property
    def prompts(self) -> dict[str, str]:
        """Beginnings that are put before texts, by name"""
        return {name: text for name, text in (self.settings.get("prompts") or {}).items() if text}

    @property
    def default_prompt(self) -> str | None:
        """Name of the prompt that is used where none is asked for"""
        return self.settings.get("default_prompt_name")

    @property
    def similarity(self) -> str:
        """Function that compares two vectors: cosine, dot, euclidean or manhattan"""
        return self.settings.get("similarity_fn_name") or "cosine"

    def __str__(self) -> str:
        parts = [f"{' and '.join(self.pooling)} pooling"]
        parts += [f"a dense layer to width {module.settings['out_features']}" for module in self.dense]
        parts += ["normalised"] if self.is_normalized else []
        parts += [f"{self.max_seq_length} tokens at most"] if self.max_seq_length else []
        parts += [f"prompts {', '.join(self.prompts)}"] if self.prompts else []
        return ", ".join(parts)

    def for_student(self, width: int, longest: int | None, map_bias: bool | None = None) -> SentenceEncoder:
        """Returns the same for a student with states of that width that takes `longest` tokens (None: any number).

        map_bias: whether the map has a bias through which the student's vectors get the teacher's width, in a Dense
        layer in MAP_FOLDER whose weights an export adds. Without a map (None) the Dense layers of a teacher of another
        width are left out.
        """
        pooling, *others = self.modules
        name = next(name for name in POOLING_WIDTHS if name in pooling.settings)
        if map_bias is not None:
            sizes = {"in_features": width, "out_features": pooling.settings[name]}
            wide = {key: len(self.pooling) * size for key, size in sizes.items()}
            library = str(pooling.entry["type"]).rpartition(".")[0]
            linear = wide | {"bias": map_bias, "activation_function": "torch.nn.modules.linear.Identity"}
            others.insert(0, SentenceModule("Dense", "", {"type": f"{library}.Dense"}, linear))
        elif pooling.settings[name] != width:
            others = [module for module in others if module.kind != "Dense"]
        tokens = [tokens for tokens in (self.max_seq_length, longest) if tokens is not None]
        return replace(
            self,
            modules=(replace(pooling, settings=pooling.settings | {name: width}), *others),
            reading=self.reading | ({"max_seq_length": min(tokens)} if self.max_seq_length else {}),
        )

    def write(self, folder: Path) -> None:
        """Writes all files into a folder, at the top of which the encoder lies. Raises OSError."""
        for name, values in ((READING, self.reading), (SETTINGS, self.settings)):
            if values:
                _write_json(folder / name, values)
        entries = []
        for index, module in enumerate((replace(self.encoder, folder=""), *self.modules)):
            place = f"{index}_{module.kind}" if index else ""
            entries.append(module.entry | {"idx": index, "name": str(index), "path": place})
            if module.settings:
                _write_json(folder / place / "config.json", module.settings)
            if module.weights is not None:
                shutil.copyfile(module.weights, folder / place / WEIGHTS)
        _write_json(folder / MODULES, entries)


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encoder_folder(path: str, key: str) -> str:
    """Returns where the encoder of a model lies: in `path`, or in a folder inside it (0_Transformer, as
    sentence-transformers wrote before version 2). Raises UserError for a modules.json that is not whole."""
    file = Path(path) / MODULES
    modules = _read_modules(file, key) if file.is_file() else []
    return str(Path(path) / modules[0].folder) if modules and modules[0].folder else path


def read_sentence_encoder(path: str, key: str) -> tuple[SentenceEncoder | None, str]:
    """Returns what a folder or hub model of sentence-transformers makes of the states of its encoder.

    None for a model without such files, and with a reason for one whose files are not all there or not all understood.
    Raises UserError for files that are not whole.
    """
    file = optional_file(path, MODULES)
    if file is None:
        return None, ""
    listed = _read_modules(file, key)
    kinds = [module.kind for module in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - AFTER_POOLING:
        known = "only a Transformer, a Pooling, then Dense and Normalize are understood"
        return None, f"its modules are {', '.join(kinds) or 'none'}; {known}"
    encoder, modules = listed[0], []
    for module in listed[1:]:
        settings = _read_settings(path, key, str(PurePosixPath(module.folder, "config.json")))
        if not settings and module.kind != "Normalize":
            return None, f"{module.folder}/config.json is not there; copy it from where the model came from"
        weights = None
        if module.kind == "Dense":
            weights = optional_file(path, f"{module.folder}/{WEIGHTS}")
            if weights is None:
                return None, f"{module.folder}/{WEIGHTS} is not there; SentenceTransformer(…).save_pretrained writes it"
            require_whole(weights, key)
        modules.append(replace(module, settings=settings, weights=weights))
    reading = (str(PurePosixPath(encoder.folder, name)) for name in (READING, *READING_BEFORE))
    found = SentenceEncoder(
        encoder, tuple(modules), _read_settings(path, key, *reading), _read_settings(path, key, SETTINGS)
    )
    unknown = [f"pooling {way!r}" for way in found.pooling if way not in POOLING_FLAGS.values()]
    unknown += [] if any(name in modules[0].settings for name in POOLING_WIDTHS) else ["no width"]
    return (None, f"{modules[0].folder}/config.json has {unknown[0]}") if unknown else (found, "")


def _read_settings(path: str, key: str, *names: str) -> dict[str, Any]:
    """Returns the contents of the first of these files that the model has; nothing where it has none."""
    for name in names:
        file = optional_file(path, name)
        if file is not None:
            require_whole(file, key)
            settings: dict[str, Any] = read_json(file, key)
            return settings
    return {}


def _read_modules(file: Path, key: str) -> list[SentenceModule]:
    """Returns the entries of modules.json, without settings and weights. Raises UserError for one that is not whole,
    or that names a place outside of its folder."""
    modules = []
    for entry in read_json(file, key, list):
        try:
            kind, place = str(entry["type"]), PurePosixPath(entry["path"])
        except (KeyError, TypeError):
            raise UserError(f"{key}: {file} has an entry without type or path; copy or download it again") from None
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"{key}: {file} names {str(place)!r}, which is outside of its folder; name another model")
        name = kind.rpartition(".")[2] if kind.startswith(LIBRARY) else kind
        modules.append(SentenceModule(name, "" if place == PurePosixPath() else str(place), entry, {}))
    return modules
