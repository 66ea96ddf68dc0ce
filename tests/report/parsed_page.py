"""Reads a report back by the standard library's parser: figures, tables and attributes by name."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class ParsedPage(HTMLParser):
    """The figures, tables (lists of rows of cell texts) and tags of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.figures: dict[str, Any] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.text_of: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.source = path.read_text()
        self._open: list[tuple[str, str | None]] = []
        self._table = self._figure = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.tags.append((tag, attributes))
        self._open.append((tag, attributes.get("id")))
        if tag == "table":
            self._table = attributes["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "script":
            self._figure = attributes.get("data-figure", "")
        if tag in ("meta", "link", "input", "br"):
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        opened = [tag for tag, _ in self._open]
        if opened[-1:] == ["script"]:
            if self._figure:
                self.figures[self._figure] = json.loads(data)
            return
        for _, name in self._open:
            if name:
                self.text_of[name] = self.text_of.get(name, "") + data
        if "td" in opened or "th" in opened:
            self.tables[self._table][-1][-1] += data.replace("\u202f", " ")

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def sections(self) -> list[str]:
        return [a["id"] for tag, a in self.tags if tag == "section" and "id" in a]

    def trace(self, figure: str, name: str) -> dict[str, Any]:
        """Return the one trace of a figure whose name starts with `name`."""
        data = self.figures[figure]["data"]
        found = [trace for trace in data if trace.get("name", "").startswith(name)]
        assert len(found) == 1, [trace.get("name") for trace in data]
        return found[0]
