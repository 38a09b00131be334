"""Teachers and students of other families, and of two, in the job that a user starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT
from tiny_encoders import require_modernbert
from tiny_world import TinyWorld
from transformers import (
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
)

from engine.config.distill import RunConfig
from engine.config.reading import parse_config
from engine.config.tools import PrepareConfig, SourceConfig
from engine.data.prepare.corpus import prepare
from engine.errors import UserError
from engine.jobs.distill.build import build_module, load_teacher, open_corpus
from engine.jobs.distill.plan import Plan, make_plan
from engine.models.student import new_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
POSITIONS: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}


def save(config_class: type[PretrainedConfig], world: TinyWorld, folder: Path, **others: Any) -> str:
    """A random model with the tokenizer of the tiny teacher."""
    tokenizer = AutoTokenizer.from_pretrained(world.teacher)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    config = config_class(**SIZES | ids | {"vocab_size": len(tokenizer)} | others)
    new_model(config, with_mlm_head=False, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mpnet_world(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """The tiny world with 1 as its pad id, from which MPNet counts positions whatever its configuration says."""
    root = tmp_path_factory.mktemp("padded with 1")
    world = TinyWorld(root / "teacher", root / "corpus", tiny_world.text)
    shutil.copytree(tiny_world.teacher, world.teacher)
    file = world.teacher / "tokenizer.json"
    tokenizer, swapped = json.loads(file.read_text()), {"[PAD]": 1, "[UNK]": 0}
    tokenizer["model"]["vocab"] |= swapped
    for token in tokenizer["added_tokens"]:
        token["id"] = swapped.get(token["content"], token["id"])
    file.write_text(json.dumps(tokenizer))
    source = [SourceConfig(path=str(world.text))]
    prepare(
        PrepareConfig(sources=source, output_dir=str(world.corpus), tokenizer=str(world.teacher), seq_len=16, workers=1)
    )
    return world


def plan_of(world: TinyWorld, *argv: str) -> Plan:
    settings = ["--teacher.path", str(world.teacher), "--data.path", str(world.corpus), *argv]
    usual = ["--deepspeed_config", "ds_configs/zero0_fp32.json", "--loss.projection_init", "random"]
    return make_plan(parse_config(RunConfig, [*usual, "--loss.scale", "none", *settings], "test"))


def first_step(plan: Plan) -> tuple[dict[str, float], list[str]]:
    """Returns the terms of one batch, and the names of the student's parameters without a gradient."""
    module, _ = build_module(plan, CPU)
    teacher = load_teacher(plan, plan.losses.wanted_teacher, CPU)
    batch = open_corpus(plan).step(0).micro[0]
    total, logged = module(batch, teacher(batch), batch.counts)
    total.backward()
    terms = dict(zip(plan.losses.term_names, logged.tolist(), strict=False))
    return terms, [name for name, p in module.student.named_parameters() if p.grad is None or not bool(p.grad.any())]


@pytest.mark.parametrize("config_class", [MPNetConfig, DebertaV2Config, DebertaConfig])
@pytest.mark.parametrize("student", ["copied", "bert"])
def test_a_teacher_with_its_own_attention(
    config_class: type[PretrainedConfig], student: str, tiny_world: TinyWorld, mpnet_world: TinyWorld, tmp_path: Path
) -> None:
    """A student that is all of the teacher has nothing to learn; a BERT student has."""
    world, others = (mpnet_world, {}) if config_class is MPNetConfig else (tiny_world, POSITIONS)
    teacher = ["--teacher.path", save(config_class, world, tmp_path / "teacher", **others)]
    attention = ["--loss.attention", "0"] if config_class is DebertaConfig else ["--loss.relation", "1"]
    if student == "copied":
        shape = ["--student.layers", "4", "--student.init", "uniform"]
    else:
        shape = ["--student.path", save(BertConfig, world, tmp_path / "student"), "--mapping.hidden", "1-2-3-4"]
    plan = plan_of(world, *teacher, *shape, *attention, "--loss.cosine", "1")
    terms, without_gradient = first_step(plan)
    kinds = {term.partition("/")[0] for term in terms}
    assert kinds == {"hidden", "embedding", "cosine"} | (
        set() if config_class is DebertaConfig else {"attention", "relation"}
    )
    assert plan.teacher_attention.name == "own"
    if student == "copied":
        assert max(terms.values()) < 1e-5
    else:
        assert min(terms.values()) > 1e-3
        assert [name for name in without_gradient if "token_type" not in name] == []


def test_a_modernbert_student_of_a_bert_teacher(tiny_world: TinyWorld, tmp_path: Path) -> None:
    require_modernbert()
    student = save(ModernBertConfig, tiny_world, tmp_path, local_attention=8)
    plan = plan_of(tiny_world, "--student.path", student, "--mapping.hidden", "1-2-3-4", "--loss.relation", "1")
    assert (plan.student_shape.windows, plan.teacher_shape.windows) == ((None, 4, 4, None), ())
    assert plan.projection == "shared"
    assert plan.warnings == ()
    terms, without_gradient = first_step(plan)
    assert min(terms.values()) > 1e-3
    assert without_gradient == []


def test_the_modernbert_recipe(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """On a tiny model of as many layers as ModernBERT-base has."""
    require_modernbert()
    teacher = save(ModernBertConfig, tiny_world, tmp_path, num_hidden_layers=22, local_attention=8)
    recipe = ["--config", str(ROOT / "examples" / "modernbert.yaml"), "--output_dir", str(tmp_path / "run")]
    plan = plan_of(tiny_world, *recipe, "--teacher.path", teacher, "--train.global_batch", "8")
    pairs = plan.hidden_map.pairs
    assert len(pairs) == 10
    assert all(plan.student_shape.window(m) == plan.teacher_shape.window(g) for m, g in pairs), "kind by kind"
    assert plan.student_config.layer_types == ["full_attention", *["sliding_attention"] * 2] * 3 + ["full_attention"]
    assert plan.losses.windows == {4}
    assert plan.warnings == ()
    module, _ = build_module(plan, CPU)
    assert module.unpadded
    terms, without_gradient = first_step(plan)
    assert terms["embedding"] < 1e-9, "copied"
    assert terms["hidden/10-22"] > 1e-3
    assert without_gradient == []


def test_what_a_family_cannot_compare_is_refused_before_models_load(tiny_world: TinyWorld, tmp_path: Path) -> None:
    teacher = save(DebertaConfig, tiny_world, tmp_path, **POSITIONS)
    with pytest.raises(
        UserError, match=r"^loss.attention compares .* the teacher \(model type 'deberta'\).*switch loss.attention off"
    ):
        plan_of(tiny_world, "--teacher.path", teacher)
    with pytest.raises(UserError, match=r"^teacher.attention='eager': model type 'deberta' .*write auto"):
        plan_of(tiny_world, "--teacher.path", teacher, "--loss.attention", "0", "--teacher.attention", "eager")
