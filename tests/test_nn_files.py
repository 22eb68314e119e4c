"""Models on disk: round trip, PyTorch both ways, damaged files."""

from __future__ import annotations

import os

import numpy as np
import pytest

from minidp import nn


def state():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model.register_buffer("steps", np.array(7, np.int64))
    return model.state_dict() | {
        "empty": np.zeros((0, 3)),
        "half": np.ones(3, np.float16),
        "strided": np.arange(12.0).reshape(3, 4)[::2, ::-1],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "flags": np.array([True, False]),
    }


def equal(a, b):
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and np.array_equal(a[name], b[name])
        for name in a
    )


def test_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    nn.save_file(state(), path, metadata={"step": "3"})
    assert equal(nn.load_file(str(path)), state())
    assert os.listdir(tmp_path) == ["model.safetensors"]
    loaded = nn.load_file(path)
    loaded["0.weight"][...] = 0  # the arrays are the caller's


def test_tensors_and_parameters_can_be_saved(tmp_path):
    model = nn.Linear(2, 2)
    nn.save_file(dict(model.named_parameters()), tmp_path / "m")
    assert equal(nn.load_file(tmp_path / "m"), model.state_dict())


def test_pytorch_reads_ours_and_we_read_pytorchs(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    ours, path = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), tmp_path / "m.safetensors"
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)

    nn.save_file(ours.state_dict(), path)
    theirs.load_state_dict(safetensors_torch.load_file(path))
    assert np.allclose(theirs(torch.from_numpy(x)).detach().numpy(), ours(x), rtol=1e-6, atol=1e-6)

    safetensors_torch.save_file({k: v + 1 for k, v in theirs.state_dict().items()}, path)
    ours.load_state_dict(nn.load_file(path))
    theirs.load_state_dict({k: v + 1 for k, v in theirs.state_dict().items()})
    assert np.allclose(theirs(torch.from_numpy(x)).detach().numpy(), ours(x), rtol=1e-5, atol=1e-6)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors.*save_file"):
        nn.load_file(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    nn.save_file(state(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        nn.load_file(path)


def test_other_files_are_no_models(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"these are notes, and no tensors" * 10)
    with pytest.raises(ValueError, match=r"notes\.txt is damaged or no safetensors file"):
        nn.load_file(path)


def test_what_numpy_has_no_dtype_for_is_an_error_that_names_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors.torch").save_file(
        {"w": torch.ones(2, dtype=torch.bfloat16)}, path := tmp_path / "bf16.safetensors"
    )
    with pytest.raises(ValueError, match=r"bf16\.safetensors"):
        nn.load_file(path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    nn.save_file({"w": np.ones(3)}, path)
    with pytest.raises(TypeError, match="w holds Python objects"):
        nn.save_file({"w": np.array([None])}, path)
    with pytest.raises(TypeError):
        nn.save_file({"w": np.zeros(3)}, path, metadata={"step": 3})
    assert equal(nn.load_file(path), {"w": np.ones(3)})
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(FileNotFoundError):
        nn.save_file({"w": np.ones(3)}, tmp_path / "no folder" / "m")


def test_a_new_file_has_the_usual_permissions(tmp_path):
    nn.save_file({"w": np.ones(3)}, tmp_path / "m")
    (tmp_path / "other").touch()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode
