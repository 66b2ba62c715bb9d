"""Files: reading dense checkpoints, writing and reading sparse folders, run state, the bundled models."""
