"""How nbval runs these notebooks: headless, in this environment's kernel; warnings,
progress and HTML tables are not compared.
"""

import os

os.environ["GIPIP_HEADLESS"] = "1"
os.environ.pop("JUPYTER_PATH", None)  # a kernel found there would outrank this environment's
collect_ignore_glob = ["*.failed.ipynb"]


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")
