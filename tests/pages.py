"""An HTML page as tests look at it: that its tags nest, what it shows, what a browser would run."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, links, pictures and visible text of a page; `active` is what runs or leaves the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images = [], set(), [], []
        self.active, self.words = [], []
        self.feed(text)
        assert set(self.open) <= {"html", "body"}  # HTML lets their end out

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            linked = name in ("src", "href", "srcset", "data")
            self.links += [value] if linked else []
            remote = linked and re.match(r"\s*(https?:|//|javascript:)", value or "")
            if name.startswith("on") or remote:
                self.active.append((tag, name, value))
        self.images += [dict(attrs)["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
