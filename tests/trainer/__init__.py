"""The parts of LifecycleCallback and what they promise."""
