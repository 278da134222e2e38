"""The Kubernetes operator of FineTuneJob."""
