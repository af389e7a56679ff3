"""Parser of HTML pages."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Visible text (including tooltips), scripts, and tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.seen, self.scripts, self.tags, self._path = [], [], [], []
        self.feed(html)
        assert self._path == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "rect", "line", "circle", "polyline", "polygon", "img"):
            self._path.append((tag, dict(attributes)))
        elif not self.get_starttag_text().endswith("/>"):
            assert tag in ("meta", "link", "img")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._path.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self._path]
        if "script" in tags:
            self.scripts.append(data)
        elif "style" not in tags and not any("aria-hidden" in attributes for _, attributes in self._path):
            self.seen.append(data)
