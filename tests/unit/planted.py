"""What a hostile directory may hold."""

import os


class Bomb:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
