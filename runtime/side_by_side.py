# SPDX-License-Identifier: Apache-2.0
"""Two models run side by side on the same feeds: how far their outputs are apart over all of them."""

from __future__ import annotations

from collections.abc import Iterable

from splitfold.runtime.compare import Deviation, Distance
from splitfold.runtime.errors import SessionError
from splitfold.runtime.feeds import Feeds
from splitfold.runtime.session import Session

__all__ = ["compare_sessions"]


def compare_sessions(
    reference: Session, actual: Session, batches: Iterable[Feeds]
) -> tuple[dict[str, Deviation], int]:
    """Return each output's deviation over all `batches`, by the reference's name, and the number of batches.

    Outputs are matched by name, or by position where the names differ.

    Raises:
        SessionError: number or shapes of outputs differ, or one of the two does not run on a batch.
    """
    pairs = _pairs(reference, actual)
    distances = {name: Distance() for name in pairs}
    count = 0
    for feeds in batches:
        expected, found = reference.run(feeds), actual.run(feeds)
        for name, other in pairs.items():
            try:
                distances[name].add(expected[name], found[other])
            except ValueError as error:
                raise SessionError(f"output '{name}' of batch {count} cannot be compared: {error}") from error
        count += 1
    return {name: distance.deviation() for name, distance in distances.items()}, count


def _pairs(reference: Session, actual: Session) -> dict[str, str]:
    if len(reference.outputs) != len(actual.outputs):
        raise SessionError(
            f"the models have {len(reference.outputs)} and {len(actual.outputs)} outputs: "
            f"{', '.join(reference.outputs)} / {', '.join(actual.outputs)}."
        )
    if set(reference.outputs) == set(actual.outputs):
        return {name: name for name in reference.outputs}
    return dict(zip(reference.outputs, actual.outputs, strict=True))
