"""Reports for people, each in one file that needs no network: of a bundle, and of an evaluation.

The templates escape every value; the pages forbid scripts and any address but ``data:``.

    figures       pictures as addresses
    charts        charts as addresses
    sections      a chart with its words and the numbers behind it
    study         what the report of a bundle measures
    pages         the two pages
"""

from cbpt_runtime.report.pages import (
    bundle_report,
    choose_examples,
    render_evaluation,
    render_report,
    write_page,
)

__all__ = ["bundle_report", "choose_examples", "render_evaluation", "render_report", "write_page"]
