"""What docs/kernels-cuda.md says of runs on a GPU."""

from __future__ import annotations

from functools import partial

from gpu import page

TABLES = {"gpu": partial(page.state, figures="performance.md")}
