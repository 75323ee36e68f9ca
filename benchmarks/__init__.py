"""What the pack costs: measured or predicted, never asserted on time. `make bench` runs them all."""
