"""The outputs of a run: log lines, rates, and MLflow, which a separate process feeds from files.

Imports `state`, the objectives and the plan of batches; MLflow in `mlflow_run` alone. A new rate goes to
`meters`, and its group to `names`.
"""
