"""Errors that a user can cause, as opposed to defects."""


class UsageError(Exception):
    """Bad input, said in one sentence; the commands print it and exit with status 2."""
