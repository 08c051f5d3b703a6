"""The figures of a call, as a mapping that synchronises the device only when it is read."""

from collections.abc import Iterator, Mapping

import torch

from xbm.report import REPORT


class Report(Mapping[str, float]):
    """A read-only view of the figures on the device, {name: float}: the fields of `xbm.Report`."""

    def __init__(self, figures: torch.Tensor) -> None:
        self._figures = figures

    def __getitem__(self, name: str) -> float:
        if name not in REPORT:
            raise KeyError(f"{name!r}: the report has {', '.join(REPORT)}")
        return float(self._figures[REPORT.index(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(REPORT)

    def __len__(self) -> int:
        return len(REPORT)

    def __repr__(self) -> str:
        figures = zip(REPORT, self._figures.tolist(), strict=True)
        return f"Report({', '.join(f'{name}={value:.6g}' for name, value in figures)})"
