"""Turn a diffusers pipeline and a trained router into the bundle that `edge_agent` opens.

Importing this package is cheap; `python -m export` is its door and `export.build.export_bundle`
the function behind it.
"""

from export.errors import ExportError

__all__ = ["ExportError"]
