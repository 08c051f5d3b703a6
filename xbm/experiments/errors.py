"""Errors that the command line reports to the user in one sentence."""


class InputError(Exception):
    """Invalid input: the command line prints the message and exits with code 2."""


class DivergenceError(ArithmeticError):
    """The training diverged: the loss, an embedding or a weight is not finite."""


class LostError(Exception):
    """Another process of the run died: the command line prints the message and exits with code 1."""


class ToldError(Exception):
    """Another process of the run stopped because of a user error, and sent its message."""
