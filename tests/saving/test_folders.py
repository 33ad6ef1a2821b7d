"""Folders that cannot be written, and folders that are not what was written."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from saved_cases import SMALL, model

from numpyro_vae import AutoAmortizedNormal, Posterior
from numpyro_vae.saving import SavedPosteriorError, manifest

CONTENT = {"params": {"a": 1.5}}
ARRAY = {"a": np.arange(300.0)}


@pytest.fixture
def path(tmp_path):
    manifest.write_folder(tmp_path / "saved", CONTENT, ARRAY)
    return tmp_path / "saved"


def rewrite(path, **changes):
    """Change a manifest as somebody would who knows how its fingerprint is made."""
    found = json.loads((path / "manifest.json").read_text()) | changes
    found["fingerprints"]["manifest.json"] = manifest._hash_of_manifest(found)
    (path / "manifest.json").write_text(json.dumps(found))


def test_what_is_written_is_read(path):
    content, arrays = manifest.read_folder(path)
    assert content["params"] == CONTENT["params"]
    np.testing.assert_array_equal(arrays["a"], ARRAY["a"])


@pytest.mark.parametrize("file", ["manifest.json", "arrays.safetensors"])
def test_every_changed_byte_is_noticed(path, file):
    data = (path / file).read_bytes()
    for place in np.linspace(0, len(data) - 1, 40).astype(int):
        changed = bytearray(data)
        changed[place] ^= 1
        (path / file).write_bytes(changed)
        with pytest.raises(SavedPosteriorError, match=f"{path}.*(save|Upgrade)"):
            manifest.read_folder(path)


@pytest.mark.parametrize("file", ["manifest.json", "arrays.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_noticed(path, file, share):
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(SavedPosteriorError, match=f"{file} is cut short.*Copy the folder again"):
        manifest.read_folder(path)


@pytest.mark.parametrize("file", ["manifest.json", "arrays.safetensors"])
def test_a_file_that_is_missing_is_named(path, file):
    (path / file).unlink()
    with pytest.raises(SavedPosteriorError, match=f"has no file {file}"):
        manifest.read_folder(path)


@pytest.mark.parametrize(
    "text", ["[]", "1", "{}", '{"kind": "other"}', '{"kind": ["numpyro_vae.Posterior"]}']
)
def test_other_manifests_are_told(path, text):
    (path / "manifest.json").write_text(text)
    with pytest.raises(SavedPosteriorError, match=r"manifest.json is not that of a saved poster"):
        manifest.read_folder(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN', "\x00", '{"kind": "\ud800"'])
def test_what_is_no_json_does_not_crash(path, text):
    (path / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SavedPosteriorError, match=r"manifest.json is cut short, or has been ch"):
        manifest.read_folder(path)


@pytest.mark.parametrize("fingerprints", [None, [], {}, "x"])
def test_fingerprints_that_are_missing_do_not_crash(path, fingerprints):
    found = json.loads((path / "manifest.json").read_text()) | {"fingerprints": fingerprints}
    (path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(SavedPosteriorError, match=r"manifest.json is cut short, or has been ch"):
        manifest.read_folder(path)


def test_what_is_no_folder_of_ours_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nothing. Pass the folder"):
        Posterior.load(tmp_path / "nothing", model)
    with pytest.raises(SavedPosteriorError, match=r"has no file manifest.json"):
        Posterior.load(tmp_path, model)
    (tmp_path / "file").write_text("text")
    with pytest.raises(SavedPosteriorError, match=r"has no file manifest.json"):
        Posterior.load(tmp_path / "file", model)


def test_a_later_format_asks_for_an_upgrade(path):
    rewrite(path, format=3)
    with pytest.raises(SavedPosteriorError, match=r"has format 3.* up to 2. Upgrade numpyro_vae"):
        manifest.read_folder(path)


def test_a_manifest_of_the_right_fingerprint_executes_nothing(tmp_path):
    path = tmp_path / "saved"
    posterior = Posterior(AutoAmortizedNormal(model, SMALL), {})
    posterior.guide.read_model((jnp.zeros((4, 3)),), {}, {})
    posterior.save(path)
    whole = json.loads((path / "manifest.json").read_text())
    for encoder in (
        {"name": "os.system"},
        {"make": "MLP", "with": {"dict": {}}},
        {"partial": {"name": "builtins.eval"}, "args": {"tuple": []}, "with": {"dict": {}}},
        {"array": {"name": "a"}},
        {"list": 1, "tuple": 2},
        {},
    ):
        options = whole["guide"]["options"] | {"encoder": encoder}
        rewrite(path, guide=whole["guide"] | {"options": options})
        with pytest.raises(SavedPosteriorError, match=r"manifest.json cannot be read.*Upgrade"):
            Posterior.load(path, model)
    rewrite(path, guide={"class": "AutoAmortizedNormal"})
    with pytest.raises(SavedPosteriorError, match=r"KeyError\('options'\)"):
        Posterior.load(path, model)


# Writing


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("is_empty", [True, False])
def test_nothing_is_overwritten(tmp_path, is_empty):
    path = tmp_path / "saved"
    path.mkdir()
    if not is_empty:
        (path / "other").write_text("mine")
    with pytest.raises(FileExistsError, match="saved exists, and nothing is overwritten"):
        manifest.write_folder(path, CONTENT, ARRAY)
    assert left_in(path) == ([] if is_empty else ["other"])


def test_no_permission_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:  # to whom nothing is forbidden

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))

        monkeypatch.setattr(manifest.Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"saved cannot be written: Permission denied. Save"):
        manifest.write_folder(folder / "saved", CONTENT, ARRAY)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(manifest, "_write", fail)
    with pytest.raises(OSError, match="No space left on device"):
        manifest.write_folder(tmp_path / "saved", CONTENT, ARRAY)
    assert not left_in(tmp_path)


def test_folders_above_are_made(tmp_path):
    manifest.write_folder(tmp_path / "a" / "b", CONTENT, ARRAY)
    assert left_in(tmp_path / "a") == ["b"]
