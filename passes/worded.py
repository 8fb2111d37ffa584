# SPDX-License-Identifier: Apache-2.0
"""Values of options that have a text form of their own."""

from __future__ import annotations

import abc
from typing import ClassVar, Self

__all__ = ["Worded"]


class Worded(abc.ABC):
    """A value of an option that has a text form of its own: `parse` and `str` are inverse.

    The text is one word, without spaces, commas, braces, brackets, quotes and equals signs.
    """

    described: ClassVar[str]
    """What such an option takes, for people."""

    @classmethod
    @abc.abstractmethod
    def parse(cls, text: str) -> Self:
        """Return the value of a text form.

        Raises:
            SpecError: there is none.
        """
