"""Whether the gate of a result passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OK, SKIPPED, FAILED, MARKED = "ok", "skipped", "failed", "marked"
"""Outcomes of a result. "marked": timed although its check failed; it has no speed-up."""


def outcome(result: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the gate of a case passed, and the reason why it did not.

    A contender that fails beside a subject that passed is no failure of the case.
    """
    if result.get("skipped_because"):
        return SKIPPED, str(result["skipped_because"])
    if result.get("marked"):
        return MARKED, str(result["marked"])
    parts = [result, *(p for p in result.values() if isinstance(p, Mapping) and "failed" in p)]
    faults: list[str] = []
    for part in parts:
        failed, subject = part.get("failed") or {}, part.get("subject")
        if isinstance(failed, Mapping):
            failed = [f"{w}: {why}" for w, why in failed.items() if subject in (None, w)]
        faults += [failed] if isinstance(failed, str) else map(str, failed)
    return (FAILED, "; ".join(faults)[:400]) if faults else (OK, "")
