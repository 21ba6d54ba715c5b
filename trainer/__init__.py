"""DeepSpeed engine, loop, EMA, checkpoints, tracking and evaluation; imports `data_pipeline` and `models`."""
