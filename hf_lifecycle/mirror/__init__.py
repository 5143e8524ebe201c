"""A mirror for committed checkpoints: copied in the background, verified and rotated there, found there."""
