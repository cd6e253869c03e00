"""The text of bytes: UTF-8, or on request what another encoding makes of the rest."""

# What `--encoding-fallback` may name. Those of one byte a character decode nearly anything.
ENCODINGS = (
    *("latin-1", "cp1252", "iso-8859-15", "cp1250", "cp1251", "koi8-r", "mac-roman"),
    *("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"),
)


def decoded(content: bytes, fallback: str | None, utf8: str = "utf-8") -> tuple[str, str | None]:
    """The text of bytes, and the encoding that it was read by: None for UTF-8.

    Bytes with a zero among them are no text of another encoding: those of one byte a character would make one of any
    program or picture.

    Args:
        content: the bytes.
        fallback: one of `ENCODINGS`; None tries UTF-8 alone.
        utf8: "utf-8", or "utf-8-sig" to leave out a byte order mark.

    Raises:
        UnicodeDecodeError: of UTF-8; the fallback, if there is one, does not fit either.
    """
    try:
        return content.decode(utf8), None
    except UnicodeDecodeError:
        if fallback is None or b"\0" in content:
            raise
        try:
            return content.decode(fallback), fallback
        except UnicodeDecodeError:
            pass
        raise
