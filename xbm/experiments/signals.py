"""Deferred handling of Ctrl-C and SIGTERM: the signal is recorded, and the run stops after the current step."""

import signal
from contextlib import contextmanager

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Record of the last signal received; `signal` is 0 if there was none."""

    signal = 0

    def note(self, number, _):
        """Record a signal. Ctrl-C after another signal raises KeyboardInterrupt."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def noted():
    """Yield a `Stop` that records the signals received within the block."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in CAUGHT}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
