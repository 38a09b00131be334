"""Text in columns and of durations, for banners and tables on a terminal. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def duration_text(seconds: float) -> str:
    """Returns "5 h 00 min", "1 min 01 s" or "10 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def labelled_lines(rows: Sequence[tuple[str, str | Sequence[str]]]) -> str:
    """Returns aligned `label  text` lines; a list of texts continues under its first line."""
    lines = []
    for label, text in rows:
        texts = [text] if isinstance(text, str) else list(text)
        lines += [f"{label if i == 0 else '':<12}{line}" for i, line in enumerate(texts)]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Returns one line for each row: cells two blanks apart and aligned to the right, those of the columns `left` to
    the left. A row of one cell is a line of its own."""
    wide = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in wide) for i in range(len(wide[0]))] if wide else []
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip() if len(row) > 1 else row[0])
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Returns "1 rank", "2 ranks"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
