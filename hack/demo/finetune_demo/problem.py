"""The one exception of the demo."""


class DemoProblem(Exception):
    """Why the demo cannot go on, as a sentence with what to do next; demo.py prints it and exits with 1."""
