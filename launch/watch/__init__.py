"""`flowmask status`, `logs` and `stop`: how runs are getting on, told from files and the queue alone."""
