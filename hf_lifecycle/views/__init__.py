"""Pictures of what was saved. Nothing here trains."""
