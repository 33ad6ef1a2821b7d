"""What the library takes for granted of NumPyro, and NumPyro does not promise."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.hmc import hmc
from numpyro.primitives import Messenger

from numpyro_vae import numpyro_internals as internals
from numpyro_vae.objectives import ImportanceWeightedELBO, ReweightedWakeSleep

X = jnp.linspace(-1.0, 1.0, 8)
KEY = jax.random.key(3)


def model(x):
    scale = numpyro.param("scale", 1.5, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, scale))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = numpyro.param("loc", jnp.zeros(()))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, 1.0))


def test_the_mask_of_a_masked_distribution():
    mask = jnp.arange(8) < 5
    np.testing.assert_array_equal(internals.mask_of_masked(dist.Normal(X, 1.0).mask(mask)), mask)
    assert internals.mask_of_masked(dist.MaskedDistribution(dist.Normal(X, 1.0), True)) is True


def test_values_outside_a_support_have_no_density_unless_they_are_not_looked_at():
    for plain, value in ((dist.Bernoulli(0.3), 0.5), (dist.Exponential(jnp.ones(2)), -1.0)):
        for fn in (plain, plain.expand([3, 2]), plain.expand([3, 2]).to_event(1), plain.mask(True)):
            name, support = internals.checked_support(fn)
            assert name == type(plain).__name__
            assert not support(value * jnp.ones(fn.batch_shape + fn.event_shape)).any()
            outside = jax.jit(fn.log_prob)(value * jnp.ones(fn.batch_shape + fn.event_shape))
            assert (outside == -jnp.inf).all()
    trusting = dist.Bernoulli(0.3, validate_args=False).expand([3]).to_event(1)
    assert internals.checked_support(trusting) is None
    assert jnp.isfinite(jax.jit(trusting.log_prob)(0.5 * jnp.ones(3)))


def test_a_declared_plate_is_numpyros():
    """The same draw of its rows from the same seed, and the same effect of handlers."""
    with handlers.seed(rng_seed=0), numpyro.plate("data", 100, subsample_size=5) as expected:
        pass
    with handlers.seed(rng_seed=0):
        size, indices, is_given = internals.declare_plate("data", 100, 5)
    np.testing.assert_array_equal(indices, expected)
    assert (size, is_given) == (100, True)
    size, indices, is_given = internals.declare_plate("data", 4, 4)
    np.testing.assert_array_equal(indices, jnp.arange(4))
    assert (size, is_given) == (4, False)
    with handlers.substitute(data={"data": jnp.array([2, 0, 1, 3])}):
        size, indices, is_given = internals.declare_plate("data", 4, 4)
    np.testing.assert_array_equal(indices, [2, 0, 1, 3])
    assert is_given


def test_the_size_of_a_declared_plate_is_what_handlers_make_of_it():
    class Resize(numpyro.primitives.Messenger):
        def process_message(self, msg):
            msg["args"] = (50, msg["args"][1])

    with Resize():
        size, _, is_given = internals.declare_plate("data", 4, 4)
    assert (size, is_given) == (50, False)


def test_plate_indices():
    np.testing.assert_array_equal(internals.plate_indices(numpyro.plate("data", 3)), [0, 1, 2])


def test_a_site_knows_that_it_was_observed():
    seeded = handlers.seed(model, 0)
    for fn in (seeded, handlers.uncondition(seeded)):
        trace = handlers.trace(fn).get_trace(X)
        assert internals.was_observed(trace["x"])
        assert not internals.was_observed(trace["z"])


def test_an_improper_prior_is_drawn_from():
    def improper():
        prior = dist.ImproperUniform(constraints.positive, (), (3,))
        return numpyro.sample("a", dist.Independent(prior.expand([2]), 1))

    draw = handlers.substitute(improper, substitute_fn=internals.draw_improper)
    with pytest.raises(NotImplementedError):
        handlers.seed(improper, 0)()
    assert internals.is_improper(
        dist.Independent(dist.ImproperUniform(constraints.real, (2,), ()), 1)
    )
    values = handlers.seed(draw, 0)()
    assert values.shape == (2, 3)
    assert (values > 0).all()


def test_predictive_runs_a_guide_under_a_mask():
    seen = []

    def watched(x):
        seen.append(internals.is_training())
        guide(x)

    svi = SVI(model, watched, optax.adam(1e-2), Trace_ELBO())
    state = svi.init(KEY, X)
    svi.update(state, X)
    assert all(seen)
    seen.clear()
    Predictive(watched, params=svi.get_params(state), num_samples=2)(KEY, X)
    assert seen
    assert not any(seen)


def test_an_automatic_guide_is_set_up_by_its_first_call():
    auto = AutoNormal(model)
    assert not internals.is_set_up(auto)
    internals.set_up(auto, {}, (X,), {})
    assert internals.is_set_up(auto)
    params = {"z_auto_loc": X, "z_auto_scale": jnp.ones(8)}
    assert auto.sample_posterior(KEY, params)["z"].shape == (8,)


def test_an_svi_keeps_the_transforms_of_its_parameters():
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    assert internals.param_transforms(svi) is None
    state = svi.init(KEY, X)
    transforms = internals.param_transforms(svi)
    assert transforms is not None
    assert set(transforms) == {"scale", "loc"}
    copied = internals.with_param_transforms(
        SVI(model, guide, optax.adam(1e-2), Trace_ELBO()), transforms
    )
    assert copied.get_params(state)["scale"] == pytest.approx(1.5)
    assert isinstance(jax.tree.leaves(transforms), list)  # a pytree, to go through jit


def test_the_key_that_init_gives_the_model():
    def random_param(x):
        numpyro.param("a", lambda key: jax.random.normal(key))

    svi = SVI(random_param, lambda x: None, optax.adam(1e-2), Trace_ELBO())
    found = svi.get_params(svi.init(KEY, X))["a"]
    seeded = handlers.seed(random_param, internals.init_model_key(KEY))
    assert handlers.trace(seeded).get_trace(X)["a"]["value"] == found


@pytest.mark.parametrize(
    ("loss", "enumerates", "weights"),
    [
        (Trace_ELBO(), False, True),
        (TraceMeanField_ELBO(), False, True),
        (RenyiELBO(num_particles=2), False, True),
        (TraceGraph_ELBO(), False, False),
        (TraceEnum_ELBO(), True, False),
        (ReweightedWakeSleep(2), False, True),
    ],
)
def test_which_objectives_enumerate(loss, enumerates, weights):
    assert internals.enumerates(loss) == enumerates
    assert internals.takes_row_weights(loss) == weights


def stateful(x):
    norm = nnx_module("norm", nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z + norm(x[:, None])[:, 0], 1.0), obs=x)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        ImportanceWeightedELBO(3),
    ],
)
def test_which_objectives_return_mutable_state(loss):
    svi = SVI(stateful, guide, optax.adam(1e-2), loss)
    state = svi.init(KEY, X)
    held = state.mutable_state
    assert held is not None
    if internals.returns_mutable_state(loss):
        assert svi.update(state, X)[0].mutable_state.keys() == held.keys()
        return
    svi.model = internals.with_hidden_state(stateful, held)
    updated, value = svi.update(state._replace(mutable_state=None), X)
    assert jnp.isfinite(value)
    assert updated.mutable_state is None


def test_plates_that_choose_their_rows_by_a_key_of_their_own():
    def subsampled():
        with numpyro.plate("data", 100, subsample_size=5) as rows:
            return rows, numpyro.sample("z", dist.Normal(0.0, 1.0))

    (one, first), (two, second) = (
        handlers.seed(internals.seed_plates(subsampled, KEY), seed)() for seed in range(2)
    )
    np.testing.assert_array_equal(one, two)
    assert (first != second).all()


def test_traces_that_do_not_belong_together():
    traces = [handlers.trace(handlers.seed(fn, KEY)).get_trace(X) for fn in (model, guide)]
    internals.check_traces(*traces)
    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        internals.check_traces(traces[0], {})


def test_traces_in_another_order():
    def two(names):
        for name in names:
            numpyro.sample(name, dist.Normal(0.0, 1.0))

    one, other = (
        handlers.trace(handlers.seed(two, KEY)).get_trace(names) for names in ("ab", "ba")
    )
    internals.check_mean_field(one, one)
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        internals.check_mean_field(one, other)


def test_what_a_function_depends_on():
    shapes = {
        "x": jax.ShapeDtypeStruct((2,), jnp.float32),
        "y": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    found = internals.dependencies(lambda x, y: {"both": x + y, "none": X, "x": 2 * x}, shapes)
    assert found == {"both": {"x", "y"}, "none": frozenset(), "x": {"x"}}


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), Trace_ELBO(num_particles=3), TraceMeanField_ELBO(num_particles=2)],
)
def test_the_keys_of_the_particles_of_a_step(loss):
    """With them the loss of a step is put together by hand."""
    svi = SVI(model, guide, optax.adam(1e-2), loss)
    state = svi.init(KEY, X)
    params, found = svi.get_params(state), []
    for model_key, guide_key in internals.particle_keys(state.rng_key, loss.num_particles):
        seeded = handlers.substitute(handlers.seed(guide, guide_key), params)
        z = handlers.trace(seeded).get_trace(X)["z"]
        replayed = handlers.substitute(handlers.seed(model, model_key), {**params, "z": z["value"]})
        trace = handlers.trace(replayed).get_trace(X)
        log_p = trace["x"]["fn"].log_prob(X)
        if isinstance(loss, TraceMeanField_ELBO):
            ratio = -dist.kl_divergence(z["fn"], trace["z"]["fn"])
        else:
            ratio = trace["z"]["fn"].log_prob(z["value"]) - z["fn"].log_prob(z["value"])
        found.append((log_p + ratio).sum())
    np.testing.assert_allclose(svi.update(state, X)[1], -np.mean(found), rtol=1e-5)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_sites_of_an_elbo_are_added_up_by_name(num_particles):
    """NumPyro adds them in the order of a set of names, which is another one in each process."""

    def three(x):
        sites = [numpyro.sample(name, dist.Normal(0.1, 1.0 / 3)) for name in "cab"]
        numpyro.sample("x", dist.Normal(sum(sites), 0.7), obs=x)

    def guide(x):
        for name in "cab":
            numpyro.sample(name, dist.Normal(0.3, 0.9))

    loss = Trace_ELBO(num_particles=num_particles)
    ordered = internals.in_order(loss)
    assert internals.returns_mutable_state(ordered) == (num_particles == 1)
    by_site = Trace_ELBO(num_particles=num_particles, sum_sites=False).loss(
        KEY, {}, three, guide, X
    )
    expected = sum(by_site[name] for name in ("a", "b", "c", "x"))
    assert ordered.loss(KEY, {}, three, guide, X) == expected
    np.testing.assert_allclose(loss.loss(KEY, {}, three, guide, X), expected, rtol=1e-6)
    for other in (TraceMeanField_ELBO(), Trace_ELBO(sum_sites=False), RenyiELBO()):
        assert internals.in_order(other) is other


def test_past_its_warmup_a_chain_does_not_adapt():
    init, step = hmc(potential_fn=lambda z: (z**2).sum() / 2, algo="NUTS")
    started = init(jnp.zeros(2), 50, rng_key=KEY)
    ended = internals.end_adaptation(started, 50, jnp.array(False))
    going = internals.end_adaptation(started, 50, jnp.array(True))
    for state, adapts in ((ended, False), (going, True)):
        moved = step(step(state))
        changed = moved.adapt_state.step_size != state.adapt_state.step_size
        assert bool(changed) == adapts


def test_handlers_are_shared_by_threads():
    """Why `HANDLERS` is held where a model runs; if they are no more, the lock can go."""
    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        other = threading.Thread(target=partial(numpyro.sample, "x", dist.Normal(0.0, 1.0)))
        other.start()
        other.join()
    assert "x" in trace


def test_a_message_of_our_own_reaches_handlers_and_no_trace():
    """A handler answers it, from around a trace too, and traces do not record it."""

    class Answer(Messenger):
        def process_message(self, msg):
            if msg["type"] == "ours":
                msg["value"] = msg["question"] + 1

    def asks(question):
        numpyro.deterministic("found", internals.ask_handlers("ours", question=question) or 0)

    trace = handlers.trace(handlers.seed(Answer(asks), 0)).get_trace(1)
    assert list(trace) == ["found"]
    assert trace["found"]["value"] == 2
    with handlers.block(), handlers.trace() as trace:
        assert internals.ask_handlers("ours", question=1) is None
    assert not trace


def test_a_scale_and_a_switch_are_what_the_model_says():
    """The factor of a subsampling plate is no part of the scale; False is not an array of False."""

    def model():
        with handlers.scale(scale=3.0), numpyro.plate("data", 10, subsample_size=5):
            numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            with handlers.scale(scale=2.0):
                numpyro.sample("w", dist.Normal(0.0, 1.0).mask(jnp.zeros(5, bool)))
        numpyro.sample("v", dist.Normal(0.0, 1.0))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert [internals.declared_scale(trace[name]) for name in "zwv"] == [3.0, 6.0, None]
    assert trace["z"]["scale"] == 6.0
    assert [internals.is_switched_off(trace[name]["fn"]) for name in "zwv"] == [True, False, False]


def test_a_message_sent_outwards_passes_by_the_handlers_within():
    """Those around see it, with the handlers that it is sent within; then all is as before."""
    msg = {"type": "of_ours", "name": "ours", "fn": dict, "args": (), "kwargs": {}, "value": None}
    outer, inner, within = (_Names() for _ in range(3))
    handler = internals.outwards()
    with outer, handler, inner:
        handler.send(msg, within)
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=0.0)
        with pytest.raises(ZeroDivisionError):
            handler.send({**msg, "fn": lambda: 1 / 0, "value": None})
    assert outer.names == ["ours", "x", "ours"]
    assert within.names == ["ours"]
    assert inner.names == ["x"]


class _Names(Messenger):
    def __init__(self):
        self.names = []
        super().__init__(None)

    def process_message(self, msg):
        self.names.append(msg["name"])
