"""What can go wrong that the user is told of in one sentence."""


class InputError(Exception):
    """A bad input: the command line prints the sentence and exits with code 2."""


class DivergenceError(ArithmeticError):
    """A training broke down: its loss or its weights are not finite."""
