"""The command line: what is in a directory of checkpoints, seen from the shell. Nothing here trains."""
