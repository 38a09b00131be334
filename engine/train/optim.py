"""The optimizer: the fastest that the machine has, and a plain statement of which one that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config.deepspeed import Execution
from engine.config.distill import OptimConfig, TrainConfig
from engine.errors import UserError, first_line
from engine.models.apex import require_apex
from engine.ranks import extension_builds


@dataclass(frozen=True)
class ChosenOptimizer:
    """The optimizer that is really in use."""

    optimizer: torch.optim.Optimizer
    name: str
    """Name of the implementation."""
    why_not_faster: str
    """Reason why the fastest one could not be used; empty where it is used."""

    def __str__(self) -> str:
        return self.name + (f"; {self.why_not_faster}" if self.why_not_faster else "")

    def refuse_slower(self) -> None:
        """Raises UserError unless it is the fastest one (require_fused)."""
        if self.why_not_faster:
            raise UserError(f"require_fused=true, but {self.why_not_faster}")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns up to two groups of what is trained: matrices with decay; biases and norm weights (every tensor of fewer
    than two dimensions) without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2): Adam's direction plus decay, scaled for each tensor by
    |w| / |update| (1 when either is 0). Plain PyTorch, for machines without DeepSpeed's CUDA FusedLamb."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                step = state["step"].item()
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                update = state["exp_avg"] / (1 - beta1**step) / denominator + group["weight_decay"] * p
                weight_norm, update_norm = p.norm(), update.norm()
                trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
                p.sub_(update.mul_(trust).mul_(group["lr"]))
        return loss


def build_optimizer(
    config: OptimConfig, module: nn.Module, *, lr: float, execution: Execution, device: torch.device
) -> ChosenOptimizer:
    """Returns the fastest optimizer of that name that the machine has, over what is trained of the module. Raises
    UserError when an `apex_*` optimizer is asked for and NVIDIA Apex is not installed."""
    groups = parameter_groups(module, config.weight_decay)
    settings: dict[str, Any] = {"lr": lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name.startswith("apex_"):
        return _apex(config.name, groups, settings)
    if config.name == "lamb":
        return _lamb(groups, settings, device)
    if execution.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with extension_builds.explain_failures():
            optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return ChosenOptimizer(optimizer, "DeepSpeedCPUAdam (AdamW)", "")
    if device.type == "cuda":
        from deepspeed.ops.adam import FusedAdam

        try:
            return ChosenOptimizer(FusedAdam(groups, adam_w_mode=True, **settings), "DeepSpeed FusedAdam (AdamW)", "")
        except Exception as error:  # DeepSpeed builds it with nvcc on first use; any build failure lands here
            why = f"DeepSpeed FusedAdam does not build here: {first_line(error)[:120]}"
            return ChosenOptimizer(torch.optim.AdamW(groups, fused=True, **settings), "torch fused AdamW", why)
    return ChosenOptimizer(torch.optim.AdamW(groups, fused=True, **settings), "torch fused AdamW", "")


def _lamb(groups: list[dict[str, Any]], settings: dict[str, Any], device: torch.device) -> ChosenOptimizer:
    if device.type != "cuda":
        return ChosenOptimizer(Lamb(groups, **settings), "LAMB (plain PyTorch)", "DeepSpeed FusedLamb needs CUDA")
    from deepspeed.ops.lamb import FusedLamb

    try:
        return ChosenOptimizer(FusedLamb(groups, **settings), "DeepSpeed FusedLamb", "")
    except Exception as error:  # the same: an nvcc build on first use
        why = f"DeepSpeed FusedLamb does not build here: {first_line(error)[:120]}"
        return ChosenOptimizer(Lamb(groups, **settings), "LAMB (plain PyTorch)", why)


def _apex(name: str, groups: list[dict[str, Any]], settings: dict[str, Any]) -> ChosenOptimizer:
    require_apex(name)
    from apex.optimizers import FusedAdam, FusedLAMB

    if name == "apex_fused_adam":
        return ChosenOptimizer(FusedAdam(groups, adam_w_mode=True, **settings), "NVIDIA Apex FusedAdam (AdamW)", "")
    # max_grad_norm: DeepSpeed has clipped already
    return ChosenOptimizer(FusedLAMB(groups, max_grad_norm=1e9, **settings), "NVIDIA Apex FusedLAMB", "")


def choose_optimizer(
    module: nn.Module,
    optim: OptimConfig,
    train: TrainConfig,
    execution: Execution,
    device: torch.device,
    *,
    require_fused: bool,
) -> ChosenOptimizer:
    """Puts the module where it is trained, and makes its optimizer. Raises UserError when `require_fused` is broken."""
    if execution.zero_stage < 3:  # ZeRO-3 places the shards itself
        module.to(device)
    chosen = build_optimizer(optim, module, lr=train.lr, execution=execution, device=device)
    if require_fused:
        chosen.refuse_slower()
    return chosen


def parameters_of(module: nn.Module) -> int:
    """Returns the number of parameters. Call it before ZeRO-3 shards them."""
    return sum(p.numel() for p in module.parameters())
