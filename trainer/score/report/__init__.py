"""What a person looks at after an evaluation: one page, its examples, their videos. Knows scores, not models."""
