"""What needs an accelerator; skipped where there is none."""
