"""What a person types, and how jobs reach machines; imported by nothing else."""
