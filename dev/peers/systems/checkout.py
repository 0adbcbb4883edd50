"""The version of a system that is used from a git checkout."""

import importlib
import os
import subprocess


def commit(module):
    """Returns the commit of the checkout that holds a module, or "unknown"."""
    folder = os.path.dirname(importlib.import_module(module).__file__)
    result = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"
