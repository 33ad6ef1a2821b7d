"""Data sets with latents in a plate: features of their own, padding, order, the exact posterior."""

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
from numpyro.distributions import kl_divergence
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    NestedSetEncoder,
    Posterior,
    data_sets,
    fit,
)
from numpyro_vae.data.nested import Nested
from numpyro_vae.inference.divergences import row_divergences

GROUPS = np.array([4, 2, 3])
ROWS = np.array([[6, 1, 2, 3], [5, 4, 0, 0], [2, 2, 6, 6]])
SIZES = {"group": GROUPS, "row": ROWS}


def groups(y, x):
    """Rows in groups; ``y`` is ``(groups, rows)``."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", y.shape[0], dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu + x[:, None], 0.5))
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.2))
        with numpyro.plate("row", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(theta, width), obs=y)
    numpyro.sample("tau", dist.HalfNormal(jnp.exp(mu)))  # after the plate


def inwards(y, x):
    """The same with the dims that NumPyro chooses; ``y`` is ``(rows, groups)``."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", y.shape[1]):
        theta = numpyro.sample("theta", dist.Normal(mu + x, 0.5))
        width = numpyro.sample("width", dist.LogNormal(0.0, 0.2))
        with numpyro.plate("row", y.shape[0]):
            numpyro.sample("y", dist.Normal(theta, width), obs=y)
    numpyro.sample("tau", dist.HalfNormal(jnp.exp(mu)))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return {
        "y": rng.normal(size=(3, 4, 6)).astype(np.float32),
        "x": rng.normal(size=(3, 4)).astype(np.float32),
    }


def turned(data):
    return data | {"y": data["y"].swapaxes(1, 2)}


def latents_of(model, **kwargs):
    with handlers.seed(rng_seed=1), handlers.trace() as trace:
        model(**kwargs)
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    return {name: site["value"] for name, site in sites.items() if not site["is_observed"]}


@pytest.mark.slow
@pytest.mark.parametrize("model", [groups, inwards])
def test_padding_of_groups_and_of_rows_has_no_density(model, data):
    data = data if model is groups else turned(data)
    values = latents_of(data_sets(model), **data)
    found, _ = log_density(data_sets(model), (), {**data, "sizes": SIZES}, values)
    expected = 0.0
    for i, count in enumerate(GROUPS):
        y = data["y"][i] if model is groups else data["y"][i].T
        theta, width = (values[name][i].reshape(-1)[:count] for name in ("theta", "width"))
        expected += dist.Normal().log_prob(values["mu"][i])
        expected += dist.HalfNormal(jnp.exp(values["mu"][i])).log_prob(values["tau"][i])
        expected += dist.Normal(values["mu"][i] + data["x"][i, :count], 0.5).log_prob(theta).sum()
        expected += dist.LogNormal(0.0, 0.2).log_prob(width).sum()
        for j in range(count):
            expected += dist.Normal(theta[j], width[j]).log_prob(y[j, : ROWS[i, j]]).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("model", [groups, inwards])
def test_the_encoder_reads_rows_of_groups(model, data):
    sets = data_sets(model)
    inputs = sets.inputs(**(data if model is groups else turned(data)), sizes=SIZES)
    assert inputs.names == ("data_sets", "group", None)
    whole, group, row = inputs.levels
    assert whole.shape == (3, 0)
    np.testing.assert_array_equal(group.values[..., 0], data["x"])
    np.testing.assert_array_equal(group.mask.sum(-1), GROUPS)
    np.testing.assert_array_equal(row.values[..., 0], data["y"])
    there = np.arange(4) < GROUPS[:, None]
    np.testing.assert_array_equal(row.mask.sum(-1), ROWS * there)
    assert isinstance(sets.encoder(inputs, rngs=nnx.Rngs(0)), NestedSetEncoder)


SMALL = partial(NestedSetEncoder, element_sizes=(4,), hidden_sizes=(5,))


def guide_of(maker, data, sets=None):
    """A guide with parameters of which none is where it started, heads neither."""
    sets = data_sets(groups) if sets is None else sets
    svi = SVI(sets, maker(sets, SMALL), optax.sgd(0.0), Trace_ELBO())
    result = fit(svi, jax.random.key(0), data, num_epochs=1, progress_bar=False)
    leaves, treedef = jax.tree.flatten(result.params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return svi.guide, jax.tree.unflatten(treedef, moved)


MAKERS = [AutoAmortizedNormal, AutoAmortizedMultivariateNormal]


@pytest.fixture(scope="module", params=MAKERS)
def trained(request, data):
    return guide_of(request.param, data | {"sizes": SIZES})


def padded(data, fill, more=0):
    """Data with other padding, and more of it."""
    shapes = {"y": (3, 4 + more, 6 + more), "x": (3, 4 + more)}
    new = {name: np.full(shape, fill, np.float32) for name, shape in shapes.items()}
    rows = np.zeros((3, 4 + more), int)
    for i, count in enumerate(GROUPS):
        new["x"][i, :count] = data["x"][i, :count]
        rows[i, :count] = ROWS[i, :count]
        for j in range(count):
            new["y"][i, j, : ROWS[i, j]] = data["y"][i, j, : ROWS[i, j]]
    return new | {"sizes": {"group": GROUPS, "row": rows}}


@partial(jax.jit, static_argnums=0)
def log_q(guide, params, arguments, values):
    encoding = guide.encode(params, **arguments)
    return encoding.log_prob(encoding.pack(values))


@pytest.mark.slow
def test_padding_changes_nothing_however_much_there_is(trained, data):
    values = latents_of(data_sets(groups), **data, sizes=SIZES)
    expected = log_q(*trained, padded(data, 0.0), values)
    np.testing.assert_allclose(log_q(*trained, padded(data, 9.0), values), expected, rtol=1e-4)
    longer = {
        name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=3.0)
        for name, x in values.items()
    }
    found = log_q(*trained, padded(data, 1.0, more=2), longer)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_order_of_groups_and_rows_does_not_matter(trained, data):
    values = latents_of(data_sets(groups), **data)
    whole = {"sizes": {"group": np.full(3, 4), "row": np.full((3, 4), 6)}}
    expected = log_q(*trained, data | whole, values)
    order, rows = np.array([2, 0, 3, 1]), np.array([5, 1, 3, 0, 2, 4])
    moved = {"y": data["y"][:, order][:, :, rows], "x": data["x"][:, order], **whole}
    other = {name: x if x.ndim == 1 else x[:, order] for name, x in values.items()}
    assert np.abs(log_q(*trained, moved, values) - expected).max() > 0.01
    np.testing.assert_allclose(log_q(*trained, moved, other), expected, rtol=1e-4)


@pytest.mark.slow
def test_the_guide_has_the_density_that_it_is_trained_with(trained, data):
    """What `Posterior` computes is what NumPyro computes of the guide's trace."""
    guide, params = trained
    arguments = data | {"sizes": SIZES}
    seeded = handlers.seed(handlers.substitute(guide, data=params), 3)
    with handlers.trace() as trace:
        values = seeded(**arguments)
    sites = [site for site in trace.values() if site["type"] == "sample"]
    total = sum(site["fn"].log_prob(site["value"]).sum() for site in sites)
    encoding = guide.encode(params, **arguments)
    packed = encoding.pack(values)
    expected = (encoding.log_prob(packed) - encoding.constrain(packed)[1]).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_a_group_knows_its_rows_the_others_and_the_values_of_the_whole(trained, data):
    """Each changes the posterior of the first group; a group's own latents are not another's."""
    guide, params = trained
    values = latents_of(data_sets(groups), **data, sizes=SIZES)

    def of_group(values, y=data["y"]):
        """The densities as they change with the latents of the first group."""
        near = values | {"theta": values["theta"].at[:, 0].add(0.7)}
        arguments = data | {"y": y, "sizes": SIZES}
        return log_q(guide, params, arguments, near) - log_q(guide, params, arguments, values)

    before = of_group(values)
    for change in (
        of_group(values, data["y"] + np.eye(1, 4)[0][:, None] * np.float32(0.5)),
        of_group(values, data["y"] + np.eye(1, 4, 1)[0][:, None] * np.float32(0.5)),
        of_group(values | {"mu": values["mu"] + 0.5}),
        of_group(values | {"tau": values["tau"] + 0.5}),
    ):
        assert np.abs(change - before).min() > 1e-4
    other = of_group(values | {"theta": values["theta"].at[:, 1].add(0.5)})
    np.testing.assert_allclose(other, before, atol=1e-4)


@pytest.mark.slow
def test_a_flow_has_latents_of_one_value_in_padded_groups(data):
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        with numpyro.plate("group", y.shape[0], dim=-2):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            with numpyro.plate("row", y.shape[1], dim=-1):
                numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    sets = data_sets(model)
    arguments = {"y": data["y"], "sizes": SIZES}
    guide, params = guide_of(AutoAmortizedFlow, arguments, sets)
    values = latents_of(sets, **arguments)
    other = values | {"theta": values["theta"].at[1, 3].set(7.0)}  # padding
    first, second = (log_q(guide, params, arguments, x) for x in (values, other))
    np.testing.assert_allclose(first, second, rtol=1e-6)


def times(y):
    """Rows that a constant of the code tells apart."""
    with numpyro.plate("time", len(y)):
        level = numpyro.sample("level", dist.Normal(jnp.arange(4.0), 1.0))
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y)


def weights(y):
    """Rows that a vector of latents tells apart."""
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with numpyro.plate("row", 4):
        numpyro.sample("y", dist.Normal(weight, 1.0), obs=y)


@pytest.mark.parametrize("model", [times, weights])
def test_rows_that_are_told_apart_are_no_set(model, data):
    sets = data_sets(model)
    inputs = sets.inputs(data["x"])
    assert isinstance(inputs, tuple)
    assert isinstance(sets.encoder(inputs, rngs=nnx.Rngs(0)), MLP)


def items(y):
    """Abilities of pupils, and difficulties of items, in plates that cross."""
    with numpyro.plate("item", y.shape[1], dim=-1):
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with numpyro.plate("pupil", y.shape[0], dim=-2):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("pupil", y.shape[0], dim=-2), numpyro.plate("item", y.shape[1], dim=-1):
        numpyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=y)


def test_of_plates_that_cross_that_with_sizes_has_elements():
    y = np.zeros((3, 8, 5), np.int32)
    sets = data_sets(items)
    inputs = sets.inputs(y, sizes={"pupil": np.array([8, 3, 5])})
    assert inputs.names == ("data_sets", "pupil")
    assert inputs.levels[1].values.shape == (3, 8, 5)
    assert isinstance(sets.inputs(y), tuple)  # all side by side


def test_plates_of_the_same_length_are_told_apart_or_refused(data):
    y, x = data["y"][:, :, :4], data["x"]
    with pytest.raises(ValueError, match=r"'group', 'row'\] have 4 rows each.*shape \(4,\)"):
        data_sets(groups).inputs(y, x, sizes=SIZES | {"row": np.minimum(ROWS, 4)})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group": GROUPS, "row": ROWS[:, :3]}, "length of each of 3 rows of another plate"),
        ({"group": GROUPS, "row": ROWS + 1}, "gives data set 0 7 rows of plate 'row'"),
        ({"group": GROUPS, "row": ROWS[..., None]}, "one for each row of the plate around"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message, data):
    with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
        data_sets(groups)(**data, sizes=sizes)


def test_dependencies_beside_those_of_plates_are_refused(data):
    sets = data_sets(groups)
    guide = AutoAmortizedNormal(sets, SMALL, dependencies={"tau": ["mu"]})
    with pytest.raises(ValueError, match="Leave out dependencies="):
        handlers.seed(guide, 0)(**data, sizes=SIZES)


def test_an_encoder_of_nested_sets_names_other_inputs():
    with pytest.raises(TypeError, match="NestedSetEncoder reads Nested sets, found ndarray"):
        NestedSetEncoder(np.zeros((3, 4)), rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_far_values_do_not_send_features_far():
    rows = jnp.ones((2, 3, 5, 1)).at[1, 0, 0].set(1e6)
    inputs = Nested((jnp.zeros((2, 0)), jnp.zeros((2, 3, 0)), rows), ("all", "group", None))
    features = SMALL(inputs, standardize=False, rngs=nnx.Rngs(0))(inputs)
    assert 5 < max(jnp.abs(x).max() for x in features.values()) < 100


@pytest.mark.slow
def test_draws_are_those_of_a_saved_posterior(trained, data, tmp_path):
    guide, params = trained
    posterior = Posterior(guide, params)
    sets, arguments = guide.model, data | {"sizes": SIZES}
    posterior.save(tmp_path / "saved")
    again = Posterior.load(tmp_path / "saved", sets, inputs=sets.inputs)
    draws = [x.sample(jax.random.key(0), arguments, 3) for x in (posterior, again)]
    assert draws[0]["theta"].shape == (3, 3, 4, 1)
    for name in draws[0]:
        np.testing.assert_array_equal(draws[0][name], draws[1][name])


@pytest.mark.slow
def test_sizes_that_were_never_seen_are_refused(data, tmp_path):
    """Also after saving; a plate without sizes has the length of its arrays."""
    sets, arguments = data_sets(groups), data | {"sizes": SIZES}
    guide = AutoAmortizedNormal(sets, SMALL)
    svi = SVI(sets, guide, optax.sgd(0.0), Trace_ELBO())
    result = fit(svi, jax.random.key(0), arguments, num_epochs=1, progress_bar=False)
    assert result.sizes == {"group": (2, 4), "row": (1, 6)}  # padding has no rows
    posterior = Posterior(guide, result)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", sets, inputs=sets.inputs)
    more = padded(data, 0.0, more=2)
    assert posterior.sample(jax.random.key(0), more, 1)["theta"].shape == (1, 3, 6, 1)
    more["sizes"] = {"group": np.array([5, 2, 3]), "row": np.ones((3, 6), int)}
    few = arguments | {"sizes": SIZES | {"group": np.array([4, 1, 3])}}
    for found in (posterior, loaded):
        with pytest.raises(ValueError, match=r"5 rows of plate 'group'.* with 2 to 4.*like="):
            found.sample(jax.random.key(0), more, 1)
        with pytest.raises(ValueError, match=r"with 1 rows of plate 'group'"):
            found.check(jax.random.key(0), few, "importance")
    with pytest.raises(ValueError, match=r"with 8 rows of plate 'row'.* with 1 to 6"):
        posterior.encode(padded(data, 0.0, more=2) | {"sizes": {"group": GROUPS}})


@pytest.mark.slow
def test_divergences_of_latents_of_groups_are_numpyros(trained, data):
    """In closed form, or of a draw, of each data set by itself with the model of one."""
    guide, params = trained
    arguments, values = data | {"sizes": SIZES}, latents_of(data_sets(groups), **data)
    encoding = guide.encode(params, **arguments)
    packed = encoding.pack(values)
    with handlers.seed(rng_seed=0), handlers.substitute(data=values), handlers.trace() as trace:
        guide.model(**arguments)
    found = row_divergences(encoding, packed, trace).by_site
    loc, scale = (
        {s.name: x for s, x in encoding.unpack(encoding.marginal(part, packed))}
        for part in (lambda fn: fn.mean, lambda fn: fn.variance**0.5)
    )
    for i, count in enumerate(GROUPS):
        own = {name: value[i] for name, value in values.items()}
        with handlers.seed(rng_seed=0), handlers.substitute(data=own), handlers.trace() as one:
            groups(data["y"][i], data["x"][i])
        q = {name: dist.Normal(loc[name][i], scale[name][i]) for name in own}
        expected = {name: kl_divergence(q[name], one[name]["fn"]) for name in ("mu", "theta")}
        width = jnp.log(own["width"])
        expected["width"] = q["width"].log_prob(width) - dist.Normal(0.0, 0.2).log_prob(width)
        for name, value in expected.items():
            value = (
                jnp.where(jnp.arange(4)[:, None] < count, value, jnp.nan) if value.ndim else value
            )
            np.testing.assert_allclose(found[name][i], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_collapse_counts_the_latents_of_groups(trained, data):
    posterior, key = Posterior(*trained), jax.random.key(0)
    report = posterior.check(key, padded(data, 0.0), "collapse", progress_bar=False)
    sizes = {name: size for name, (_, size) in report.collapsed().items()}
    assert sizes == {"mu": 1, "tau": 1, "theta": 4, "width": 4}
    assert "of 4 dimensions of site 'theta'" in str(report)
    tree = report.add_to(posterior.to_datatree(key, padded(data, 0.0), num_samples=2))
    for name, size in padded(data, 0.0)["sizes"].items():  # which tell what of it is padding
        np.testing.assert_array_equal(tree.constant_data[f"sizes.{name}"], size)
    for name in ("theta", "width"):
        drawn, found = tree["posterior"][name], tree["checks"][f"kl_{name}"]
        assert found.dims == drawn.dims[2:]
        assert found.shape == drawn.shape[2:]
        there = np.arange(4) < GROUPS[:, None]
        np.testing.assert_array_equal(np.isfinite(found.values[..., 0]), there)
    assert np.isnan(report.dataset["mutual_information"])  # of data sets of several sizes
    other = posterior.check(key, padded(data, 9.0), "collapse", progress_bar=False)
    for name, value in report.dataset.items():
        np.testing.assert_allclose(other.dataset[name], value, rtol=1e-3, atol=1e-4)
