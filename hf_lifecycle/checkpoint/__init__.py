"""What a file or a directory on disk promises. Nothing here knows transformers."""
