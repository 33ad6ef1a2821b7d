"""How the functions of a posterior are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_vae.inference.compiled import LEVEL, Compiled, options


@pytest.fixture
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_cpu_programs_are_compiled_at_the_level_that_compiles_fast_and_runs_as_fast(no_flags):
    assert options() == {LEVEL: 2}


def test_the_level_of_the_environment_is_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{LEVEL}=0")
    assert options() is None


def test_other_devices_are_left_to_xla(no_flags, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert options() is None


def test_a_function_with_a_level_of_its_own_runs_and_tells_its_program(no_flags):
    compiled = Compiled(lambda x, unused: jnp.exp(x))
    x = np.linspace(0, 1, 5, dtype=np.float32)
    np.testing.assert_allclose(compiled(x, x), np.exp(x), rtol=1e-6)
    text, used = compiled.program(x, x)
    assert "exp" in text
    assert used == (True, False)
    assert compiled.shapes(x, x).shape == (5,)
