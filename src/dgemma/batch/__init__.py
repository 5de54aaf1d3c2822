"""Mass generation: every line of a file answered exactly once, whatever happens on the way."""

from .cluster import Cluster
from .merge import Merged, merge
from .run import run
from .settings import BatchSettings, Progress, Summary

__all__ = ["BatchSettings", "Cluster", "Merged", "Progress", "Summary", "merge", "run"]
