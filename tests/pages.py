"""HTML pages, read for tests."""

import html.parser


class Parsed(html.parser.HTMLParser):
    """Checks that tags are balanced and styles load nothing, and keeps: tags, ids, what attributes refer to, style attributes, text, the cells
    of table rows, and the views with a filmstrip by section."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.styles, self.words, self.rows, self.strips = [], [], [], [], [], [], [], {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")]
        self.styles += [attrs["style"]] if "style" in attrs else []
        if tag == "section":
            self.section = attrs.get("id", "")
        if "data-view" in attrs:
            self.strips.setdefault(self.section, []).append(attrs["data-view"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
