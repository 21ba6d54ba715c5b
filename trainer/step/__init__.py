"""One optimizer step at any ZeRO stage: engine, optimizers, fragments, EMA. Knows no folder and no loop.

Imports `models`, the config and `distributed`; only `zero` imports DeepSpeed.
A new optimizer is a file here and a branch in `Engine._make_optimizer`.
"""
