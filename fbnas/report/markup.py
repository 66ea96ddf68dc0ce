"""Pieces of HTML that several parts of the page share; contents are HTML, so escape before."""

from collections.abc import Iterable, Mapping
from html import escape


def table(name: str, caption: str, columns: Iterable[str], rows: Iterable[str]) -> str:
    """Return a captioned table that scrolls by itself where the page is narrow; rows are <tr>s."""
    heads = "".join(f"<th scope=col>{column}</th>" for column in columns)
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    return (
        f'<div class="scroll"><table id="{name}"><caption>{caption}</caption>'
        f"{head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def facts(name: str, caption: str, content: Mapping[str, object]) -> str:
    """Return names and values as a table of two columns."""
    rows = []
    for key, value in content.items():
        name_cell = f"<th scope=row>{escape(str(key).replace('_', ' '))}</th>"
        rows.append(f"<tr>{name_cell}<td>{escape(str(value))}</td></tr>")
    return table(name, escape(caption), (), rows) if rows else ""


def details(summary: str, content: str) -> str:
    """Return `content` folded away under a line, or nothing where it is empty."""
    if not content:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def number(text: str) -> str:
    """Return a table cell that holds a number."""
    return f"<td class=number>{text}</td>"


def note(text: str) -> str:
    """Return small print, or nothing."""
    return f"<small>{text}</small>" if text else ""
