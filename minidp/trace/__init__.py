"""What happened when: recorders, spans, and the events of all ranks as text, picture or Chrome trace."""

from minidp.trace.animation import Animation, animate
from minidp.trace.canvas import COLOURS, figure
from minidp.trace.chrome import write_chrome
from minidp.trace.recorder import Event, Recorder, current, recording, span
from minidp.trace.text import as_text
from minidp.trace.timeline import plot_timeline

__all__ = [
    "COLOURS",
    "Animation",
    "Event",
    "Recorder",
    "animate",
    "as_text",
    "current",
    "figure",
    "plot_timeline",
    "recording",
    "span",
    "write_chrome",
]
