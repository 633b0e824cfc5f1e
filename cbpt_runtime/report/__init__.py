"""Reports for people, each in one file that needs no network: of a bundle, an evaluation, and a scan.

The templates escape every value; the pages forbid scripts and any address but ``data:``.

    charts        charts and pictures as addresses
    sections      a chart with its words and the numbers behind it; what the report of a bundle measures
    pages         the pages
    speed         the page and the plots of a bench run
"""

from cbpt_runtime.report.pages import (
    REPORT_PAGE,
    bundle_report,
    choose_examples,
    render_evaluation,
    render_labels,
    render_report,
    render_scan,
    write_page,
)

__all__ = [
    "REPORT_PAGE",
    "bundle_report",
    "choose_examples",
    "render_evaluation",
    "render_labels",
    "render_report",
    "render_scan",
    "write_page",
]
