"""A play as text for language models, its characters as tokens (see hamlet.LICENSE.txt); and one's own text."""

from __future__ import annotations

import copy
import gzip
import operator
import os
import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from minidp.data.dataset import ArrayDataset

PATH = os.path.join(os.path.dirname(__file__), "hamlet.txt.gz")


class TextDataset(ArrayDataset):
    """Windows of a text, (x, y): a model that reads x[:, : t + 1] is to tell y[:, t], the character after it.

    x, y: int64, shape (n, context), tokens 0 … V - 1; y is x one character later. The windows lie end to end
    and in order: character i of the text is x[i // context, i % context]. There are as many as have a next
    character for each of theirs, n = (length - 1) // context: up to `context` characters at the end of the
    text are left out of x. Both are read-only views of one array.

    Args:
        text: what to cut into windows.
        context: characters in a window.
        vocabulary: the V characters (code points) that have tokens, each once, in the order of their tokens;
            the sorted distinct characters of `text` if None. Parts of one text need one vocabulary.

    Attributes:
        vocabulary: a str; token k stands for vocabulary[k].
        context: as given.

    Raises:
        TypeError: text or vocabulary is no str, or context no integer.
        ValueError: context below 1, a text too short for one window, a character that the vocabulary lacks, or
            one that it has twice.
    """

    def __init__(self, text: str, context: int = 64, vocabulary: str | None = None) -> None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        self.context = _context(context)
        self.vocabulary = "".join(sorted(set(text))) if vocabulary is None else _distinct(vocabulary)
        n = (len(text) - 1) // self.context
        if n < 1:
            raise ValueError(
                f"a text of {len(text)} characters is too short for one window: context {self.context} needs "
                f"{self.context + 1}, the window and the character after it"
            )
        tokens = self.encode(text)
        tokens.flags.writeable = False  # x and y overlap: a write into one would show in the other
        x, y = tokens[: n * self.context], tokens[1 : n * self.context + 1]
        super().__init__(x.reshape(n, self.context), y.reshape(n, self.context))

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The tokens of a text: int64, shape (len(text),).

        Raises:
            ValueError: a character that the vocabulary lacks.
        """
        tokens = {character: token for token, character in enumerate(self.vocabulary)}
        try:
            return np.fromiter(map(tokens.__getitem__, text), np.int64, len(text))
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} is not in the vocabulary; valid are {self.vocabulary!r}"
            ) from None

    def decode(self, tokens: npt.ArrayLike) -> str:
        """The text of these tokens, integers in an array or list of any shape, in C order: undoes `encode`.

        Raises:
            TypeError: no integers.
            ValueError: a token outside 0 … V - 1.
        """
        array = np.asarray(tokens)
        if array.size == 0:  # an empty list is an array of floats to NumPy
            return ""
        if array.dtype.kind not in "iu":
            raise TypeError(f"tokens must be integers, found dtype {array.dtype}")
        for token in (array.min(), array.max()):
            if not 0 <= token < len(self.vocabulary):
                raise ValueError(f"token {token} is out of range: valid are 0 to {len(self.vocabulary) - 1}")
        return "".join(map(self.vocabulary.__getitem__, array.ravel().tolist()))

    def __repr__(self) -> str:
        return f"TextDataset({len(self)} windows of {self.context} characters, {len(self.vocabulary)} distinct)"


def load_text(context: int = 64) -> tuple[TextDataset, TextDataset]:
    """Shakespeare's Hamlet, whole and in modern spelling, character by character: (train, test).

    x, y: int64, tokens 0 to 64, shape (2445, 64) and (271, 64) at the default context; see `TextDataset`. Both
    have the vocabulary of the whole play. Test is the play's last tenth, the end of its last scene: no window
    of it shares a character with one of train. What fills no window at the end of each part is left out.

    Raises:
        TypeError: context is no integer.
        ValueError: context below 1, or longer than the test part.
    """
    train, test = _parts(_context(context))
    return copy.copy(train), copy.copy(test)  # own objects, shared arrays


@lru_cache(maxsize=4)
def _parts(context: int) -> tuple[TextDataset, TextDataset]:
    """Built once a context, since a thousand virtual ranks may ask: 14 ms and 1.4 MB each otherwise."""
    play = _stored()
    vocabulary = "".join(sorted(set(play)))
    end = len(play) - len(play) // 10
    return TextDataset(play[:end], context, vocabulary), TextDataset(play[end:], context, vocabulary)


@lru_cache(maxsize=1)
def _stored() -> str:
    with gzip.open(PATH, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def _context(context: int) -> int:
    try:
        context = operator.index(context)
    except TypeError:
        raise TypeError(f"context must be an integer, not {context!r}") from None
    if context < 1:
        raise ValueError(f"context must be at least 1, not {context}")
    return context


def _distinct(vocabulary: str) -> str:
    if not isinstance(vocabulary, str):
        raise TypeError(f"vocabulary must be a str, not {type(vocabulary).__name__}")
    twice = [c for c in sorted(set(vocabulary)) if vocabulary.count(c) > 1]
    if twice:
        raise ValueError(f"vocabulary must hold each character once, found {twice[0]!r} more often")
    return vocabulary


def normalized(text: str) -> str:
    """`text` with lines that end in "\\n" alone, without blanks at their ends and without runs of empty lines."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub("\n{3,}", "\n\n", lines).strip("\n") + "\n"


def export(source: str, path: str) -> None:
    """Write hamlet.txt.gz anew, as it was made once: from the file that hamlet.LICENSE.txt names."""
    with open(source, encoding="utf-8") as file:
        text = normalized(file.read())
    with open(path, "wb") as file:
        file.write(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))  # no time: the same bytes always
