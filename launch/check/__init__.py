"""What is asked before anything runs: `flowmask doctor` about the machine, preflight about a job."""
