"""HTML reports: plain data in, one self-contained file out.

Images are embedded and plots are inline SVG or HTML, so a page needs no network and no other file. Parts without data
are left out. The templates are in `templates/`; they escape all text.

    write_report(Path("report.html"), Report(title=..., variants=("qformer", "xformer"), settings=[Setting(...)], ...))
"""

from xformer_mllm.report.benchmark import Example, benchmark_page, number
from xformer_mllm.report.comparison import write_report
from xformer_mllm.report.contents import Report, Run, Setting, Strip
from xformer_mllm.report.findings import overall, verdict
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
    "verdict",
    "write_report",
]
