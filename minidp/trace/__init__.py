"""What happened when: recorders, spans, and Chrome traces of all ranks."""

from minidp.trace.chrome import write_chrome
from minidp.trace.recorder import Event, Recorder, current, recording, span

__all__ = ["Event", "Recorder", "current", "recording", "span", "write_chrome"]
