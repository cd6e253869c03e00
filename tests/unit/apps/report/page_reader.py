"""A page as a browser would read it: tags, images, links and text."""

from html.parser import HTMLParser


class PageReader(HTMLParser):
    """Collects what a page consists of and checks that its tags are balanced."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.images, self.links = set(), set(), [], []
        self.text, self.open_tags = "", []
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
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
