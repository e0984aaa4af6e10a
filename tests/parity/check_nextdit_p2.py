"""The patch-2 transformer without query/key norms: the same comparisons as for patch 1."""

from check_nextdit import check

__all__ = ["check"]
