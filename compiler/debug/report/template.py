# SPDX-License-Identifier: Apache-2.0
"""One HTML page out of a report's data: style, scripts, figures and the plotting library inlined."""

from __future__ import annotations

import base64
import gzip
import re
from importlib import resources

import jinja2
import markupsafe

from splitfold.compiler.debug.report.data import ReportData
from splitfold.compiler.debug.report.figures import COLOURS
from splitfold.compiler.debug.report.formatting import (
    byte_text,
    count_text,
    decibel_text,
    second_text,
    share,
    short,
)
from splitfold.compiler.debug.report.page import Page
from splitfold.compiler.errors import ReportError

__all__ = ["plotting_library", "render"]

_PACKAGE = "splitfold.compiler.debug.report"
_BREAKS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[./_])(?=.)")
"""Where a long name may be broken: after a dot, slash or underscore, before a hump."""


def _breakable(name: str) -> markupsafe.Markup:
    return markupsafe.Markup("<wbr>").join(_BREAKS.split(name))


_FILTERS = {
    "breakable": _breakable,
    "bytes": byte_text,
    "count": count_text,
    "decibels": lambda number, equal=False: decibel_text(number, equal=equal),
    "seconds": second_text,
    "share": share,
    "short": short,
}


def plotting_library() -> str:
    """Return plotly's JavaScript.

    Raises:
        ReportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(
            "a report needs plotly for its pictures: pip install 'splitfold[report]'"
        ) from error
    return str(get_plotlyjs())


def render(data: ReportData) -> str:
    """Return the page.

    Raises:
        ReportError: plotly is not installed.
    """
    packed = gzip.compress(plotting_library().encode(), 9, mtime=0)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= _FILTERS
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_source("page.html")).render(
        report=data,
        page=Page(data),
        colours=COLOURS,
        plotly=base64.b64encode(packed).decode(),
        source=_inlined,
    )


def _source(name: str) -> str:
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _inlined(name: str) -> markupsafe.Markup:
    return markupsafe.Markup(_source(name))
