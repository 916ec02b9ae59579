"""Finding models, as commands know it: `cmtool.api.find`."""

from cmtool.api.find import FoundModel, find_model, finished_runs

__all__ = ["FoundModel", "find_model", "finished_runs"]
