"""Settings as people write them: right, or one line that names all that is wrong, with lines and remedies."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.distill import RunConfig, StudentConfig, TrainConfig
from engine.config.finetune import FinetuneConfig
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config, read_config
from engine.config.schema import Schema
from engine.config.tools import ExportConfig, HostCheckConfig, PrepareConfig
from engine.errors import UserError
from engine.records.run_dir import as_yaml
from ga.config import SearchConfig

CLASSES = (RunConfig, FinetuneConfig, ProxyJobConfig, PrepareConfig, ExportConfig, HostCheckConfig, SearchConfig)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")


def read(text: str | bytes, kind: Any = RunConfig, *argv: str) -> Any:
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_config(kind, ["--config", "c.yaml", *argv], "test")


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


MEANS = [
    ("train:\n  # steps: 3\nmapping:\nseed: 3\n", "train.steps", 300),
    ("# seed: 3\n", "seed", 0),
    ("---\nseed: 3\n---\n", "seed", 3),
    ("train.lr: 1e-3", "train.lr", 1e-3),
    ("train: {lr: 1e-3}", "train.lr", 1e-3),
    ("train: {lr: 1E5}", "train.lr", 1e5),
    ("train: {lr: 1}", "train.lr", 1.0),
    ("train: {steps: 1_000}", "train.steps", 1000),
    ("seed: '3'", "seed", 3),
    ("dry_run: yes", "dry_run", True),
    ("data: {verify: Off}", "data.verify", False),
    ("loss: {projection_bias: no}", "loss.projection_bias", False),
    ("student: {path: null}", "student.path", None),
    ("student: {init: }", "student.init", None),
    ("mapping: {hidden: 12}", "mapping.hidden", "12"),
    ("mapping: {hidden: 1_0}", "mapping.hidden", "1_0"),
    ("student: {init: 'null'}", "student.init", "null"),
    ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
    ("output_dir: no", "output_dir", "no"),
    ("output_dir: 12:30:00", "output_dir", "12:30:00"),
    ("output_dir: ~/x", "output_dir", "/home/me/x"),
    ("deepspeed_config: ~/x.json", "deepspeed_config", "/home/me/x.json"),
    ("teacher: {path: ./~}", "teacher.path", "./~"),
    (b"\xef\xbb\xbfseed: 3\r\n", "seed", 3),
    ('{"train": {"lr": 1e-3,\n\t"steps": 40}}', "train.steps", 40),
    ("optim: &o {eps: 1e-6}\ntrain: {<<: {lr: 0.5, steps: 40}, lr: 0.25}", "train.lr", 0.25),
]


@pytest.mark.parametrize(("text", "key", "expected"), MEANS, ids=lambda one: repr(one)[:40])
def test_a_text_means_what_it_looks_like(text: str | bytes, key: str, expected: Any) -> None:
    assert value(read(text), key) == expected


WRONG = [
    ("train:\n  lr: 0.01\ntrain:\n  warmup_steps: 7\n", "line 3: train occurs twice, lines 1 and 3; keep one"),
    ("train:\n  lr: 1\n  lr: 1\n  lr: 1\n", "line 4: train.lr occurs 3 times, lines 2, 3 and 4; keep one"),
    ("train.lr: 1\ntrain: {lr: 2}\n", "line 2: train.lr occurs twice, lines 1 and 2; keep one"),
    ("", "c.yaml: is empty"),
    ("train: {steps: }", "line 1: train.steps: expected a whole number, got nothing; write a value, or remove"),
    ("mapping: {hidden: }", "line 1: mapping.hidden: expected text, got nothing"),
    ("teacher: {path: }", "line 1: teacher.path: expected text, got nothing"),
    ("seed: null", "line 1: seed: expected a whole number, got null"),
    ("output_dir: ~", "`~` alone is YAML's null; write ~/ for the home folder"),
    ("student: {path: ~}", "`~` alone is YAML's null; write null, or ~/ for the home folder"),
    ("output_dir: ~nobody-of-this-name/x", "there is no such home folder; write ./~nobody-of-this-name/x"),
    ("output_dir: $HOME/x", "output_dir='$HOME/x' does not exist, and environment variables are not expanded"),
    ("teacher: {path: '${MODELS}/x'}", "environment variables are not expanded"),
    ("output_dir: ''", "output_dir is empty; write a value"),
    ("output_dir: |\n  x\n", "line break or another control character"),
    ("train: {steps: 0o100}", "train.steps: expected a whole number, got 0o100; write decimal digits"),
    ("train: {steps: 0100}", "without a leading zero"),
    ("train: {steps: 0x10}", "got 0x10"),
    ("train: {steps: 12:30:00}", "got 12:30:00"),
    ("train: {steps: 3.0}", "got 3.0"),
    ("train: {steps: true}", "got true"),
    ("train: {lr: 010}", "train.lr: expected a number, got 010; write it without a leading zero"),
    ("train: {lr: 1e400}", "got 1e400; it must be finite"),
    ("train: {lr: NaN}", "got NaN; it must be finite"),
    ("train: {lr: -.inf}", "train.lr: expected a number, got -.inf"),
    ("train: {lr: '1,5'}", "write it like 0.001 or 1e-3"),
    ("seed: 3000000000", "got 3000000000; it must not exceed 2147483647"),
    (f"seed: {'9' * 5000}", "(5000 characters); it must not exceed"),
    ("dry_run: 1", "dry_run: expected true or false, got 1"),
    ("mapping: {hidden: [0, 3]}", "mapping.hidden: expected text, got a list"),
    ("teacher: {dtype: fp8}", "teacher.dtype: expected one of 'auto', 'float32', 'bfloat16', 'float16', got fp8"),
    ("optim: {betas: 0.9}", "optim.betas: expected a list, got 0.9; write [0.9]"),
    ("train: {schedule: warmup_stable_decay, decay_share: 1e308}", "train.decay_share=1e+308: must be in (0, 1]"),
    ("optim: {betas: [0.9, x]}", "optim.betas, entry 2: expected a number, got x"),
    ("train:\n\tlr: 1\n", "line 2: not valid YAML: found character '\\t' that cannot start any token while scanning"),
    ("loss:\n  hidden: [\n", "line 3: not valid YAML"),
    ("output_dir: ä".encode("latin-1"), "line 1: byte 0xe4 is not UTF-8; save the file as UTF-8"),
    ("seed: 3".encode("utf-16"), "c.yaml: is UTF-16 text; save it as UTF-8"),
    ("seed: 3\0", "line 1: character 0x0 is not allowed in text"),
    ("- seed: 3", "line 1: expected settings like `output_dir: runs/first`, got a list"),
    ("hello", "got hello"),
    ("seed: 3\n---\nseed: 4\n", "line 3: a second document begins (`---`)"),
    ("[" * 1000, "nested too deeply"),
    ("seed: !!python/object/apply:os.system [x]", "tags like 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("seed: !int 3", "tags like '!int' are not supported"),
    ("? [a]\n: 1\n", "a list cannot be the name of a setting"),
    ("train: &t {<<: {<<: *t}}", "`<<` needs another section"),
    ("train: {<<: 3}", "`<<` needs another section, got 3"),
    ("train: 5", "train is a section: write its settings indented below it, not 5"),
    ("lr: 1", "line 1: unknown setting 'lr'; did you mean 'train.lr'?"),
    ("path: x", "did you mean 'teacher.path' or 'student.path' or 'data.path'?"),
    ("loss: {lr: 1}", "unknown setting 'loss.lr'; did you mean 'train.lr'?"),
    ("loss:\n  hiden: 1\n", "line 2: unknown setting 'loss.hiden'; did you mean 'loss.hidden'?"),
    ("teacher:\n  train:\n    lr: 1\n", "'train' is a section of the top level: check the indentation"),
    ("Train: {lr: 1}", "'train' is a section: name a setting of it, like 'train.steps'"),
    ("fp16: true", "precision is set by the DeepSpeed JSON: write --deepspeed_config ds_configs/zero1_fp16.json"),
    ("offload_optimizer: {}", "'offload_optimizer' belongs in the DeepSpeed JSON"),
    ("xyz: 1", "unknown setting 'xyz'; --help lists every setting"),
    ("learning_rate: 1", "unknown setting 'learning_rate'; did you mean 'train.lr'?"),
    (
        "train: {load_best_model_at_end: true}",
        "best_model_at_end'; did you mean 'train.keep_best'?",
    ),
    ("early_stopping_patience: 1", "'early_stopping_patience'; did you mean 'train.patience'?"),
    ("early_stopping_threshold: 1", "'early_stopping_threshold'; did you mean 'train.patience_threshold'?"),
    ("train: {patience: 0}", "train.patience=0: must be at least 1"),
    ("train: {patience_threshold: 0.1}", "train.patience_threshold=0.1: remove it, or set train.patience"),
    ("train: {patience: 1, patience_threshold: -1}", "train.patience_threshold=-1.0: must be >= 0"),
    ("train: {patience: 1, schedule: warmup_stable_decay}", "train.patience=1: remove it: the loss of"),
    ("train: {keep_best: true, eval_every: 0}", "train.eval_every=0: must be > 0: train.keep_best and train.patience"),
    ("{train: {patience: 1}, data: {eval_sequences: 0}}", "data.eval_sequences=0: must be > 0: train.keep_best and"),
    ("train: {per_device_train_batch_size: 8}", "did you mean 'train.global_batch'? It counts all ranks; "),
    ("overwrite_output_dir: true", "did you mean 'resume'?"),
    ("student: {num_hidden_layers: 4}", "did you mean 'student.layers'?"),
    ("teacher: {attn_implementation: sdpa}", "did you mean 'teacher.attention'?"),
    ("optim: {lrs: 1}", "unknown setting 'optim.lrs'; optim has name, betas, eps, weight_decay"),
    ("train: {lr: 5,0e-4}", "unknown setting 'train.0e-4'; a value with a comma in it needs quotes"),
    ("mapping: {attention: ''}", "mapping.attention is empty; write a value, or remove the setting"),
    ("output_dir: s3://bucket/run", "output_dir='s3://bucket/run' is a URL; name a file or folder of this machine"),
    ("resume: latest", "resume='latest': write auto, never, or the name of a checkpoint, like step-00000100"),
    ("mapping: {hidden_weights: '[1, 2]'}", "expected a list, got [1, 2]; write [1, 2]"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=lambda one: repr(one)[:40])
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(text)
    assert says in str(error.value)
    assert str(error.value).startswith("c.yaml")
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    text = "train: {steps: 0, lr: -1}\nseed: x\nloss: {hidden: -1, hiden: 3}\ndata: {path: }\n"
    with pytest.raises(UserError) as error:
        read(text, RunConfig, "--data.eval_sequences", "-3", "--nothing", "3")
    found = re.split(r" \(\d+\) ", str(error.value))
    assert found[0] == "7 problems:"
    places = [
        "c.yaml, line 1: train.steps=0",
        "c.yaml, line 1: train.lr=-1.0",
        "c.yaml, line 2: seed",
        "c.yaml, line 3",
    ]
    places += ["c.yaml, line 3: loss.hidden=-1.0", "c.yaml, line 4: data.path", "unknown setting 'nothing'"]
    for place in places:
        assert any(one.startswith(place) for one in found), place


def test_several_files_and_each_problem_names_its_own() -> None:
    Path("a.yaml").write_text("sed: 3\n")
    Path("b.yaml").write_text("\ntrain: {lr: x}\n")
    with pytest.raises(UserError) as error:
        parse_config(RunConfig, ["--config", "a.yaml", "--config=b.yaml", "--config", "none.yaml"], "test")
    assert "(1) a.yaml, line 1: unknown setting 'sed'" in str(error.value)
    assert "(2) b.yaml, line 2: train.lr: expected a number, got x" in str(error.value)
    assert "(3) none.yaml: cannot be read: No such file or directory" in str(error.value)


def test_of_a_wrong_file_no_more_than_twenty_problems_are_said() -> None:
    with pytest.raises(UserError, match=r"^30 problems: .*\(20\) .* … and 10 more$"):
        read("".join(f"key_{number}: 1\n" for number in range(30)))


CUSTOM = "task: {custom: {m: {train: a, dev: b"
INSIDE = [
    (FinetuneConfig, f"{CUSTOM},\ndev: c}}}}}}", "line 2: task.custom.m.dev occurs twice, lines 1 and 2"),
    (FinetuneConfig, f"{CUSTOM}}}, m: {{train: c, dev: d}}}}}}", "task.custom.m occurs twice"),
    (PrepareConfig, "sources: [{weight: 2}]", "path is missing"),
    (FinetuneConfig, f"{CUSTOM}, lable: c}}}}}}", "task.custom.m: unknown setting 'lable'; did you mean 'label'?"),
    (FinetuneConfig, "task: {custom: {m: a.csv}}", "task.custom.m: expected a section with train, dev"),
    (FinetuneConfig, "task: {custom: [a]}", "task.custom: expected names with values, like {name: value}, got a list"),
    (FinetuneConfig, "task: {grid: {lr: [.nan]}}", "task.grid.lr: expected a number, got .nan"),
    (FinetuneConfig, "task: {grid: {rate: [1]}}", "only lr, epochs, batch can be searched"),
    (PrepareConfig, "sources:\n- path: a\n- path: b\n  weight: 0\n", "line 3: sources, entry 2: sources.weight=0.0"),
    (
        PrepareConfig,
        "sources: {path: a}",
        "expected a list, got a section; write [{…}], or begin each entry with a dash",
    ),
    (PrepareConfig, "sources: [[a.txt]]", "expected a section with path, weight, field, split, name, got a list"),
    (PrepareConfig, "sources: ['']", "sources.path is empty"),
    (FinetuneConfig, "task: {custom: {m: a.csv}}", "got a.csv; write {train: …, dev: …}"),
    (FinetuneConfig, "num_train_epochs: 3", "did you mean 'task.epochs'?"),
    (
        ProxyJobConfig,
        "genomes: [1-2]\nproxy: {steps: 5}\ntrain: {warmup_steps: 20}",
        "train.warmup_steps=20: must not exceed the number of steps, 5",
    ),
    (SearchConfig, "search: {storage: ''}", "search.storage is empty; write a value, or remove the setting"),
    (PrepareConfig, "sources: [{path: }]", "sources.path: expected text, got nothing"),
    (ProxyJobConfig, "proxy: {stop_below: {a: 1}}", "proxy.stop_below, name: expected a whole number, got a"),
    (ProxyJobConfig, "genomes: [1-2]\nproxy: {steps: 0}", "proxy.steps=0: must be at least 1"),
    (ExportConfig, "to: x", "run is missing; write --run VALUE, or run in a file"),
    (SearchConfig, "search: {storage: 'sqlite:///~/x.db'}", "~ and $ are not expanded in a URL"),
]


@pytest.mark.parametrize(("kind", "text", "says"), INSIDE, ids=lambda one: repr(one)[:40])
def test_what_is_wrong_inside_of_a_setting(kind: Any, text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(text, kind)
    assert says in str(error.value)


def test_paths_inside_of_settings_have_their_home_folder() -> None:
    text = "task: {custom: {m: {train: ~/a, dev: b, labels: [no, yes, 1]}}}"
    custom = read(text, FinetuneConfig).task.custom["m"]
    assert (custom.train, custom.dev, custom.labels) == ("/home/me/a", "b", ["no", "yes", "1"])
    assert read("sources: [{path: ~/a}]", PrepareConfig).sources[0].path == "/home/me/a"


def test_a_folder_that_is_there_may_have_any_name(tmp_path: Path) -> None:
    for name in ("$HOME", "~nobody-of-this-name"):
        Path(name).mkdir()
        assert read(f"output_dir: {name}/../{name}").output_dir == f"{name}/../{name}"


COMMAND_LINE = [
    (RunConfig, ["--output_dir", "a: b #[c]"], "output_dir", "a: b #[c]"),
    (RunConfig, ["--output_dir=~/x"], "output_dir", "/home/me/x"),
    (RunConfig, ["--output_dir=-x"], "output_dir", "-x"),
    (RunConfig, ["--student.init", "null"], "student.init", None),
    (RunConfig, ["--seed", "1", "--seed", "2"], "seed", 2),
    (RunConfig, ["--optim.betas", "0.5", "0.9"], "optim.betas", [0.5, 0.9]),
    (RunConfig, ["--optim.betas", "[0.5, 9e-1]"], "optim.betas", [0.5, 0.9]),
    (RunConfig, ["--mapping.hidden_weights", "null"], "mapping.hidden_weights", None),
    (RunConfig, ["--optim.betas", "0.5,0.9"], "optim.betas", [0.5, 0.9]),
    (ProxyJobConfig, ["--genomes", "1-2,uniform"], "genomes", ["1-2", "uniform"]),
    (FinetuneConfig, ["--task.name", "RTE"], "task.name", "RTE"),
    (FinetuneConfig, ["--task.name", "RTE", "MRPC"], "task.name", ["RTE", "MRPC"]),
    (FinetuneConfig, ["--task.name", "[RTE, MRPC]"], "task.name", ["RTE", "MRPC"]),
    (FinetuneConfig, ["--task.grid", "{lr: [1e-5]}"], "task.grid", {"lr": [1e-5]}),
    (ProxyJobConfig, ["--genomes", "uniform"], "genomes", ["uniform"]),
    (PrepareConfig, ["--sources", json.dumps([{"path": 'x "😀"\\'}])], "sources", None),
]


@pytest.mark.parametrize(("kind", "argv", "key", "expected"), COMMAND_LINE, ids=lambda one: repr(one)[:40])
def test_words_of_the_command_line(kind: Any, argv: list[str], key: str, expected: Any) -> None:
    found = value(parse_config(kind, argv, "test"), key)
    assert found == expected if key != "sources" else found[0].path == 'x "😀"\\'


WRONG_WORDS = [
    (RunConfig, ["x"], "unexpected 'x': write --config FILE, or --section.name VALUE"),
    (RunConfig, ["--seed"], "seed: a value is missing"),
    (RunConfig, ["--seed", "1", "2"], "seed: takes one value, got 2"),
    (RunConfig, ["--config"], "--config takes one file, got none"),
    (RunConfig, ["--config="], "--config takes one file, got none"),
    (RunConfig, ["--print-config"], "did you mean 'print_config'?"),
    (PrepareConfig, ["--sources", "{path: x}"], "sources: expected a list, got a section"),
    (RunConfig, ["--config", "."], "cannot be read: Is a directory"),
    (RunConfig, ["--config", "$HOME/c.yaml"], "--config='$HOME/c.yaml' does not exist, and environment variables"),
    (RunConfig, ["--teacher", "x"], "'teacher' is a section: name a setting of it, like 'teacher.path'"),
    (RunConfig, ["--train-lr", "1"], "did you mean 'train.lr'?"),
    (FinetuneConfig, ["--task.custom", "{a: "], "task.custom: not valid YAML"),
    (
        FinetuneConfig,
        ["--task.custom", '{"a": {"train": "x", "dev": "y", "dev": "z"}}'],
        "task.custom.a.dev occurs twice",
    ),
]


@pytest.mark.parametrize(("kind", "argv", "says"), WRONG_WORDS, ids=lambda one: repr(one)[:40])
def test_wrong_words_of_the_command_line(kind: Any, argv: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(kind, argv, "test")
    assert says in str(error.value)


def test_print_config_prints_what_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--proxy.yardstick", "{SST-2: {start: 0.5, teacher: 0.9}}", "--genomes", "1-2", "--student.init", "null"]
    with pytest.raises(SystemExit) as end:
        parse_config(ProxyJobConfig, [*argv, "--print_config"], "test")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert as_yaml(read(printed, ProxyJobConfig)) == printed
    assert yaml.safe_load(printed)["proxy"]["yardstick"]["SST-2"]["teacher"] == 0.9


VALUES = ["null", "~", "1e-3", "-1", "0", "1e308", "1e400", ".nan", "yes", "[]", "{}", "[1, 2]", "{a: 1}", "auto"]
SIGNS = ["&a", "*a", "<<", "!!int", "|", "\t", '"', "'", "---", "\n", "\n  ", ": ", "- ", "#", *"{}[],", "\0", "\x85"]
NAMES = sorted({name for kind in CLASSES for key in Schema(kind).settings for name in (key, *key.split("."))})
PIECES = st.sampled_from([*NAMES, *VALUES, *SIGNS])
CONTENTS = st.sampled_from(
    ["1", "0", "-1", "1e308", "2147483647", "null", "yes", "[1, -1]", "[]", "{}", "{lr: [0]}"]
) | (
    st.sampled_from(
        ["warmup_stable_decay", "random-each-step", "nsga2", "autotinybert", "tinybert", "mapping", "uniform"]
    )
)
REQUIRED = {ProxyJobConfig: "genomes: [uniform]\n", ExportConfig: "run: x\n", HostCheckConfig: "hostfile: x\n"}


def files(kind: Any) -> st.SearchStrategy[str]:
    """Texts: of settings of `kind` with values of any type, and of pieces of YAML in any order."""
    named = st.dictionaries(st.sampled_from(list(Schema(kind).settings)), CONTENTS, max_size=4)
    lines = named.map(lambda found: "".join(f"{key}: {text}\n" for key, text in found.items()))
    return lines.map(lambda text: REQUIRED.get(kind, "") + text) | st.lists(PIECES, max_size=12).map("".join)


@pytest.mark.parametrize("kind", CLASSES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_file_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data.draw(files(kind)).encode())
    try:
        read_back = as_yaml(parse_config(kind, ["--config", str(path)], "test"))
    except UserError as error:
        said = str(error)
    else:
        path.write_text(read_back)
        said = "" if as_yaml(parse_config(kind, ["--config", str(path)], "test")) == read_back else "another\none"
    assert "\n" not in said


@dataclass(frozen=True)
class NoConfig:
    steps: int = 3


@pytest.mark.parametrize(
    ("settings", "steps", "layers"),
    [
        ((), 300, None),
        (({"train": {"steps": 7}, "student": None},), 7, None),
        (({"train.steps": 7, "student.layers": 2},), 7, 2),
        (("a.yaml", {"train.steps": 7}), 7, 4),
        (({"train.steps": 7}, Path("a.yaml")), 5, 4),
        ((RunConfig(train=TrainConfig(steps=9)), {"student.layers": 3}), 9, 3),
    ],
    ids=str,
)
def test_programs_give_files_mappings_and_configurations(
    settings: tuple[object, ...], steps: int, layers: int | None
) -> None:
    Path("a.yaml").write_text("train: {steps: 5}\nstudent: {layers: 4}\n")
    config = read_config(RunConfig, *settings)
    assert (config.train.steps, config.student.layers) == (steps, layers)


def test_a_configuration_of_a_program_stays_what_it_is() -> None:
    for config in (RunConfig(student=StudentConfig(path=".")), ProxyJobConfig(genomes=["1-2"]), RunConfig()):
        assert read_config(type(config), config) == config


def test_values_of_a_program_are_read_as_text_would_be() -> None:
    config = read_config(RunConfig, {"output_dir": Path("runs/a"), "optim.betas": (0.9, 0.98), "mapping.hidden": "0-3"})
    assert (config.output_dir, config.optim.betas, config.mapping.hidden) == ("runs/a", [0.9, 0.98], "0-3")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (({"train": {"stesp": 3}},), "unknown setting 'train.stesp'; did you mean 'train.steps'?"),
        (({"train": {"steps": "many"}},), "train.steps: expected a whole number, got many"),
        (({"train.steps": 0},), "train.steps=0: must be at least 1"),
        (({"train.steps": 3, "train": {"steps": 4}},), "train.steps occurs twice"),
        (({"output_dir": object},), "settings cannot be <class 'object'>; give texts, numbers, lists or mappings"),
        ((RunConfig(train=TrainConfig(steps=2.5)),), "train.steps: expected a whole number, got 2.5"),
        ((NoConfig(),), "expected a file, a mapping or a RunConfig, got NoConfig(steps=3)"),
        (("nowhere.yaml",), "nowhere.yaml: cannot be read: No such file or directory"),
        (({"seed": -1}, {"train.stesp": 3}), "2 problems: (1) unknown setting"),
    ],
    ids=str,
)
def test_mistakes_of_a_program_are_said_as_those_of_a_file(settings: tuple[object, ...], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        read_config(RunConfig, *settings)
