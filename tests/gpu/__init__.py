"""What needs an accelerator; skipped where there is none. ``run.sh`` runs all of it on a machine with one."""
