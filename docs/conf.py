"""Settings of the documentation site. `scripts/docs` builds it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "commhooks"
author = "the commhooks authors"
release = version = re.search(r'__version__ = "(.+)"', (ROOT / "commhooks" / "__init__.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 4

autodoc_mock_imports = ["horovod", "mpi4py"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = False
napoleon_use_rtype = False

# Names with dots stand in signatures: types of torch, of the standard library, and of modules without a page.
nitpick_ignore = [
    ("py:class", name)
    for name in ("Tensor", "Period", "Parameters", "Choice", "BufferChoice", "OuterOptimizer")
]
nitpick_ignore_regex = [(r"py:.*", r"(torch|collections|commhooks|dist)\..+")]

html_theme = "furo"
html_title = f"commhooks {version}"
html_show_sphinx = False
html_copy_source = False
