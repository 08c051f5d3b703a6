"""Result tables with three output formats: terminal, Markdown and JSON."""

from dataclasses import dataclass, field

from rich.table import Table as RichTable


@dataclass
class Table:
    """A benchmark's results: cells as text, and the figures behind them."""

    title: str
    columns: tuple[str, ...]
    notes: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figures: list[dict] = field(default_factory=list)  # one per row; seconds, bytes, shares

    def add(self, figures, *cells):
        """Append a row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of {self.title!r} needs {len(self.columns)} cells, got {len(cells)}")
        self.figures.append(figures)
        self.rows.append(cells)

    def rich(self):
        """Return the table for a terminal."""
        table = RichTable(title=self.title, caption=self.notes, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self):
        """Return the table as Markdown."""
        lines = [self.columns, ("---:",) * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"### {self.title}\n\n{table}\n\n{self.notes}\n"

    def json(self):
        """Return the table as JSON-serializable values."""
        return {"title": self.title, "notes": self.notes, "figures": self.figures}


def both(times):
    """Format the fastest and, in brackets, the median of multiples."""
    return f"{times.fastest:.2f} ({times.median:.2f})"


def span(seconds):
    """Format a time with a suitable unit."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def megabytes(size):
    """Format bytes as MB (10^6 bytes). A string `size` is the reason why there is no figure, shown in brackets."""
    return f"- ({size})" if isinstance(size, str) else f"{size / 1e6:,.0f} MB"
