"""What a person looks at or hands on: overlay videos, figures and run-length masks from mask PNGs; an export's card."""
