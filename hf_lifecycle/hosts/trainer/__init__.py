"""When things happen under the Trainer of transformers: LifecycleCallback and its parts."""
