"""What leaves a run: log lines, rates, metrics, and MLflow, fed from files by a process that can't stop a step.

Imports `state`; MLflow is imported in `mlflow_run` alone.
"""
