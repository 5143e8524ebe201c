"""What every host promises of its saves, tested once: the host is a parameter."""
