# SPDX-License-Identifier: Apache-2.0
"""The report of a compilation: one HTML file that needs no network."""

from splitfold.compiler.debug.report.data import ReportData
from splitfold.compiler.debug.report.reopen import reopen
from splitfold.compiler.debug.report.writer import REPORT_FILE, check_report, write_report

__all__ = ["REPORT_FILE", "ReportData", "check_report", "reopen", "write_report"]
