"""A fit that goes on from a checkpoint ends as one that was not interrupted, bit for bit."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings

import jax
import killing
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import SMALL, make_svi
from killing import Network, X, assert_same, kill_and_compare, model, numbers, train
from models import hierarchical_model
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Checkpoints, ForwardKL, Posterior, Simulations, fit
from numpyro_vae.objectives import AnnealedELBO
from numpyro_vae.training import checkpoints
from numpyro_vae.training.callbacks import StopReason

EPOCHS = 9
ROOT = pathlib.Path(__file__).parent.parent.parent


def always(path):
    return Checkpoints(path, every_minutes=0.0)


@pytest.fixture(scope="module")
def expected():
    return numbers(train(num_epochs=EPOCHS))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints after epochs 3 and 6."""
    path = tmp_path_factory.mktemp("two") / "checkpoints"
    for epoch in (3, 6):
        train(Checkpoints(path), num_epochs=epoch)
    assert sorted(x.name for x in path.iterdir()) == ["3", "6"]
    return path


@pytest.fixture
def path(two, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(two, tmp_path / "checkpoints")


@pytest.mark.slow
def test_it_ends_the_same(path, expected):
    assert_same(numbers(train(path, num_epochs=EPOCHS)), expected)


@pytest.mark.slow
def test_checkpoints_change_nothing(tmp_path, expected):
    assert_same(numbers(train(always(tmp_path / "new"), num_epochs=EPOCHS)), expected)


def test_a_fit_that_is_done_is_not_done_again(path):
    seen = []
    result = train(path, num_epochs=6, callbacks=[lambda epoch, *_: seen.append(epoch)])
    assert not seen
    assert result.stop_reason is StopReason.EPOCHS_DONE
    assert_same(numbers(result), numbers(train(num_epochs=6)))


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_fit_that_was_stopped(tmp_path, expected, interrupt):
    def stop(epoch, state, metrics):
        if interrupt and epoch == 4:
            raise KeyboardInterrupt
        return epoch == 4

    path = tmp_path / "checkpoints"
    first = train(path, num_epochs=EPOCHS, callbacks=[stop])
    second = train(path, num_epochs=EPOCHS)
    if interrupt:  # and goes on
        assert_same(numbers(second), expected)
    else:  # and is stopped for good
        assert second.stop_reason is first.stop_reason is StopReason.CALLBACK
        assert_same(numbers(second), numbers(first))


@pytest.mark.slow
def test_early_stopping_goes_on_counting(tmp_path):
    """The best state is one from before the checkpoint."""
    options = {"patience": 2, "batch_size": 8}
    whole = train(num_epochs=40, **options)
    stopped = len(whole.history["loss"])
    assert whole.stop_reason is StopReason.NO_IMPROVEMENT
    assert 4 <= stopped < 40
    path = tmp_path / "checkpoints"
    train(path, num_epochs=stopped - 1, **options)
    for _ in range(2):
        result = train(path, num_epochs=40, **options)
        assert result.stop_reason is StopReason.NO_IMPROVEMENT
        assert_same(numbers(result), numbers(whole))


def of_iterable(num_epochs, checkpoint):
    svi = make_svi(model, Network, loss=Trace_ELBO())
    batches = [X[start : start + 30] for start in range(0, 90, 30)]
    options = {"num_epochs": num_epochs, "checkpoint": checkpoint, "progress_bar": False}
    return fit(svi, jax.random.key(0), batches, num_data=90, **options)


def of_schedule(num_epochs, checkpoint):
    """Of the objective, the optimizer's clipping, frozen parameters, and legacy random keys."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    loss = AnnealedELBO(optax.linear_schedule(0.0, 1.0, 10))
    svi = make_svi(model, loss=loss, optimizer=optimizer)
    options = {"num_epochs": num_epochs, "checkpoint": checkpoint, "progress_bar": False}
    return fit(svi, jax.random.PRNGKey(0), X, batch_size=40, freeze=("model",), **options)


def of_simulations(num_epochs, checkpoint):
    """A table of simulated rows is drawn every third epoch, and again where training goes on."""
    svi = make_svi(hierarchical_model, loss=ForwardKL())
    data = Simulations(64, like=X[:32, 0], redraw_every=3)
    options = {"num_epochs": num_epochs, "checkpoint": checkpoint, "progress_bar": False}
    return fit(svi, jax.random.key(0), data, batch_size=32, **options)


def of_whole_data(num_epochs, checkpoint):
    svi = make_svi(hierarchical_model, loss=Trace_ELBO())
    options = {"num_epochs": num_epochs, "checkpoint": checkpoint, "progress_bar": False}
    return fit(svi, jax.random.key(0), X[:, 0], batch_axes=None, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*still falling:UserWarning")
@pytest.mark.parametrize("run", [of_iterable, of_schedule, of_simulations, of_whole_data])
def test_other_kinds_of_fits(run, tmp_path):
    whole, path = run(8, None), tmp_path / "checkpoints"
    run(4, path)
    assert_same(numbers(run(8, path)), numbers(whole))


@pytest.mark.slow
def test_a_posterior_is_that_of_a_whole_fit(path):
    draws = []
    for checkpoint in (None, path):
        svi = SVI(model, AutoAmortizedNormal(model, Network), optax.adam(1e-2), Trace_ELBO())
        options = {"num_epochs": 2, "progress_bar": False}
        checkpoint = checkpoint and path.with_name("other")
        result = fit(svi, jax.random.key(0), X, checkpoint=checkpoint, **options)
        draws.append(Posterior(svi.guide, result).sample(jax.random.key(1), X[:5], 3)["z"])
    np.testing.assert_array_equal(*draws)


# Killed, cut short, and without room


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    assert kill_and_compare(tmp_path, kills=3, seed=0) >= 1


FILES = ("_CHECKPOINT_METADATA", "fit/metadata", "arrays/_METADATA", "arrays/manifest.ocdbt", "d/*")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["cut", "removed", "changed"])
def test_a_checkpoint_that_is_not_whole(path, expected, file, how):
    """Is told of, and the one before is used; or it can be read all the same."""
    found = list((path / "6").rglob(file)) if file == "d/*" else [path / "6" / file]
    for name in found:
        data = name.read_bytes()
        changed = data[: len(data) // 2]
        if how == "changed":
            changed = bytearray(data)
            changed[len(data) // 2] ^= 255
        name.unlink()
        if how != "removed":
            name.write_bytes(changed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(path, num_epochs=EPOCHS)
    assert_same(numbers(result), expected)
    told = [str(w.message) for w in caught if "cannot be read" in str(w.message)]
    assert all("after epoch 6" in x and "training goes on after epoch 3" in x for x in told)
    assert told or file == "_CHECKPOINT_METADATA"
    assert {x.name for x in path.iterdir()} >= {"9"}


def test_no_checkpoint_that_is_whole(path, expected):
    for name in path.rglob("*"):
        if name.is_file():
            name.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read and is removed; training goes on anew"):
        assert_same(numbers(train(path, num_epochs=EPOCHS)), expected)


def test_what_was_being_written_is_removed(path, expected):
    (path / "7.orbax-checkpoint-tmp").mkdir()
    (path / "7.orbax-checkpoint-tmp" / "half").write_text("half")
    assert_same(numbers(train(path, num_epochs=EPOCHS)), expected)
    assert sorted(x.name for x in path.iterdir()) == ["6", "9"]


def test_a_checkpoint_that_cannot_be_written(path, expected, monkeypatch):
    """Costs no more than itself, and the one before is as it was."""
    import orbax.checkpoint as ocp

    def fail(self, step, **_):
        (path / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.warns(
        UserWarning, match="No space left.*the last checkpoint is the one after .* 6"
    ):
        assert_same(numbers(train(path, num_epochs=EPOCHS)), expected)
    unfinished = path / f"{EPOCHS}.orbax-checkpoint-tmp"
    for _ in range(100):  # a thread of Orbax's removes it
        if not unfinished.exists():
            break
        time.sleep(0.1)
    assert sorted(x.name for x in path.iterdir()) == ["3", "6"]


def mounted(command):
    """A command in which a folder of a megabyte can be mounted, without being root."""
    return ["unshare", "--user", "--map-root-user", "--mount", *command]


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            mounted(["mount", "-t", "tmpfs", "tmpfs", tmp_path]), capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no folder can be mounted here")
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    script = f"{mount} && exec {sys.executable} {killing.__file__} --full-disk {tmp_path}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        mounted(["sh", "-c", script]), capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


# Other fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": X[:79]}, "num_data was 80, and now is 79"),
        ({"data": X[:80] + 1}, "the fingerprint of data was"),
        ({"validation": X[79:]}, "the fingerprint of validation was"),
        ({"batch_size": 16}, "batch_size was 32, and now is 16"),
        ({"patience": 24}, "patience was 25, and now is 24"),
        ({"freeze": "model"}, r"freeze was \[\], and now is \['noise'\]"),
        ({"init_params": {"noise": 2.0}}, "the fingerprint of init_params was"),
        ({"num_epochs": 5}, "num_epochs is 5, and .* has a checkpoint after epoch 6. Pass a la"),
    ],
)
def test_another_fit_is_refused(path, options, named):
    with pytest.raises(ValueError, match=named):
        train(path, **{"num_epochs": EPOCHS, **options})
    assert sorted(x.name for x in path.iterdir()) == ["3", "6"]


def refit(path, *, key=0, width=None, rate=1e-2, prior=1.0, loss=None):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, prior))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    encoder = SMALL if width is None else Network
    svi = make_svi(model, encoder, optimizer=rate, loss=loss)
    options = {"num_epochs": 1, "checkpoint": path, "progress_bar": False}
    data = X if width else X[:, 0]
    return fit(svi, jax.random.key(key), data, **options)


@pytest.mark.slow
def test_another_model_optimizer_or_key_is_refused(tmp_path):
    path = tmp_path / "checkpoints"
    refit(path)
    refit(path)
    with pytest.raises(ValueError, match="another fit: the fingerprint of rng_key was"):
        refit(path, key=1)
    for options in ({"rate": 2e-2}, {"prior": 2.0}, {"loss": Trace_ELBO()}):
        with pytest.raises(ValueError, match="another fit: what a step computes, of model, guide"):
            refit(path, **options)
    with pytest.raises(ValueError, match=r"another fit: the shape of parameter \['auto\$params'\]"):
        train(path)


def test_other_versions_may_compute_a_step_otherwise(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints"
    refit(path)
    monkeypatch.setattr(checkpoints, "versions", lambda: {"jax": "999"})
    refit(path, rate=2e-2)  # nobody knows
    with pytest.raises(ValueError, match="rng_key"):
        refit(path, key=1)


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "2024").mkdir()
    with pytest.raises(ValueError, match=r"other files than checkpoints: \['2024'\]"):
        refit(tmp_path)
    (tmp_path / "2024").rmdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other files than checkpoints: \['notes.txt'\]"):
        refit(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is a file. Pass a folder"):
        refit(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"every_minutes is -1.0, expected 0 or more"):
        Checkpoints(tmp_path, every_minutes=-1.0)


@pytest.mark.slow
def test_a_folder_that_another_fit_writes_to_is_refused(tmp_path):
    """And free again after it, also where it failed."""
    path = tmp_path / "checkpoints"

    def meanwhile(epoch, *_):
        with pytest.raises(ValueError, match=r"Another fit, of this process .* writes checkpoints"):
            refit(path)
        raise KeyError(epoch)

    svi = make_svi(hierarchical_model, SMALL)
    options = {"num_epochs": 2, "progress_bar": False, "checkpoint": always(path)}
    with pytest.raises(KeyError):
        fit(svi, jax.random.key(0), X[:, 0], callbacks=[meanwhile], **options)
    assert fit(svi, jax.random.key(0), X[:, 0], **options).history["loss"].shape == (2,)


def test_checkpoints_are_some_time_apart(tmp_path, monkeypatch):
    """Here an epoch takes forty seconds, so that every second one is written, and the last."""
    now, written = [0.0], []
    monkeypatch.setattr(checkpoints, "monotonic", lambda: now[0])
    write = checkpoints.CheckpointFolder._write

    def write_and_wait(folder):
        written.append(folder.complete)
        write(folder)
        folder.manager.wait_until_finished()

    monkeypatch.setattr(checkpoints.CheckpointFolder, "_write", write_and_wait)

    def forty_seconds(epoch, state, metrics):
        now[0] += 40

    train(tmp_path / "checkpoints", num_epochs=7, callbacks=[forty_seconds])
    assert written == [2, 4, 6, 7]
