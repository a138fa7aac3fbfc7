"""Tables for people: what can be merged, what cannot and why, what a plan takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from tabulate import tabulate

from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import Findings
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Candidate, Proposal, Refusal
from fxmerge.core.table import ImportanceTable, LatencyTable, Measurement
from fxmerge.errors import InputError
from fxmerge.graph.meta import facts
from fxmerge.operators import Activation, Join, Map, Norm, Opaque, Verdict

#: What :func:`explain` can print.
Subject: TypeAlias = (
    Findings | Plan | ParetoFront | LatencyTable | ImportanceTable | Measurement | Sequence[Proposal] | Sequence[Measurement]
)


def explain(
    subject: Subject,
    *,
    latency: LatencyTable | None = None,
    importance: ImportanceTable | None = None,
) -> str:
    """A text with tables about anything that the pipeline makes.

    Args:
        subject: findings (nodes, segments with their candidates, refusals), proposals, a plan, a front, a table of latencies or
            importances, or measurements.
        latency: shows what each candidate takes.
        importance: shows what each candidate costs.

    Returns:
        Plain text; print it.

    Raises:
        InputError: it is nothing of these.
    """
    if isinstance(subject, Findings):
        return "\n\n".join((_nodes(subject), _proposals(propose(subject), latency, importance), _refusals(subject.refusals)))
    if isinstance(subject, Plan):
        return _plan(subject, latency, importance)
    if isinstance(subject, ParetoFront):
        return _front(subject)
    if isinstance(subject, LatencyTable):
        return _latencies(subject)
    if isinstance(subject, ImportanceTable):
        return _importances(subject)
    return _of_several([subject] if isinstance(subject, Measurement) else subject, latency, importance)


def _of_several(subject: object, latency: LatencyTable | None, importance: ImportanceTable | None) -> str:
    """Proposals, or measurements."""
    items = subject if isinstance(subject, (tuple, list)) else (subject,)
    proposals = [item for item in items if isinstance(item, Proposal)]
    measurements = [item for item in items if isinstance(item, Measurement)]
    if len(proposals) == len(items):
        return _proposals(proposals, latency, importance)
    if len(measurements) == len(items):
        rows = [(*_timing(m), str(m.target), ", ".join(f"{k} {v}" for k, v in m.versions.items())) for m in measurements]
        return _table("Measurements", rows, ("ms", "+-", "repeats", "target", "versions"))
    found = next(type(item).__name__ for item in items if not isinstance(item, (Proposal, Measurement)))
    raise InputError(
        f"explain prints findings, proposals, plans, fronts, tables and measurements, found {found}; of a network print its "
        "code, of weights a geometry"
    )


def _nodes(findings: Findings) -> str:
    rows = [
        (node.name, _verdict(verdict), "x".join(map(str, facts(node).shape or ())), facts(node).target, facts(node).source)
        for node, verdict in findings.verdicts.items()
        if node.op.startswith("call_") and facts(node).shape is not None
    ]
    return _table("Nodes", rows, ("node", "what it is", "output", "in your model", "source"))


def _verdict(verdict: Verdict) -> str:
    if isinstance(verdict, Map):
        return f"{verdict.role} {verdict.geometry}" if verdict.role != "other" else f"affine {verdict.geometry}"
    if isinstance(verdict, Join):
        return verdict.kind
    if isinstance(verdict, Activation):
        return f"activation {verdict.name}"
    if isinstance(verdict, Norm):
        return f"norm of its input {verdict.name}"
    assert isinstance(verdict, Opaque)
    return "opaque"


def _proposals(proposals: Sequence[Proposal], latency: LatencyTable | None, importance: ImportanceTable | None) -> str:
    rows = []
    for proposal in proposals:
        segment = proposal.segment
        for number, candidate in enumerate(proposal.candidates):
            lead = (str(segment), len(segment.convolutions), len(segment.activations)) if number == 0 else ("", "", "")
            what = f"{candidate.kind}{' pruned' if candidate.removed else ''}{_norms_out(candidate)}"
            what += f", {candidate.added} behind" if candidate.added else ""
            rows.append(
                (*lead, what, str(candidate.geometry), "yes" if candidate.exact else "")
                + ((_ms(latency.candidate_ns(candidate.id)) if candidate.id in latency.candidates else "",) if latency else ())
                + ((_loss(importance, candidate.id),) if importance else ())
            )
    heads = ["segment", "convolutions", "activations out", "candidate", "one convolution", "exact"]
    return _table("Segments and candidates", rows, (*heads, *(["ms"] if latency else []), *(["loss"] if importance else [])))


def _norms_out(candidate: Candidate) -> str:
    """What becomes of the norms inside."""
    if candidate.moved:
        return ", norm moved"
    what = "norm fixed" if candidate.kind == "composed" else "norm out"
    return f", {what}" if candidate.norms else ""


def _loss(importance: ImportanceTable, name: str) -> str:
    return f"{importance.loss(name):.4g}" if name in importance.candidates else ""


def _refusals(refusals: Sequence[Refusal]) -> str:
    rows = [(r.node, r.reason.value, r.detail, r.advice, r.source) for r in refusals]
    return _table("Refusals", rows, ("node", "reason", "detail", "what would help", "source"))


def _plan(plan: Plan, latency: LatencyTable | None, importance: ImportanceTable | None) -> str:
    rows = [
        (
            f"{merge.entry} -> {merge.end}",
            f"{merge.kind}{_norms_out(merge)}",
            str(merge.geometry) if merge.kind != "identity" else "",
            len(merge.activations),
            len(merge.removed),
            _ms(latency.candidate_ns(merge.id)) if latency and merge.id in latency.candidates else "",
            _loss(importance, merge.id) if importance else "",
        )
        for merge in plan.merges
    ]
    predicted = "" if plan.latency_ns is None else f", {_ms(plan.latency_ns)} ms predicted"
    kind = "" if plan.objective == "additive-loss" else f" ({plan.objective}: layers less the sum of exp(change))"
    title = f"Plan: {len(plan.merges)} merges{predicted}, loss {plan.loss:.4g}{kind}"
    return _table(title, rows, ("segment", "kind", "one convolution", "activations out", "layers pruned", "ms", "loss"))


def _latencies(table: LatencyTable) -> str:
    """What was timed, and how much of the whole that is."""
    names: dict[str, list[str]] = {}
    for kept, group in (("candidate", table.candidates), ("as it is", table.units)):
        for name, key in group.items():
            names.setdefault(key, []).append(f"{kept}: {name}")
    rows = [(*_timing(m), names.get(key, [""])[0], len(names.get(key, ()))) for key, m in table.measurements.items()]
    title = f"Latencies: {_ms(table.network.median_ns)} ms the whole, {_ms(table.remainder_ns)} ms of it in no entry"
    return _table(title, rows, ("ms", "+-", "repeats", "first that takes this", "how many"))


def _importances(table: ImportanceTable) -> str:
    rows = [(name, f"{found.loss:.4g}", found.samples, found.scorer) for name, found in table.candidates.items()]
    return _table("Importances", rows, ("candidate", "loss", "images", "scorer"))


def _timing(measurement: Measurement) -> tuple[str, str, int]:
    return _ms(measurement.median_ns), _ms(measurement.spread_ns // 2), measurement.repeats


def _front(front: ParetoFront, most: int = 24) -> str:
    step = max(1, len(front) // most)
    rows = [
        (
            f"{front.original_ns / front.latencies_ns[i]:.3f}x",
            _ms(front.latencies_ns[i]),
            *([front.amounts[i]] if front.amounts else []),
            f"{front.losses[i]:.4g}",
        )
        for i in range(0, len(front), step)
    ]
    loss = "loss" if front.objective == "additive-loss" else f"loss ({front.objective})"
    heads = ("speed-up", "ms", *([front.second or "amount"] if front.amounts else []), loss)
    return _table(f"Front: {len(front)} plans, every {step}. shown", rows, heads)


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.3f}"


def _table(title: str, rows: Sequence[Sequence[object]], heads: Sequence[str]) -> str:
    return f"{title}\n{tabulate(rows, headers=heads, disable_numparse=True) if rows else '(none)'}"
