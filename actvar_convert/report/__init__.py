"""FLOPs, quality and latency of models, and how they are shown."""
