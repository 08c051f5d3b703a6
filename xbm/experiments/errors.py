"""What can go wrong that the user is told of in one sentence."""


class InputError(Exception):
    """A bad input: the command line prints the sentence and exits with code 2."""


class DivergenceError(ArithmeticError):
    """A training broke down: its loss or its weights are not finite."""


class LostError(Exception):
    """Another process of the run is gone: the command line prints the sentence and exits with code 1."""


class ToldError(Exception):
    """Another process of the run refuses to go on, and has said why."""
