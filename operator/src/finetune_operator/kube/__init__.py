"""I/O with the Kubernetes API server. Decides nothing; the core does."""
