"""What a stranger's pickle may do: shared by the tests that must not let it."""

import os


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
