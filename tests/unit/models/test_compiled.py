"""A student under torch.compile: capture, the run without pads and the loss kernels compute what they do without it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_encoders import batch_with_lengths, tiny_model

from engine.config.distill import LossConfig, MappingConfig
from engine.data.batch import Counts
from engine.jobs.distill.module import DistilModule
from engine.losses.loss_set import LossSet
from engine.mapping import parse_mapping
from engine.models.capture import capture, layer_modules
from engine.models.hub import shape_of
from engine.models.install import install
from engine.models.projections import Projections

BACKEND = "aot_eager"
"""Traces forward and backward as the default backend does, and spares its compiler."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("unpadded", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize("what", ["whole", "layers", "under autocast"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_losses_and_gradients_of_a_compiled_student(backend: str, what: str, unpadded: bool) -> None:
    teacher, student = tiny_model("bert", seed=1), tiny_model("bert")
    for model in (teacher, student):
        install(model, backend)
    shapes = shape_of(student.config, False), shape_of(teacher.config, False)
    mapping = parse_mapping("0-1-0-4", student_layers=4, teacher_layers=4, key="mapping")
    loss = LossConfig(hidden=1.0, attention=1.0, embedding=1.0, relation=1.0, projection="shared")
    losses = LossSet(
        loss, MappingConfig(hidden="0-1-0-4"), hidden_map=mapping, attention_map=mapping, student=shapes[0],
        teacher=shapes[1], mlm_probability=0.0,
    )  # fmt: skip
    width = shapes[0].width
    projections = Projections(loss, student_width=width, teacher_width=width, layers=losses.projected_layers)
    batch = batch_with_lengths()
    counts = Counts.from_lengths(np.array(batch.lengths))
    with torch.no_grad():
        targets = capture(teacher, batch, losses.wanted_teacher, unpadded=unpadded)

    def run(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        module = DistilModule(model, copy.deepcopy(projections), losses, unpadded=unpadded)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "under autocast"):
            total, _ = module(batch, targets, counts)
        total.backward()
        return total.detach(), [p.grad for p in module.parameters() if p.grad is not None]

    compiled = copy.deepcopy(student)
    if what == "layers":
        for layer in layer_modules(compiled):
            layer.forward = torch.compile(layer.forward, backend=BACKEND)  # type: ignore[method-assign]
    else:
        compiled.compile(backend=BACKEND)
    want_total, want = run(student)
    for _ in range(2):  # traced, then from the cache
        compiled.zero_grad()
        total, gradients = run(compiled)
        tolerance = 3e-2 if what == "under autocast" else 1e-4
        assert total == pytest.approx(float(want_total), rel=tolerance)
        assert len(gradients) == len(want) > 30
        largest = max(float(a.norm()) for a in want)  # the gradient of a key's bias is 0 but for rounding
        for a, b in zip(want, gradients, strict=True):
            assert float((a - b).norm()) <= tolerance * max(float(a.norm()), 0.01 * largest)
