"""A notebook: functions of cells travel, progress needs no widgets, interrupting the kernel leaves nothing."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from minidp.bench.leftovers import VARIABLE, processes

nbclient = pytest.importorskip("nbclient", reason="notebooks are tested with nbclient (extra: test)")
pytest.importorskip("ipykernel", reason="notebooks are tested with ipykernel (extra: test)")
nbformat = pytest.importorskip("nbformat")
jupyter_client = pytest.importorskip("jupyter_client")

CELLS = [
    "import time, minidp\nOFFSET = 10\ndef work(comm, factor):\n    return factor * comm.rank + OFFSET",
    "assert minidp.spawn(work, 2, 3) == [10, 13]",
    "OFFSET = 20\nminidp.spawn(work, 2, 3)",
    """def train(comm):
    for step in range(10):
        time.sleep(0.1)
        comm.progress(step + 1, 10)
    print('printed by', comm.rank)
minidp.spawn(train, 2)""",
    "minidp.spawn(lambda comm: 1 / comm.rank, 2)",
]


def test_cells_spawn_their_own_functions(token: str) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True)
    client.execute(env={**os.environ, VARIABLE: token})
    outputs = [cell.outputs for cell in cells]
    assert outputs[:2] == [[], []]
    assert outputs[2][0].data["text/plain"] == "[20, 23]"
    printed = "".join(output.text for output in outputs[3] if output.output_type == "stream")
    assert sorted(printed.splitlines()) == ["printed by 0", "printed by 1"], "and no warning about widgets"
    assert [output.name for output in outputs[3] if output.output_type == "stream"].count("stderr") == 0
    bars = [output for output in outputs[3] if output.output_type == "display_data"]
    assert [bar.data for bar in bars] == [{"text/plain": "", "text/html": ""}], "gone when the run has ended"
    assert outputs[4][0].ename == "RankFailed"
    assert "rank 0 of 2 raised ZeroDivisionError: division by zero" in outputs[4][0].evalue


class Kernel:
    """A kernel, and what it says."""

    def __init__(self, token: str) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**os.environ, VARIABLE: token})
        self.client = self.manager.client()
        self.client.start_channels()

    def run(self, source: str) -> None:
        self.client.execute(source, stop_on_error=False)  # else what follows an interrupt may be dropped

    def says(self) -> dict[str, Any]:
        """The next thing, whatever it is."""
        message = self.client.get_iopub_msg(timeout=30)
        return {"type": message["msg_type"], **message["content"]}

    def reply(self) -> dict[str, Any]:
        content: dict[str, Any] = self.client.get_shell_msg(timeout=30)["content"]
        return content

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


BUSY = """
import minidp, os, time
def busy(comm):
    while True:
        comm.progress(7, 9, f"<b>{os.getpid()}</b>")
        comm.barrier()
minidp.spawn(busy, 3)
"""


def test_interrupting_the_kernel_leaves_no_process(token: str) -> None:
    kernel = Kernel(token)
    try:
        kernel.client.wait_for_ready(timeout=60)
        kernel.run(BUSY)
        shown: list[Any] = []
        while len(shown) < 3:  # bars appear once and are replaced then
            said = kernel.says()
            assert said["type"] != "error", said
            assert "widgets" not in said.get("text", "")
            if "display_data" in said["type"]:
                shown.append(said)
        assert [said["type"] for said in shown] == ["display_data", "update_display_data", "update_display_data"]
        assert len({said["transient"]["display_id"] for said in shown}) == 1
        for rank in range(3):
            assert f"rank {rank} " in shown[-1]["data"]["text/plain"]
        assert "7/9" in shown[-1]["data"]["text/plain"]
        assert "&lt;b&gt;" in shown[-1]["data"]["text/html"]
        workers = {int(pid) for pid in re.findall(r"<b>(\d+)</b>", shown[-1]["data"]["text/plain"])}
        assert len(workers & set(processes(token))) == 3
        kernel.manager.interrupt_kernel()
        assert kernel.reply()["ename"] == "KeyboardInterrupt"
        assert not workers & set(processes(token)), "a worker outlived the interrupt"
        kernel.run("assert minidp.spawn(lambda comm: comm.rank, 2) == [0, 1]")
        assert kernel.reply()["status"] == "ok", "the next run works"
    finally:
        kernel.close()
