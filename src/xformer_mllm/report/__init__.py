"""One run, one page: scores, curves, images and configuration as a single self-contained HTML file.

Ground floor: plain data in, one file out. Nothing is fetched, neither when the page is written nor when it is read:
images are embedded, plots are inline SVG or HTML that take their colours from the reader's light or dark setting.

    write_report(Path("report.html"), Report(title=..., variants=("qformer", "xformer"), settings=[Setting(...)], ...))

Every part may be empty; a part that is empty is left out. All text is escaped.
"""

from xformer_mllm.report.benchmark import Example, benchmark_page, number
from xformer_mllm.report.contents import Report, Run, Setting, Strip
from xformer_mllm.report.findings import overall, verdict
from xformer_mllm.report.page import write_report
from xformer_mllm.report.queries import query_section
from xformer_mllm.report.wording import display_name, plain

__all__ = [
    "Example",
    "Report",
    "Run",
    "Setting",
    "Strip",
    "benchmark_page",
    "display_name",
    "number",
    "overall",
    "plain",
    "query_section",
    "verdict",
    "write_report",
]
