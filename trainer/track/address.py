"""Where a person opens an MLflow run: the address of its page, and what serves it."""

import shlex

from flowmask.models.safe.secrets import masked_uri
from flowmask.trainer.track import database

_LOCAL = "http://127.0.0.1:5000"  # where `mlflow ui` serves
_TRAINING = "?workflowType=machine_learning"  # else the page is that of language models, which has no runs


def page_of(uri: str, *, experiment_id: str | None, run_id: str | None = None) -> str:
    """The page of a run, or of its experiment's runs; of a database with the command that serves it.

    Empty where the server is of a kind whose pages have other addresses, or has not got the run.
    """
    if experiment_id is None:
        return ""
    page = f"/#/experiments/{experiment_id}/runs" + (f"/{run_id}" if run_id is not None else _TRAINING)
    uri = masked_uri(uri)
    if uri.startswith(("http://", "https://")):
        return uri.partition("?")[0].rstrip("/") + page
    if uri.startswith("databricks"):
        return ""
    return f"{serving(uri)}, then open {_LOCAL}{page}"


def serving(uri: str) -> str:
    """The command that serves the pages of a database."""
    return f"`mlflow ui --backend-store-uri {shlex.quote(masked_uri(database.absolute(uri)))}`"
