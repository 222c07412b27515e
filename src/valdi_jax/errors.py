"""Errors that the user can act on, as opposed to bugs."""


class UsageError(Exception):
    """Bad input. The message is one sentence; the commands print it and exit with status 2."""


class StoppedError(Exception):
    """Work that cannot continue. The message is one sentence; the commands exit with status 3."""
