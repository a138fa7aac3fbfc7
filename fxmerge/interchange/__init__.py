"""Tables of other code bases: LayerMerge's, read and written, and those of depth compression before it, read."""

from __future__ import annotations

from fxmerge.interchange.depth import DepthTables
from fxmerge.interchange.depth_files import read_depth_tables
from fxmerge.interchange.layermerge import PublishedTables, read_published
from fxmerge.interchange.writing import write_published

__all__ = ["DepthTables", "PublishedTables", "read_depth_tables", "read_published", "write_published"]
