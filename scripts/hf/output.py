"""A long file that is being written: progress on stderr, and errors that name the file."""

import sys
import time


class Output:
    """Writes to a file, and tells every five seconds how much of `total` bytes is written.

    Args:
        file: an open binary file.
        path: its name in messages.
        total: bytes of all files of this program run.
        written: bytes that earlier files have.
    """

    SECONDS = 5

    def __init__(self, file, path, total, written=0):
        self.file, self.path, self.total, self.written = file, path, total, written
        self.told = time.monotonic()

    def write(self, data):
        try:
            self.file.write(data)
        except OSError as e:
            e.filename = e.filename or self.path
            raise
        self.written += getattr(data, "nbytes", len(data))
        if time.monotonic() - self.told > self.SECONDS:
            self.told = time.monotonic()
            print(f"written {self.written / 1e9:.1f} of {self.total / 1e9:.1f} GB", file=sys.stderr)
