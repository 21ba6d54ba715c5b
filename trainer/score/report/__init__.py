"""The report of an evaluation: one page, its examples, their videos. Independent of models."""
