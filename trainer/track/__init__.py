"""What leaves a run: log lines, rates, and MLflow, fed from files by a process that can't stop a step.

Imports `state`, the objectives and the plan of batches; MLflow in `mlflow_run` alone. A new rate goes to
`meters`, and its group to `names`.
"""
