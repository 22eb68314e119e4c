"""Run the notebooks and keep what they print: ``python notebooks/run.py [NAME …]``, all of them without a name.

Outputs are committed, since notebooks are read more often than run; the tests run them again and compare. Cells
are numbered anew, and nothing is kept that another run would give differently: no times, no process numbers.

A cell tagged ``varies`` (this machine's timings, process numbers) is compared by the kinds of its outputs only.
One tagged ``hide-input`` only draws: its code is folded.
The answers to the exercises, ```python blocks in a cell's ``<details>``, are run after the notebook and not kept.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
TIMEOUT_S = 120  # of one cell; a whole notebook shall take less
_ANSWER = re.compile(r"<details>.*?</details>", re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def answers(notebook: Any) -> list[str]:
    """The programs in the hidden answers, in order."""
    hidden = [text for cell in notebook.cells for text in _ANSWER.findall(cell.source)]
    return [program for text in hidden for program in _PYTHON.findall(text)]


def execute(notebook: Any, with_answers: bool = False, **environment: str) -> Any:
    """A copy with the outputs of a run in a kernel of its own, and the answers as further cells if asked for.

    Raises: nbclient.exceptions.CellExecutionError for a cell that fails.
    """
    copy = nbformat.from_dict(notebook)
    if with_answers:
        copy.cells += [nbformat.v4.new_code_cell(program) for program in answers(notebook)]
    client = NotebookClient(
        copy, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute(env={**os.environ, **environment})
    return tidy(copy)


def tidy(notebook: Any) -> Any:
    """Take away what differs from run to run, and join what a cell printed in pieces."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    count = 0
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if "hide-input" in tags:
            cell.metadata["jupyter"] = nbformat.from_dict({"source_hidden": True})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            output.get("metadata", {}).clear()
            output.pop("transient", None)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Pieces of one stream become one; progress bars, which are empty at the end, go."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "display_data" and not any(output.data.values()):
            continue
        if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> int:
    chosen = [path for path in NOTEBOOKS if not names or any(path.name.startswith(Path(n).name) for n in names)]
    if not chosen:
        print(f"no notebook begins with {', '.join(names)}; there are {', '.join(p.name for p in NOTEBOOKS)}")
        return 2
    for path in chosen:
        print(path.name, flush=True)
        nbformat.write(execute(read(path)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
