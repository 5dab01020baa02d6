"""A command that runs again finds what it compiled, and never touches a folder that it was not given."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from ssl_jax import compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
compilation_cache.enable()
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(16))))
"""


def run(**environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_C", "JAX_E", "XDG_"))}
    subprocess.run([sys.executable, "-c", PROGRAM], env={**inherited, **environment}, check=True)


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_programs_are_kept_in_the_users_cache_folder(tmp_path, variable):
    run(**{variable: str(tmp_path)})
    folder = (tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / ".cache") / "ssl_jax" / "compiled"
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}
    assert kept
    run(**{variable: str(tmp_path)})
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")} == kept


def test_a_folder_that_jax_was_told_of_stands(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path / "ours"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert list((tmp_path / "theirs").iterdir()) and not (tmp_path / "ours").exists()


def test_the_cache_can_be_switched_off(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="0")
    assert not list(tmp_path.rglob("*-cache"))


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    run(XDG_CACHE_HOME=str(tmp_path / "file"))
