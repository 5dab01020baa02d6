"""What every test runs under: one CPU device, no silent broadcasting, no network."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

# A GPU or TPU test run names its platform; before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = os.environ.get("SSL_JAX_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# What one test has compiled others find, in all processes of this run and in those that they start; not the user's own.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssl_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# A machine that is busy with something else is no defect of what is tested. Before a change is merged the examples are
# always the same ones, so that a failure is of the change; whoever develops gets others every time.
hypothesis.settings.register_profile("ssl_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("ssl_jax")


@pytest.fixture(scope="module")
def compiled_fast() -> Iterator[None]:
    """Processes that a test starts compile in half the time, to slower programs: where their results are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
        yield
