"""Single-cell counts: a latent state for each cell, and a dispersion for each gene.

Run ``python examples/single_cell.py --data pbmc.npz``. A cell's counts over genes are negative
binomial. Their means are the cell's library size, which is observed, times what a linear map of the
cell's latents says of each gene (Svensson et al., *Interpretable factor models of single-cell
RNA-seq via variational autoencoders*, Bioinformatics 2020). How much a gene scatters is a latent of
that gene, the same for all cells: a global site, which `AutoNormal` serves. The encoder reads
``log1p`` of the counts, and the bound is judged on cells held out.

The data are an ``.npz`` with ``counts`` (cells, genes), a mask ``hvg`` of the genes to model, and
``protein`` (cells, proteins), the surface proteins of the same cells, which the model never sees:
how well the latents predict them says whether they mean something. The 200 blood cells in the tests
of scvi-tools (``pbmc_5k_protein_v3``) have this form.

It prints the bound beside that of a model without latents, the prediction of the proteins beside
that from as many principal components, and the check of each cell, and writes a picture and an
ArviZ DataTree into ``output/``.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from matplotlib.figure import Figure
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict

from numpyro_vae import (
    MLP,
    AutoAmortizedNormal,
    FitResult,
    Importance,
    Posterior,
    Report,
    fit,
    plot_khat,
    plot_training,
)

LATENT_SIZE = 8
TEST = 40  # cells held out


class Cells(NamedTuple):
    """Counts ``(cells, genes)``, the size of each cell's library, and its proteins."""

    counts: np.ndarray
    library: np.ndarray
    protein: np.ndarray

    def rows(self, rows: slice) -> "Cells":
        """Return some of the cells."""
        return Cells(*(array[rows] for array in self))


def load(path: Path) -> Cells:
    """Read the genes that vary, cells in a fixed random order."""
    with np.load(path) as file:
        counts, protein = file["counts"][:, file["hvg"]], file["protein"]
    order = np.random.default_rng(0).permutation(len(counts))
    counts = counts[order].astype(np.float32)
    counts = counts[:, counts.sum(0) > 0]
    return Cells(counts, counts.sum(1), protein[order])


class LinearDecoder(nnx.Module):
    """From a cell's latents to the share of each gene in its counts."""

    def __init__(self, shares: np.ndarray, *, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(0.05)
        self.loadings = nnx.Linear(
            LATENT_SIZE, len(shares), use_bias=False, kernel_init=small, rngs=rngs
        )
        self.level = nnx.Param(jnp.log(jnp.asarray(shares)))

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return shares, which add up to one for each cell."""
        return nnx.softmax(self.loadings(z) + self.level[...])


def make_model(train: Cells, *, latents: bool) -> Callable[..., None]:
    """The generative model, with latents of the cells or without."""
    shares = (train.counts.sum(0) + 0.5) / (train.counts.sum() + 0.5 * train.counts.shape[1])
    decoder = LinearDecoder(shares, rngs=nnx.Rngs(0))
    genes = len(shares)

    def model(counts: jax.Array, library: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        prior = dist.LogNormal(0.0, 1.5).expand([genes]).to_event(1)
        concentration = numpyro.sample("concentration", prior)
        with numpyro.plate("cell", len(counts)):
            z = jnp.zeros((len(counts), LATENT_SIZE))
            if latents:
                normal = dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1)
                z = jnp.asarray(numpyro.sample("z", normal))
            mean = library[:, None] * decode(z)
            likelihood = dist.NegativeBinomial2(mean, concentration).to_event(1)
            numpyro.sample("counts", likelihood, obs=counts)

    return model


def held_out_without_latents(train: Cells, test: Cells, num_steps: int) -> np.ndarray:
    """Return the log-likelihood of each cell held out, where all cells are alike."""
    model = make_model(train, latents=False)
    guide = AutoNormal(model, init_scale=0.1)
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(0), num_steps, train.counts, train.library, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(50,))
    found = numpyro.infer.log_likelihood(
        lambda *args: numpyro.handlers.substitute(model, data=result.params)(*args),
        draws,
        test.counts,
        test.library,
    )["counts"]
    return np.asarray(jax.scipy.special.logsumexp(found, axis=0) - np.log(len(found)))


def protein_scores(features: np.ndarray, protein: np.ndarray) -> np.ndarray:
    """How much of each protein's variance ridge regression explains, cross-validated."""
    target = np.log1p(protein)
    predicted = cross_val_predict(RidgeCV(np.logspace(-3, 3, 13)), features, target, cv=10)
    return 1 - ((target - predicted) ** 2).mean(0) / target.var(0)


def components(cells: Cells) -> np.ndarray:
    """As many principal components of the normalized counts as the model has latents."""
    normalized = np.log1p(cells.counts / cells.library[:, None] * np.median(cells.library))
    return PCA(LATENT_SIZE, random_state=0).fit_transform(normalized)


def draw(
    latents: np.ndarray,
    cells: Cells,
    scores: tuple[np.ndarray, ...],
    found: Report,
    result: FitResult,
    path: Path,
) -> None:
    """The cells' latents and proteins, the k-hats, and the training."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplot_mosaic("ABP;KKT")
    plane = PCA(2).fit_transform(latents)
    for name, protein in zip("AB", np.argsort(scores[0])[::-1], strict=False):
        shown = axes[name].scatter(*plane.T, c=np.log1p(cells.protein[:, protein]), s=14)
        axes[name].set(title=f"Cells' latents, coloured by protein {protein}", xlabel="component 1")
        figure.colorbar(shown, ax=axes[name], label="log1p of its count")
    axes["A"].set_ylabel("component 2")
    axes["P"].scatter(scores[1], scores[0], s=16)
    axes["P"].axline((0, 0), slope=1, color="grey", lw=1)
    axes["P"].set(
        title="Variance of proteins explained",
        xlabel=f"{LATENT_SIZE} principal components",
        ylabel=f"{LATENT_SIZE} latents",
    )
    plot_khat(found, ax=axes["K"])
    plot_training(result, ax=axes["T"])
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, compare, check, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an .npz, see the docstring")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    cells = load(args.data)
    train, test = cells.rows(slice(TEST, None)), cells.rows(slice(TEST))
    num_epochs = 5 if args.quick else 250
    model = make_model(train, latents=True)
    guide = AutoAmortizedNormal(
        model,
        partial(MLP, hidden_sizes=(64,), standardize=True),
        inputs=lambda counts, library: jnp.log1p(counts / library[:, None] * 1e3),
        global_guide=partial(AutoNormal, init_scale=0.1),
    )
    steps = num_epochs * 4
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = fit(
        svi,
        jax.random.key(0),
        (train.counts, train.library),
        batch_size=40,
        num_epochs=num_epochs,
        validation=(test.counts, test.library),
    )

    posterior = Posterior(guide, result)
    held_out = (test.counts, test.library)
    num_samples = 100 if args.quick else 500
    found = posterior.check(
        jax.random.key(1), held_out, checks=(Importance(num_samples=num_samples), "collapse")
    )
    alike = held_out_without_latents(train, test, steps)
    gain = found.dataset["elbo"].values - alike
    print(f"\nHeld out: {found}")
    print("\nELBO above a model in which all cells are alike, nats a cell: ", end="")
    print(f"{gain.mean():.1f} (se {gain.std(ddof=1) / np.sqrt(len(gain)):.1f})")

    latents = posterior.encode((cells.counts, cells.library))["z"].loc
    scores = (
        protein_scores(latents, cells.protein),
        protein_scores(components(cells), cells.protein),
    )
    print("Variance of 29 proteins explained, mean: ", end="")
    print(f"latents {scores[0].mean():.3f}, principal components {scores[1].mean():.3f}")
    draw(latents, cells, scores, found, result, args.output / "single_cell.png")

    some = tuple(array[:10] for array in held_out)
    tree = posterior.to_datatree(jax.random.key(2), some, 20)
    path = args.output / "single_cell.nc"
    found.isel(cell=slice(10)).add_to(tree).to_netcdf(path)
    with az.from_netcdf(path) as tree:
        print(f"\n{path} holds {', '.join(tree.children)}: {dict(tree.posterior.sizes)}")


if __name__ == "__main__":
    main()
