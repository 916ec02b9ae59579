"""What `import cmtool` offers: models that sample, editing, evaluation. Nothing here prints or writes unasked."""

from cmtool.api import edit
from cmtool.api.evaluate import evaluate, search_times
from cmtool.api.model import Model, load, sample
from cmtool.api.pictures import save

__all__ = ["Model", "edit", "evaluate", "load", "sample", "save", "search_times"]
