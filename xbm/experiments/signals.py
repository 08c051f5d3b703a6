"""Ctrl-C and SIGTERM, noted instead of obeyed at once."""

import signal
from contextlib import contextmanager

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Which signal asked for an end, 0 so far."""

    signal = 0

    def note(self, number, _):
        """Note a signal; the second Ctrl-C ends at once, as any does elsewhere."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def noted():
    """Yield a `Stop` that notes the signals of this block."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in CAUGHT}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
