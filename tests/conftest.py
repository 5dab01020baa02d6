"""What every test runs under: one CPU device, no silent broadcasting, no network."""

import os

# A GPU or TPU test run names its platform; before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = os.environ.get("SSL_JAX_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
