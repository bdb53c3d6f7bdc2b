"""The numbers of a log step as text: how each is called and formatted, and all as one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fastmoco_pipelines.text import shown


def clock(seconds: float) -> str:
    """A duration as `1d 02:03:04`, below a day as `2:03:04`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
    )


Column = tuple[str, str, str, Callable[[float], str]]
"""Key of the row, short label in a line, long label in the table, format."""
COLUMNS: tuple[Column, ...] = (
    ("epoch", "epoch", "epoch", "{:.1f}".format),
    ("loss", "loss", "loss", "{:.3f}".format),
    ("lr", "lr", "learning rate", "{:.1e}".format),
    ("ema_momentum", "m", "EMA momentum", "{:.4f}".format),
    ("images_per_s", "img/s", "images/s", "{:.0f}".format),
    ("wait_share", "wait", "wait for data", "{:.1%}".format),
    ("quarantined", "left out", "images left out", "{:.0f}".format),
    ("eta_s", "eta", "time left", clock),
)


def columns_of(figures: Mapping[str, str]) -> list[Column]:
    """Those of every run, and one for each accuracy: metric name -> label."""
    return [*COLUMNS, *((name, name, label, "{:.1%}".format) for name, label in figures.items())]


def shown_value(row: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str | None:
    """A value of a row by its format; None without one, and as it is where it is no finite number."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value):
        return form(value)
    return shown(str(value), keep="\n")


def plain_line(row: Mapping[str, Any], total_steps: int, figures: Mapping[str, str]) -> str:
    """One log line, e.g.
    `step 120/2000 epoch 3.2 loss 3.412 lr 1.5e-04 m 0.9931 img/s 1842 eta 0:01:12`.

    Args:
        row: `step` and any of epoch, loss, lr, ema_momentum, images_per_s, wait_share (share),
            eta_s (seconds), and accuracies (shares). Other keys are ignored.
        total_steps: steps of the whole run.
        figures: metric name -> label of the accuracies.
    """
    parts = [f"step {row.get('step', '?')}/{total_steps}"]
    for key, label, _, form in columns_of(figures):
        text = shown_value(row, key, form)
        if text is not None:
            parts.append(f"{label} {text}")
    return " ".join(parts)
