"""Lets the modes of files hold for a test that root runs."""

import ctypes
import os

_VERSION_3 = 0x20080522  # of <linux/capability.h>


def obey_file_modes() -> None:
    """Gives up root's capabilities in this process, so that a mode such as 0555 stops it as it stops others.

    The user stays the same: another one might not be allowed to enter the folders that Python lies in.
    """
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)  # 0: this process
    none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, two words each
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
