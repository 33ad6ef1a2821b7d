"""Discrete latents in plates within a row, which are summed over element by element.

The referee is the sum over all joint combinations of NumPyro's own log densities.
"""

import itertools
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.scipy.special import logsumexp
from numpyro import handlers
from numpyro.infer import SVI, TraceEnum_ELBO
from numpyro.infer.util import log_density

from numpyro_vae import AutoAmortizedNormal, Posterior

KEY = jax.random.key(0)
ENUMERATE = {"enumerate": "parallel"}
ROWS, PARTS, WORDS = 3, 2, 2
LOCS = jnp.array([-1.0, 0.5, 2.0])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WORDS)).astype(np.float32)
Y = RNG.normal(size=(ROWS, PARTS, WORDS)).astype(np.float32)
Z = RNG.normal(size=(ROWS, 1)).astype(np.float32)
PRESENT = np.array([[True, True], [True, False], [False, False]])


def choose(name, logits):
    return numpyro.sample(name, dist.Categorical(logits=logits), infer=ENUMERATE)


def words(x, z=None):
    """One site of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)


def of_rows_too(x, z=None):
    """A site of the row, which those of its elements depend on, and a latent of each element."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        numpyro.sample("seen", dist.Normal(d + z, 1.0), obs=x[:, :1])
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[d])
            u = numpyro.sample("u", dist.Normal(LOCS[w] * z, 1.0), obs=None if z is None else 2 * x)
            numpyro.sample("x", dist.Normal(u + d, 0.5), obs=x)


def several(x, z=None):
    """Two sites of an element, with supports of 3 and 2 values, in a plate around the rows'."""
    with numpyro.plate("row", len(x), dim=-1):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=None if z is None else z[:, 0])
        with numpyro.plate("word", x.shape[1], dim=-2):
            w = choose("w", jnp.array([0.0, 0.5, 1.0]))
            logits = jnp.array([0.3, -0.4, 1.0])[w] + z
            b = numpyro.sample("b", dist.Bernoulli(logits=logits), infer=ENUMERATE)
            numpyro.sample("x", dist.Normal(LOCS[w] - b, 1.0), obs=x.T)


def nested(y, z=None):
    """Sites of a row, of its parts and of their words."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            with numpyro.plate("word", WORDS, dim=-1):
                w = choose("w", jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])[a])
                numpyro.sample("y", dist.Normal(LOCS[w] + d + z, 1.0), obs=y)


def side_by_side(y, z=None):
    """Sites in two plates of a row, and another one in both of them."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        d = choose("d", jnp.array([0.3, 0.0]))
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([[0.0, 1.0], [1.0, 0.0]])[d])
            numpyro.sample("of part", dist.Normal(a + z, 1.0), obs=y[:, :, :1])
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([[0.0, 0.3, 1.0], [1.0, 0.0, 0.5]])[d])
            numpyro.sample("of word", dist.Normal(LOCS[b] + d, 1.0), obs=y[:, :1])
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b], 1.0), obs=y)


def crossed(y, z=None):
    """Elements of two plates that come together in a site: all combinations count."""
    with numpyro.plate("row", len(y), dim=-3):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("part", PARTS, dim=-2):
            a = choose("a", jnp.array([0.0, 1.0]))
        with numpyro.plate("word", WORDS, dim=-1):
            b = choose("b", jnp.array([0.0, 0.3, 1.0]))
            with numpyro.plate("part", PARTS, dim=-2):
                numpyro.sample("y", dist.Normal(LOCS[b] * a + z, 1.0), obs=y)


def counted(x, z=None):
    """A site outside the plate reads the values of all of its elements."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)
        numpyro.sample("total", dist.Normal(w.sum(-1, keepdims=True), 1.0), obs=x[:, :1])


def chained(x, z=None):
    """An element reads the value of the one before, which its plate denies."""
    with numpyro.plate("row", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
        with numpyro.plate("word", x.shape[1], dim=-1):
            w = choose("w", z[..., None] * LOCS)
            before = jnp.pad(w, ((0, 0), (1, 0)))[:, :-1]
            numpyro.sample("x", dist.Normal(LOCS[w] - before, 1.0), obs=x)


MODELS = {
    words: X,
    of_rows_too: X,
    several: X,
    nested: Y,
    side_by_side: Y,
    crossed: Y,
    counted: X,
    chained: X,
}


def all_combinations(trace):
    """Return every combination of values of the enumerated sites of a row, by site."""
    sites = [site for site in trace.values() if site["type"] == "sample"]
    sites = [site for site in sites if site["infer"].get("enumerate")]
    supports = [np.asarray(site["fn"].enumerate_support(expand=False)).ravel() for site in sites]
    sizes = [site["value"].size for site in sites]
    entries = [s for support, size in zip(supports, sizes, strict=True) for s in [support] * size]
    parts = np.split(np.array(list(itertools.product(*entries))), np.cumsum(sizes)[:-1], axis=1)
    return {
        site["name"]: part.reshape(len(part), *site["value"].shape)
        for site, part in zip(sites, parts, strict=True)
    }


def joint_densities(model, data, given=None):
    """Return the log densities of rows with all joint combinations, and these by site."""
    rows = [tuple(x[row : row + 1] for x in data) for row in range(len(data[0]))]
    combinations = all_combinations(handlers.trace(handlers.seed(model, KEY)).get_trace(*rows[0]))

    @jax.jit
    def of_row(row, given):
        return jax.vmap(lambda values: log_density(model, row, {}, values | given)[0])(combinations)

    given = given or {}
    by_row = [{name: x[row : row + 1] for name, x in given.items()} for row in range(len(rows))]
    return np.stack([of_row(*pair) for pair in zip(rows, by_row, strict=True)]), combinations


def codes(values):
    """Return a number for each combination, of arrays with the entries of a row at the end."""
    flat = np.concatenate(values, axis=-1)
    return (flat * 3 ** np.arange(flat.shape[-1])).sum(-1)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_they_are_as_if_all_joint_combinations_were_summed_over(model):
    data = (MODELS[model], Z.reshape(-1, *[1] * (MODELS[model].ndim - 1)))
    joint, combinations = joint_densities(model, data)
    posterior = Posterior(AutoAmortizedNormal(model, plate="row"), {})
    found = posterior.log_evidence(KEY, data, 1, num_particles=1)[0]
    np.testing.assert_allclose(found, logsumexp(joint, axis=1), rtol=1e-5)

    weights = np.exp(joint - logsumexp(joint, axis=1)[:, None])
    found = posterior.probabilities(KEY, data, 1, num_particles=1)
    for name, values in combinations.items():
        values = values.reshape(len(values), *found[name].shape[1:-1])
        chosen = values[..., None] == np.arange(found[name].shape[-1])
        np.testing.assert_allclose(found[name], np.tensordot(weights, chosen, 1), atol=1e-5)

    num_samples = 4000
    draws = posterior.sample(KEY, data, num_samples)
    rows = [np.moveaxis(draws[x], -1 if model is several else 1, 1) for x in combinations]
    drawn = codes([x.reshape(num_samples, ROWS, -1) for x in rows])
    known = codes([x.reshape(len(x), -1) for x in combinations.values()])
    frequencies = (drawn[..., None] == known).mean(0)
    np.testing.assert_allclose(frequencies.sum(1), 1, atol=1e-6)
    error = np.sqrt(weights * (1 - weights) / num_samples)
    assert (np.abs(frequencies - weights) < 5 * error + 5 / num_samples).all()


def modified(x, present, masks="", scale=1.0, scales=""):
    with numpyro.plate("row", len(x), dim=-2), ExitStack() as around:
        if scales == "row":
            around.enter_context(handlers.scale(scale=scale))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        if scales == "word":
            around.enter_context(handlers.scale(scale=scale))
        with numpyro.plate("word", x.shape[1], dim=-1):
            with handlers.mask(mask=present if "w" in masks else True):
                w = choose("w", z[..., None] * LOCS)
            with handlers.mask(mask=present if "x" in masks else True):
                numpyro.sample("x", dist.Normal(LOCS[w], 1.0), obs=x)


def of_words(z, counts):
    """Return the log-density of each row's words given ``(draws, rows, 1)``, from the equation."""
    seen = jnp.where(counts[..., None], dist.Normal(LOCS, 1.0).log_prob(X[..., None]), 0.0)
    return logsumexp(jax.nn.log_softmax(z[..., None] * LOCS) + seen, axis=-1).sum(-1)


@pytest.mark.parametrize(
    "options",
    [{"masks": "wx"}, {"masks": "w"}, {"scale": 0.5, "scales": "word"}],
    ids=["padding", "masked prior", "scaled words"],
)
def test_masks_and_scales_count_as_in_the_elbo_of_numpyro(options):
    data, num_samples = (X, PRESENT), 2000
    guide = AutoAmortizedNormal(modified, plate="row")
    svi = SVI(modified, guide, optax.sgd(0.0), TraceEnum_ELBO(num_particles=num_samples), **options)
    state = svi.init(KEY, *data)
    posterior = Posterior(guide, svi.get_params(state), static_kwargs=options)
    weights = posterior.log_weights(KEY, data, num_samples)
    error = np.sqrt(2 * weights.var(0).sum() / num_samples)
    np.testing.assert_allclose(weights.mean(0).sum(), -svi.evaluate(state, *data), atol=5 * error)

    z = posterior.sample(KEY, data, num_samples, var_names=["z"])["z"]
    loc, scale = posterior.encode(data)["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(loc, scale).log_prob(z)
    counts = PRESENT if "x" in options.get("masks", "") else np.ones_like(PRESENT)
    expected = expected[..., 0] + options.get("scale", 1.0) * of_words(z, counts)
    np.testing.assert_allclose(weights, expected, atol=1e-4)


TOPICS, VOCABULARY = 4, 12
WORD_LOGITS = jnp.array(RNG.normal(0.0, 1.5, size=(TOPICS, VOCABULARY)), jnp.float32)
DOCUMENTS = RNG.integers(0, VOCABULARY, size=(4, 50))


def documents(tokens):
    """Latent Dirichlet allocation, with the topic of every word: 4 ** 50 combinations."""
    with numpyro.plate("document", len(tokens), dim=-2):
        topics = numpyro.sample("topics", dist.Dirichlet(jnp.ones(TOPICS)))
        with numpyro.plate("word", tokens.shape[1], dim=-1):
            topic = numpyro.sample("topic", dist.Categorical(topics), infer=ENUMERATE)
            numpyro.sample("tokens", dist.Categorical(logits=WORD_LOGITS[topic]), obs=tokens)
        numpyro.deterministic("share", (topic == 0).mean(-1, keepdims=True))


@pytest.fixture(scope="module")
def lda():
    guide = AutoAmortizedNormal(documents, plate="document")
    svi = SVI(documents, guide, optax.adam(1e-2), TraceEnum_ELBO())
    return Posterior(guide, svi.run(KEY, 3, DOCUMENTS, progress_bar=False))


def of_topics(topics, rows=slice(None)):
    """Return the log-probability of each word's topic and token, ``(draws, documents, 50, 4)``."""
    log_p = jax.nn.log_softmax(WORD_LOGITS)[:, DOCUMENTS[rows]]
    return np.moveaxis(log_p, 0, -1) + np.log(topics)


def test_the_topics_of_fifty_words_are_summed_over(lda):
    num_samples = 500
    draws = lda.sample(KEY, DOCUMENTS, num_samples)
    joint = of_topics(draws["topics"])
    given = dist.Dirichlet(jnp.ones(TOPICS)).log_prob(draws["topics"])[..., 0]
    log_p = given + logsumexp(joint, axis=-1).sum(-1)
    # The guide's density is that of a Normal, mapped to the simplex.
    to_simplex = dist.biject_to(dist.constraints.simplex)
    unconstrained = to_simplex.inv(draws["topics"])
    log_det = to_simplex.log_abs_det_jacobian(unconstrained, draws["topics"])
    q = dist.Normal(*lda.encode(DOCUMENTS)["topics"]).to_event(1)
    expected = log_p + (log_det - q.log_prob(unconstrained))[..., 0]
    found = lda.log_weights(KEY, DOCUMENTS, num_samples)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-3)

    exact = jax.nn.softmax(joint)
    taken = draws["topic"][..., None] == np.arange(TOPICS)
    error = np.sqrt((exact * (1 - exact)).sum(0)) / num_samples
    assert (np.abs((taken - exact).mean(0)) < 5 * error + 5 / num_samples).all()


def test_what_is_made_of_draws_of_many_elements(lda):
    probabilities = lda.probabilities(KEY, DOCUMENTS, 1, num_particles=4000)["topic"]
    tree = lda.to_datatree(KEY, DOCUMENTS, 50)
    assert tree.posterior["topic"].shape == (1, 50, 4, 50)
    assert tree.posterior_predictive["tokens"].shape == (1, 50, 4, 50)
    share = (tree.posterior["topic"].values == 0).mean(-1)
    np.testing.assert_allclose(tree.posterior["share"].values[..., 0], share, rtol=1e-6)
    predicted = lda.predict(KEY, DOCUMENTS, 50)["tokens"]
    np.testing.assert_array_equal(tree.posterior_predictive["tokens"][0], predicted)

    rows, num_samples = [1, 3], 1000
    repaired = lda.repair(KEY, DOCUMENTS, rows, num_samples=num_samples).groups["posterior"]
    exact = jax.nn.softmax(of_topics(repaired["topics"], rows))
    taken = repaired["topic"].reshape(num_samples, 2, 50, 1) == np.arange(TOPICS)
    error = np.sqrt((exact * (1 - exact)).sum(0)) / num_samples
    assert (np.abs((taken - exact).mean(0)) < 5 * error + 5 / num_samples).all()
    assert np.abs(exact.mean(0) - probabilities[rows]).mean() < 0.03


NINE = RNG.normal(0.0, 2.0, size=(4, 9)).astype(np.float32)
LOGITS = jnp.array([0.0, 0.5, 1.0])


def clusters(x):
    with numpyro.plate("row", len(x), dim=-2), numpyro.plate("word", x.shape[1], dim=-1):
        w = numpyro.sample("w", dist.Categorical(logits=LOGITS))
        u = numpyro.sample("u", dist.Normal(LOCS[w], 1.0))
        numpyro.sample("x", dist.Normal(u, 0.5), obs=x)


def by_hand(x):
    with numpyro.plate("row", len(x), dim=-2), numpyro.plate("word", x.shape[1], dim=-1):
        w = numpyro.sample("w", dist.Categorical(logits=0.5 * x[..., None] * LOCS))
        numpyro.sample("u", dist.StudentT(9.0, 0.3 * LOCS[w] + 0.7 * x, 0.6))


def test_a_guide_that_draws_them_in_nine_elements_has_weights():
    posterior = Posterior(by_hand, {}, model=clusters, plate="row")
    u = posterior.sample(KEY, NINE, 5, var_names=["u"])["u"][..., None]
    x = NINE[..., None]
    log_p = jax.nn.log_softmax(LOGITS) + dist.Normal(LOCS, 1.0).log_prob(u)
    log_q = jax.nn.log_softmax(0.5 * x * LOCS)
    log_q += dist.StudentT(9.0, 0.3 * LOCS + 0.7 * x, 0.6).log_prob(u)
    by_element = logsumexp(log_p, axis=-1) - logsumexp(log_q, axis=-1)
    expected = (by_element + dist.Normal(u, 0.5).log_prob(x)[..., 0]).sum(-1)
    found = posterior.log_weights(KEY, NINE, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_many_values_that_count_together_are_refused_and_it_is_said_why():
    data = (np.zeros((2, 9), np.float32),)
    posterior = Posterior(AutoAmortizedNormal(counted, plate="row"), {})
    with pytest.raises(ValueError, match=r"19683 combinations.*'total' depends on .*'w'.*all elem"):
        posterior.probabilities(KEY, (*data, np.zeros((2, 1), np.float32)), 1)
