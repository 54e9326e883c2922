"""What pruning did, to look at: one page of HTML that needs nothing else, figures (``[report]``) and tables (``[cli]``)."""

from prunekit.report.report import Report, make_report
from prunekit.report.sensitivity import measure_sensitivity

__all__ = ["Report", "make_report", "measure_sensitivity"]
