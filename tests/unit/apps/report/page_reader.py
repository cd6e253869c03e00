"""A page as a browser would read it: tags, images, links and text."""

import base64
from html.parser import HTMLParser


class PageReader(HTMLParser):
    """Collects what a page consists of and checks that its tags are balanced."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.images, self.links = set(), set(), [], []
        self.text, self.open_tags, self.policy = "", [], ""
        self.feed(html)
        assert self.open_tags == []

    @property
    def pictures(self):
        """The contents of the images, all of which lie within the page."""
        beginning = "data:image/png;base64,"
        assert all(image.startswith(beginning) for image in self.images)
        return [base64.b64decode(image.removeprefix(beginning), validate=True) for image in self.images]

    def names(self, directory):
        """The files beside the page that are its images, by what is in them."""
        by_content = {path.read_bytes(): path.relative_to(directory).as_posix() for path in directory.rglob("*.png")}
        return sorted(by_content[picture] for picture in self.pictures)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag == "a":
            self.links.append(dict(attributes)["href"])
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data
