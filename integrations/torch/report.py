"""The figures of a call, as a mapping that waits for the device only when it is read."""

from collections.abc import Mapping

from xbm.objective import REPORT


class Report(Mapping):
    """A read-only view of the figures on the device: name to float."""

    def __init__(self, figures):
        self._figures = figures

    def __getitem__(self, name):
        if name not in REPORT:
            raise KeyError(f"{name!r}: the report has {', '.join(REPORT)}")
        return float(self._figures[REPORT.index(name)])

    def __iter__(self):
        return iter(REPORT)

    def __len__(self):
        return len(REPORT)

    def __repr__(self):
        figures = zip(REPORT, self._figures.tolist(), strict=True)
        return f"Report({', '.join(f'{name}={value:.6g}' for name, value in figures)})"
