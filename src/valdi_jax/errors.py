"""Errors that are said in one sentence, as opposed to defects."""


class UsageError(Exception):
    """Bad input, said in one sentence; the commands print it and exit with status 2."""


class StoppedError(Exception):
    """Work that cannot go on, said in one sentence; the commands exit with status 3."""
