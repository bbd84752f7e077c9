"""A reader of HTML that is stricter than a browser: every tag is closed in its turn, nothing runs and nothing is fetched."""

from html.parser import HTMLParser

VOID = {"input", "br", "img"}
ACTIVE = {"script", "iframe", "object", "embed", "link", "meta", "base"}


class Reader(HTMLParser):
    """Collects tags, attributes, the text outside styles, and per table its rows as text."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.tables = [], [], [], "", []
        self.feed(markup)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        assert not ACTIVE & set(self.tags), "something that could run or fetch"
        for name, value in self.attributes:
            assert not name.startswith("on") and name not in ("src", "href", "id"), (name, value)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data

    def of(self, name):
        """The values of one attribute, in order."""
        return [value for attribute, value in self.attributes if attribute == name]


def table_of(markup: str) -> list[dict[str, str]]:
    """The rows of the first table by its header."""
    header, *rows = Reader(markup).tables[0]
    return [dict(zip(header, row, strict=True)) for row in rows]
