"""What waits on stdin, before anybody reads it. Knows nothing about what it is for."""

from __future__ import annotations

import os
import stat
import sys


def stdin_has_data() -> bool:
    """Whether stdin is a file or a pipe that already holds text."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(mode):
            return os.fstat(sys.stdin.fileno()).st_size > 0
        if not stat.S_ISFIFO(mode):
            return False
        import fcntl
        import termios

        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder) > 0
    except (AttributeError, ImportError, OSError, ValueError):  # no stdin, or a system that cannot tell
        return False


def stdin_may_have_data() -> bool:
    """Whether a program may still write to stdin: it is a pipe that is open, or holds text already."""
    if stdin_has_data():
        return True
    try:
        if not stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
            return False
        import select

        return not select.select([sys.stdin.fileno()], [], [], 0)[0]  # readable without data is its end
    except (AttributeError, ImportError, OSError, ValueError):
        return False


def end_is_waiting() -> bool:
    """Whether Ctrl-D was typed before anybody asked: it is taken from the terminal, which would give a prompt that
    edits lines a null character for it."""
    try:
        import fcntl
        import select
        import termios

        descriptor = sys.stdin.fileno()
        if not select.select([descriptor], [], [], 0)[0]:
            return False
        waiting = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder) == 0 and os.read(descriptor, 1) == b""
    except (ImportError, OSError, ValueError):  # a system that cannot tell
        return False
