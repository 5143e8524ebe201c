"""What this process knows: random number generators, environment, fingerprints. Nothing here touches a disk."""
