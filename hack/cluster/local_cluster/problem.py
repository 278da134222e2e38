"""The one error that a user of the cluster is meant to read: a sentence with its remedy, no traceback."""


class ClusterProblem(Exception):
    """What is wrong and what to do about it, complete in its message. Anything else that is raised is a bug."""
