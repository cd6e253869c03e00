"""Tell an error of a collective whose other rank has ended from an error of this rank: torch has no type for it."""

# What gloo says of a peer whose process has ended, and NCCL of one that it cannot reach any more.
_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited or there was a network error",
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
