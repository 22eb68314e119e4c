"""Every notebook runs, prints what it shows, and keeps to the form that its readers rely on."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest

from minidp.bench.leftovers import VARIABLE
from tests import markdown

nbclient = pytest.importorskip("nbclient", reason="notebooks are tested with nbclient (extra: test)")
pytest.importorskip("ipykernel", reason="notebooks are tested with ipykernel (extra: test)")
pytest.importorskip("matplotlib", reason="notebooks draw with matplotlib (extra: test)")

from notebooks import run  # noqa: E402

NAMES = [path.name for path in run.NOTEBOOKS]
HIDDEN = re.compile(r"<details>\n<summary>Answer</summary>\n\n.*?\n\n</details>", re.DOTALL)


@pytest.fixture(params=NAMES)
def notebook(request: pytest.FixtureRequest) -> Any:
    return run.read(run.HERE / request.param)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_there_are_fifteen() -> None:
    assert [name[:2] for name in NAMES] == [f"{i:02}" for i in range(1, 16)]


# -- what they print ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_a_run_gives_what_is_shown(notebook: Any, token: str) -> None:
    again = run.execute(notebook, with_answers=True, **{VARIABLE: token})
    for shown, got in zip(code(notebook), code(again)):
        where = shown.source
        assert [kind(output) for output in got.outputs] == [kind(output) for output in shown.outputs], where
        if "varies" in shown.metadata.get("tags", []):
            continue
        for old, new in zip(shown.outputs, got.outputs):
            assert words(new) == words(old), where
            if "image/png" in old.get("data", {}):
                assert difference(picture(old), picture(new)) <= 2, where


def kind(output: Any) -> tuple[Any, ...]:
    return output.output_type, output.get("name"), *sorted(output.get("data", {}))


def words(output: Any) -> Any:
    """All that an output says, but for pictures in pixels."""
    if output.output_type == "stream":
        return output.text
    return {name: data for name, data in output.data.items() if name != "image/png"}


def picture(output: Any) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    with image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as opened:
        return np.asarray(opened.convert("RGB"), float)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pixels, of 255. Another release of matplotlib draws letters otherwise, and a pixel larger."""
    height, width = np.minimum(a.shape[:2], b.shape[:2])
    assert np.abs(np.subtract(a.shape, b.shape)).max() <= 0.02 * max(a.shape), "other sizes"
    return float(np.abs(a[:height, :width] - b[:height, :width]).mean())


def test_what_differs_is_seen() -> None:
    """The comparison can fail."""
    white = np.full((40, 60, 3), 255.0)
    marked = white.copy()
    marked[10:12, :] = 0
    assert difference(white, white) == 0
    assert difference(white, marked) > 2
    with pytest.raises(AssertionError, match="other sizes"):
        difference(white, np.full((80, 60, 3), 255.0))


# -- their form --------------------------------------------------------------------------------------------------


def test_the_beginning_tells_number_article_and_idea(notebook: Any, request: pytest.FixtureRequest) -> None:
    first = texts(notebook)[0]
    assert notebook.cells[0].source == first
    title, _, article, *_ = first.splitlines()
    assert title.startswith(f"# {request.node.callspec.params['notebook'][:2]} · ")
    assert re.fullmatch(r"Article: (\d\.\d(\.\d)?|practice)(, (\d\.\d(\.\d)?|practice))*", article)
    assert "**The idea.**" in first


def test_there_is_a_picture(notebook: Any) -> None:
    found = {kind for cell in code(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert found & {"image/png", "image/svg+xml"}


def test_outputs_are_small_and_clean(notebook: Any) -> None:
    for cell in code(notebook):
        assert cell.execution_count is not None, "committed without a run"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
            assert len(str(words(output))) < 20_000 or "image/svg+xml" in output.get("data", {})
            assert not re.search(r"ipykernel_\d|/home/|/root/|/tmp/", str(output.get("text", "")))


def test_it_ends_in_an_assertion(notebook: Any) -> None:
    assert re.search(r"^ *assert ", code(notebook)[-1].source, re.MULTILINE)
    assert any(text.startswith("## What holds") for text in texts(notebook))


def test_three_exercises_with_hidden_answers(notebook: Any) -> None:
    exercises = texts(notebook)[-1]
    numbers = re.findall(r"^\*\*(\d)\.\*\* ", exercises, re.MULTILINE)
    assert exercises.startswith("## Exercises")
    assert numbers == ["1", "2", "3"]
    assert len(HIDDEN.findall(exercises)) == exercises.count("<details>") == 3
    assert len(run.answers(notebook)) == 3
    assert all(re.search(r"^ *assert ", answer, re.MULTILINE) for answer in run.answers(notebook))


def test_the_next_one_is_named(notebook: Any, request: pytest.FixtureRequest) -> None:
    position = NAMES.index(request.node.callspec.params["notebook"])
    last = texts(notebook)[-1].splitlines()[-1]
    if position + 1 < len(NAMES):
        assert re.fullmatch(rf"Next: \[\d\d · .+\]\({NAMES[position + 1]}\)", last)


def test_links_lead_somewhere(notebook: Any) -> None:
    for text in texts(notebook):
        for target in markdown.targets(text):
            assert target.startswith("https://") or (run.HERE / target).exists(), target
