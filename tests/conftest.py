"""What every test runs under: one CPU device, no silent broadcasting, no network."""

import atexit
import os
import shutil
import tempfile

# A GPU or TPU test run names its platform; before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = os.environ.get("SSL_JAX_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Not the user's own: what commands keep of what they compile.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ssl_jax_compiled_")

import hypothesis
import jax

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

jax.config.update("jax_numpy_rank_promotion", "raise")

# A machine that is busy with something else is no defect of what is tested. Before a change is merged the examples are
# always the same ones, so that a failure is of the change; whoever develops gets others every time.
hypothesis.settings.register_profile("ssl_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("ssl_jax")
