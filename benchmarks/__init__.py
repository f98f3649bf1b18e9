"""What speed claims rest on: one file a question, each a ratio measured in one process. ``python -m benchmarks``."""
