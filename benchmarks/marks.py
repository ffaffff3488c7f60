"""A part of a Markdown page between its marks, which a script writes."""

from __future__ import annotations


def placed(text: str, place: str, by: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- place: written by … -->`` and ``<!-- /place -->``. Raises SystemExit
    where they are not there."""
    begin, end = f"<!-- {place}: written by {by} -->", f"<!-- /{place} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no place for it in the page: {begin} … {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"
