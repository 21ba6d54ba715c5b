"""`flowmask demo`: every step of a real run, on a dataset and a Wan that are small."""
