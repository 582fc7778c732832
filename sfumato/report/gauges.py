"""Panels of gauges of reward hacking: each over steps, beside the base model and guards' limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.report.figures import Line, Panel
from sfumato.report.records import RunRecord
from sfumato.training.guards import find_metric, limit_of

GAUGE, BASE, GUARD = "validation/gauge/", "validation/gauge_base/", "guard/"  # begin metrics


def gauge_panels(records: Sequence[RunRecord]) -> list[Panel]:
    """Return a panel for each gauge that validation recorded."""
    keys = dict.fromkeys(key for r in records for row in r.metrics for key in row)
    names = [key.removeprefix(GAUGE) for key in keys if key.startswith(GAUGE)]
    return [_panel(name, records) for name in names]


def _panel(name: str, records: Sequence[RunRecord]) -> Panel:
    lines: list[Line] = []
    bases: list[float] = []
    limits: list[float] = []
    for i, record in enumerate(records):
        steps, values = record.series(f"{GAUGE}{name}")
        guards = _guards(record, name)
        beyond = {
            row["step"] for row in record.metrics for g in guards if row.get(f"{GUARD}{g}", 0) > 0
        }
        rings = [(s, v) for s, v in zip(steps, values, strict=True) if s in beyond]
        lines.append(Line(i, steps, values, rings=rings))
        for base in record.series(f"{BASE}{name}")[1][:1]:
            bases.append(base)
            limits += [
                _limit(rule, base) for rule in guards.values() if rule.get("limit") is not None
            ]
    base = bases[0] if len(set(bases)) == 1 else None  # others stand at step 0 of their line
    return Panel(name.replace("_", " "), lines, base, limits=sorted(set(limits)))


def _guards(record: RunRecord, name: str) -> dict[str, Mapping[str, Any]]:
    """Return the settings of the guards of a gauge, those that the run had by default included."""
    typed = record.setting("guard") or {}
    logged = {
        key.removeprefix(GUARD) for row in record.metrics for key in row if key.startswith(GUARD)
    }
    guards = {key: _rule(key, typed) for key in dict.fromkeys([*typed, *sorted(logged)])}
    return {
        key: rule
        for key, rule in guards.items()
        if find_metric(rule.get("metric") or key, (f"{GAUGE}{name}",)) is not None
    }


def _rule(key: str, typed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a guard, with the limit of a default guard where none is typed."""
    rule = typed.get(key, {})
    if rule is None:  # switched off
        return {}
    own = rule.get("limit"), rule.get("relative", "off")
    limit, relative = limit_of(key, rule.get("metric"), *own)
    return {**rule, "limit": limit, "relative": relative}


def _limit(rule: Mapping[str, Any], base: float) -> float:
    """Return the value of a gauge at which its guard acts."""
    limit = rule["limit"]
    return {"ratio": limit * base, "difference": base + limit}.get(rule["relative"], limit)
