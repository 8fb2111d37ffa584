# SPDX-License-Identifier: Apache-2.0
"""What a compilation did, as text: passes, skipped candidates with reasons, kernels, deviation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from splitfold.compiler.cli.output import deviation_text, megabytes, out, say, table
from splitfold.compiler.debug.snapshots import Snapshots
from splitfold.passes.base import Contract
from splitfold.passes.pipeline import PassRecord
from splitfold.runtime.artifact import Artifact

__all__ = [
    "print_deviation",
    "print_kernels",
    "print_passes",
    "print_report",
    "print_skipped",
    "say_snapshots",
]

_NAMES_SHOWN = 4


def print_report(artifact: Artifact, *, verbose: bool) -> None:
    """Print all that a compilation did."""
    say("pipeline", artifact.manifest["pipeline"])
    print_passes(artifact.records)
    print_skipped(artifact.records, verbose=verbose)
    _print_idle(artifact.records)
    print_kernels(artifact.manifest)
    print_deviation(artifact.manifest)


def _print_idle(records: Sequence[PassRecord]) -> None:
    """Say it where passes were to make the model smaller and none found anything to do."""
    lossy = [record for record in records if record.contract == Contract.LOSSY.value]
    if lossy and not any(record.applied for record in lossy):
        out().print("\nnothing was quantized: every candidate was skipped (require=some makes this an error)")


def print_passes(records: Sequence[PassRecord]) -> None:
    """Print one row a pass, and its notes."""
    rows = [
        (
            _name(record),
            len(record.applied) if record.modified or record.applied else "unchanged",
            len(record.skipped),
            f"{record.nodes_before} > {record.nodes_after}",
            f"{megabytes(record.bytes_before)} > {megabytes(record.bytes_after)}",
            f"{record.seconds:.2f}",
            deviation_text(record.deviation),
        )
        for record in records
    ]
    table(("pass", "applied#", "skipped#", "nodes#", "weights#", "seconds#", "deviation over the pass"), rows)
    for record in records:
        for what, count in Counter(what for _, what in record.applied).items():
            times = f"{count} x " if count > 1 else ""
            out().print(f"  {_name(record)}: {times}{what}", soft_wrap=True)
        for note in record.notes:
            out().print(f"  {_name(record)}: {note}", soft_wrap=True)


def _name(record: PassRecord) -> str:
    return record.text.partition("{")[0]


def print_skipped(records: Sequence[PassRecord], *, verbose: bool) -> None:
    """Print each pass's skipped candidates, grouped by reason; `verbose` names all of them."""
    if not any(record.skipped for record in records):
        return
    out().print("\nskipped" + ("" if verbose else " (-v names every layer)"))
    for record in records:
        grouped: defaultdict[str, list[str]] = defaultdict(list)
        for layer, reason in record.skipped:
            grouped[reason].append(layer)
        for reason, layers in sorted(grouped.items(), key=lambda item: -len(item[1])):
            out().print(
                f"  {_name(record)}: {len(layers)} x {reason}: {_layers(layers, verbose)}", soft_wrap=True
            )


def _layers(layers: Sequence[str], verbose: bool) -> str:
    if verbose or len(layers) <= _NAMES_SHOWN:
        return ", ".join(layers)
    return ", ".join(layers[:_NAMES_SHOWN]) + f", and {len(layers) - _NAMES_SHOWN} more"


def print_kernels(manifest: Mapping[str, Any]) -> None:
    """Print which kernels of the runtime compute the low-bit layers, and each layer that none does."""
    realised, put_back = manifest.get("realised", {}), manifest.get("put_back", {})
    if not realised and not put_back:
        return
    counts = Counter(item["kernel"] for item in realised.values() if item["low_bit"])
    out().print()
    say(
        "kernels",
        ", ".join(f"{kernel} {count}" for kernel, count in counts.most_common()) or "no low-bit kernel",
    )
    for layer, item in realised.items():
        if not item["low_bit"]:
            out().print(f"  not realised: {layer} runs as {item['kernel']}", soft_wrap=True)
    for layer, kernel in put_back.items():
        out().print(
            f"  taken back: {layer}: no low-bit kernel of the target computed it, it ran as {kernel}",
            soft_wrap=True,
        )


def print_deviation(manifest: Mapping[str, Any]) -> None:
    """Print the deviation of each output of the result, as deployed, from the reference."""
    rows = [
        (name, *(_number(found[key]) for key in ("cosine", "sqnr_db", "max_abs", "relative", "top1")))
        for name, found in manifest["deviation"].items()
    ]
    if manifest.get("unverified"):
        out().print(f"\nNOT VERIFIED: {manifest['unverified']}.", soft_wrap=True)
        return
    where = "on synthetic inputs" if manifest.get("feeds_synthetic") else "on the example inputs"
    out().print(f"\nthe result as deployed against the reference, {where}")
    table(("output", "cosine#", "SQNR dB#", "max abs#", "relative#", "top-1#"), rows)


def say_snapshots(taken: Sequence[Snapshots]) -> None:
    """Print where the snapshots are."""
    for snapshots in taken:
        say("snapshots", f"{len(snapshots.models)} models in {snapshots.models[0].parent}")


def _number(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.5g}"
