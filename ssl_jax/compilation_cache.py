"""Compiled programs kept on disk, so that a command that runs again begins at once."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from ssl_jax import files

_MAX_BYTES = 4 * 2**30


def enable() -> None:
    """Has JAX keep what takes it more than a second to compile, at most 4 GiB, in the user's cache folder.

    That is `$XDG_CACHE_HOME/ssl_jax/compiled`, by default below `~/.cache`. Another folder that JAX was told of
    (`JAX_COMPILATION_CACHE_DIR`) stands, `JAX_ENABLE_COMPILATION_CACHE=0` switches the cache off, and where the folder
    is somebody else's or cannot be written there is none. Must be called before anything is compiled.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_jax" / "compiled"
    try:
        files.make_private(folder)  # what is in it is executed
    except (OSError, RuntimeError):  # no permission, or no home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
