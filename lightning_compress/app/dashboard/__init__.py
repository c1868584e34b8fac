"""The dashboard: the runs below a folder as one HTML page that needs neither a server nor a network.

`gather.py` reads folders into plain data, `page.py` makes the page of it, `assets/` is what the browser runs. Nothing
here imports torch: the page of a thousand runs is written in the time that loading it would take.
"""

from lightning_compress.app.dashboard.command import DashboardError, write_dashboard

__all__ = ["DashboardError", "write_dashboard"]
