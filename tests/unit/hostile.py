"""Texts that do something else than being read, when they reach a terminal, a log, a page or a plot as they are."""

import unicodedata

FORGED_LINE = "2030-01-01 00:00:00,000 ERROR forged"
TEXTS = {
    "terminal_escape": "a\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "csi_of_one_byte": "a\x9b31mred\x9d0;title\x9c",
    "bell_backspace_delete": "safe\x07\x08\x08\x08\x08evil\x7f",
    "carriage_return": "refused\raccepted",
    "forged_line": f"name\n{FORGED_LINE}",
    "other_line_ends": f"name\x0b\x0c\x1c\x85\u2028\u2029{FORGED_LINE}",
    "bidirectional": "txt.\u202egpj.exe\u202c\u2066\u2069\u200f",
    "zero_width": "pass\u200bword\ufeff\u2060\u00ad\u3164",
    "not_utf8": b"caf\xe9\xff".decode("utf-8", "surrogateescape"),
    "html": "<script>alert('1')</script>\"&]]><!--",
    "mathematics": "$x^2$ \\frac{1}{$",
    "markup": "[red]text[/red] [link=file:///x]y[/link]",
}


def dangers(text: str, meant: str = "") -> set[str]:
    """Characters of a text that are not simply drawn, without those that are meant."""
    categories = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return {sign for sign in text if unicodedata.category(sign) in categories or sign == "\u3164"} - set(meant)
