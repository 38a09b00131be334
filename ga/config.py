"""What a search does: frozen dataclasses around those of a proxy job. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from engine.config.checks import require
from engine.config.marks import PathText, how, result
from engine.config.proxy import PROXY_INIT, ProxyJobConfig, ProxySettings
from ga.evolution.genome import Constraint, Kind
from ga.evolution.operators import PRESETS, Settings

Launcher = Literal["pdsh", "openmpi", "slurm"]
"""DeepSpeed's ways to reach other hosts that are supported here."""

STUDY_FILE = "study.db"


@dataclass(frozen=True, kw_only=True)
class SearchSection(Settings):
    """Budget, sampler and space of the search, its operators, and its jobs."""

    trials: int = how(64)
    """Budget: how many genomes are evaluated."""

    sampler: Literal["ga", "random", "exhaustive", "tpe", "nsga2"] = result("ga")
    """Search method. ga: this project's genetic algorithm; random: without repetition; exhaustive: the whole space in
    order; tpe and nsga2: Optuna's. All start with the heuristics (uniform, last, first, all-last, none)."""

    preset: Literal["default", "autotinybert"] = result("default")
    """autotinybert: operators and rates of AutoTinyBERT's published loop, in place of `population` … `creep_rate`."""

    seed: int = result(0)
    """Seed of the search. The proxy's is `seed`."""

    seeds: list[str] = result(factory=list)
    """Layer mappings for generation 0, in addition to the heuristics."""

    space: Kind = result("mapping")
    """Genes of a genome. mapping: the teacher layer that each student layer learns from; layers: the teacher layer that
    it starts from (in place of student.init), while it learns from uniform's; both: one gene for each,
    LAYERS@MAPPING."""

    constraint: Constraint = result("free")
    """Order of the non-zero genes of a mapping: free, nondecreasing or strictly_increasing."""

    min_active: int = result(0)
    """Smallest number of student layers that learn from a teacher layer."""

    allowed_layers: list[int] = result(factory=list)
    """Teacher layers that a gene may name; empty: all. 0 (no layer) is always allowed."""

    separate_attention: bool = result(False)
    """Search a separate mapping for the attention losses: genomes are HIDDEN/ATTENTION."""

    second_objective: Literal["deepest_layer"] | None = result(None)
    """deepest_layer: also prefer mappings whose deepest teacher layer is low (the teacher stops there); sampler nsga2
    only. The result is a Pareto front."""

    storage: str | None = how(None)
    """URL of the Optuna storage: sqlite:///FILE, or postgresql+psycopg://… for drivers on several machines. Unset:
    study.db in output_dir."""

    study: str | None = how(None)
    """Name of the study in the storage; unset: the last part of output_dir. Drivers with the same name share one
    search, and the studies of one storage share their results."""

    cohort: int = how(8)
    """Largest number of genomes that one job distils side by side against one teacher pass."""

    slots_per_job: int = how(1)
    """Devices that a job takes."""

    local_slots: int | None = how(None)
    """Devices of this machine that jobs may take when there is no hostfile. Unset: all visible GPUs; without a GPU
    slots_per_job, that is one job on all cores."""

    launcher: Launcher = how("pdsh")
    """How DeepSpeed reaches other hosts: pdsh, openmpi or slurm."""

    job_minutes: float = how(60.0)
    """Minutes after which a job is ended; genomes that it has not scored by then count as failed."""

    max_failures: int = how(16)
    """Genomes in a row without a fitness after which the search gives up."""

    halving: float | None = result(None)
    """Successive halving: after each step of proxy.report_at only students among the best 1/halving of all that were
    scored at that step go on; the others count as trials without fitness. Unset: every student runs to the end."""

    confirm_top: int = how(3)
    """Best genomes that are run again at the end, together with uniform, with new seeds; 0: none."""

    confirm_seeds: int = how(4)
    """New seeds for each genome of the confirmation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trials", "cohort", "slots_per_job", "max_failures"):
            require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), "must be at least 1")
        require(self.seed >= 0, "search.seed", self.seed, "must be >= 0")
        require(
            not (self.storage or "").startswith(("sqlite:///~", "sqlite:///$")),
            "search.storage",
            self.storage,
            "~ and $ are not expanded in a URL; write the whole path, as in sqlite:////home/me/study.db",
        )
        require(self.job_minutes > 0, "search.job_minutes", self.job_minutes, "must be > 0")
        require(self.confirm_top >= 0, "search.confirm_top", self.confirm_top, "must be >= 0")
        require(
            self.confirm_seeds >= 2,
            "search.confirm_seeds",
            self.confirm_seeds,
            "must be at least 2: one seed shows no noise (confirm_top=0 leaves the confirmation out)",
        )
        require(
            self.local_slots is None or self.local_slots >= 1,
            "search.local_slots",
            self.local_slots,
            "must be at least 1",
        )
        require(
            self.halving is None or self.halving > 1, "search.halving", self.halving, "must be > 1, e.g. 2 for half"
        )
        require(
            self.prerank == 1 or self.sampler == "ga",
            "search.prerank",
            self.prerank,
            f"sampler={self.sampler} has no offspring; write search.sampler=ga, or remove it",
        )
        require(
            self.second_objective is None or self.sampler == "nsga2",
            "search.second_objective",
            self.second_objective,
            f"sampler={self.sampler} has one objective; write search.sampler=nsga2",
        )
        for name, default in (("separate_attention", False), ("second_objective", None)):
            require(
                self.space != "layers" or getattr(self, name) == default,
                f"search.{name}",
                getattr(self, name),
                "remove it: search.space=layers has one mapping, uniform",
            )
        require(
            self.second_objective is None or self.halving is None,
            "search.halving",
            self.halving,
            "remove it: halving ranks by one objective, and second_objective adds another",
        )
        if self.preset != "default":
            for one in fields(Settings):
                require(
                    getattr(self, one.name) == one.default,
                    f"search.{one.name}",
                    getattr(self, one.name),
                    f"remove it: search.preset={self.preset!r} fixes it",
                )

    @property
    def operators(self) -> Settings:
        if self.preset != "default":
            return PRESETS[self.preset]
        return Settings(**{one.name: getattr(self, one.name) for one in fields(Settings)})


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ProxySettings):
    output_dir: PathText = how("runs/search")
    """Folder of the search: trials, TensorBoard, report and, unless search.storage names another, study.db. The same
    command again continues it."""

    hostfile: PathText | None = how(None)
    """DeepSpeed hostfile (`worker-1 slots=8`) of the hosts that run jobs; unset: this machine."""

    status: bool = how(False)
    """Print a table of the search in this folder and stop."""

    dry_run: bool = how(False)
    """Print space and budget, run the first job, whose results are kept, estimate the time from it, and stop."""

    search: SearchSection = field(default_factory=SearchSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.proxy.stop_below, "proxy.stop_below", self.proxy.stop_below, "remove it: search.halving sets it"
        )
        for name, default in (("path", None), ("init", PROXY_INIT)):
            value = getattr(self.student, name)
            require(
                self.search.space == "mapping" or value == default,
                f"student.{name}",
                value,
                f"remove it: with search.space={self.search.space} a genome says which layers its student starts from",
            )
        require(
            self.search.halving is None or bool(self.proxy.report_at),
            "search.halving",
            self.search.halving,
            "needs proxy.report_at: the steps after which students are compared",
        )
        require(
            self.search.halving is None or self.proxy.repeats == 1,
            "proxy.repeats",
            self.proxy.repeats,
            "must be 1 with search.halving: a student that ends early has no other seeds",
        )

    @property
    def root(self) -> Path:
        return Path(self.output_dir)

    @property
    def storage(self) -> str:
        return self.search.storage or f"sqlite:///{self.root / STUDY_FILE}"

    @property
    def study(self) -> str:
        return self.search.study or self.root.resolve().name

    def job(self, **changes: object) -> ProxyJobConfig:
        """Returns the configuration of one of its jobs, with `changes` in place of what all jobs share."""
        shared = {one.name: getattr(self, one.name) for one in fields(ProxySettings)}
        return ProxyJobConfig(**{**shared, "dry_run": False, **changes})
