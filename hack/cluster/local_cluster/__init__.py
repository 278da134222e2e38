"""A real single-node Kubernetes for machines that have none. See ../README.md; the entry point is cli.py."""
