"""What a run will need, worked out before it is submitted: arithmetic only, without torch."""
