"""The outputs of a run: log lines, rates, and MLflow, to which a separate process sends the run's files.

Imports `state`, the objectives and the plan of batches; only `mlflow_run` imports MLflow. A new rate goes to
`meters`, and its group to `names`.
"""
