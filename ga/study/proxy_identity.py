"""Which proxy a study's results are of: what its first job has found on its machine, held against every later one. A
search knows all of it before but for what the machine decides (ga reads no model, and asks no device)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna import Study

from engine.errors import UserError
from ga.jobs.outcome import JobReport

PROXY = "proxy"
"""User attribute of a study: fingerprint of its jobs, and the parts that it is made of."""


def proxy_of(study: Study) -> dict[str, Any] | None:
    """Returns fingerprint and parts; None before the first job."""
    return study.user_attrs.get(PROXY)


def confirm_proxy(study: Study, job: JobReport) -> None:
    """Keeps the fingerprint of the first job. Raises UserError for one with another. Call it while the storage is
    locked."""
    if job.fingerprint is None:
        return
    known = proxy_of(study)
    if known is None:
        study.set_user_attr(PROXY, {"fingerprint": job.fingerprint, "parts": dict(job.parts)})
    elif known["fingerprint"] != job.fingerprint:
        raise UserError(another_proxy_text(study, known, job.fingerprint, job.parts))


def another_proxy_text(study: Study, known: Mapping[str, Any], fingerprint: str, parts: Mapping[str, Any]) -> str:
    """Returns the one line for results that cannot be compared with those of a study."""
    differ = [name for name, part in parts.items() if known["parts"].get(name) != part]
    return (
        f"search {study.study_name!r} cannot be continued: the proxy has changed since (fingerprint "
        f"{known['fingerprint']}, now {fingerprint}: {', '.join(differ)}); fitness values would not be comparable. "
        "Restore it, or start another search with another output_dir and search.storage"
    )


def adopt_proxy(study: Study, other: Study) -> bool:
    """Tells whether results of `other` can be taken over: it has the proxy of `study`, or `study` has none so far, and
    then that is its proxy from now on. Call it while the storage is locked."""
    known, offered = proxy_of(study), proxy_of(other)
    if known is None and offered is not None:
        study.set_user_attr(PROXY, offered)
        return True
    return known is not None and offered is not None and known["fingerprint"] == offered["fingerprint"]
