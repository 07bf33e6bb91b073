"""`--profile NAME`: where prefill and decoding spend time and memory, in `outputs/NAME/`.

Prefill is traced whole, decoding for a few steps after a few more to warm up, so that a long run makes
no giant file. Profiling looks on; it changes nothing that is generated.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cli.options import require_name
from common.errors import UserError
from common.files import replaced_whole, require_writable, write_whole
from common.messages import say
from common.program import interrupt_deferred

WARM_STEPS = 2
TRACED_STEPS = 8
TABLE_ROWS = 40


def new_folder(path: Path) -> Path:
    """A folder of this run alone: `path`, or path-2, path-3, ... where an earlier run, or one that goes on at the same
    time, has taken it. Raises UserError.
    """
    for n in itertools.count(1):
        folder = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--profile {path.name}: {error.strerror}: {folder}") from None
        if n > 1:
            say(f"{path}/ holds another profile: this one goes to {folder}/")
        return folder
    raise AssertionError


class Profiler:
    """Given to an engine as its `hook`; `write` then puts the report beside the traces."""

    def __init__(self, name: str, device: torch.device, outputs: Path = Path("outputs")) -> None:
        require_name(name)
        self.folder = new_folder(outputs / name)
        require_writable(self.folder / "report.json", "--profile")
        self.device = device
        self.phase = ""
        self.profile: profile | None = None
        self.n_step = 0
        self.written: list[str] = []
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def hook(self, event: str) -> None:
        """The engine's events: "prefill", "decode", "step" after each step, "end". The first run counts.

        A Ctrl-C waits while the profiler starts or writes: in the middle of that it crashed the interpreter.
        """
        with interrupt_deferred():
            self._take(event)

    def _take(self, event: str) -> None:
        if event == "prefill" and not self.written:
            self._begin("prefill")
        elif event == "decode":
            self._finish()
        elif event == "step" and "decode_trace.json" not in self.written:
            self.n_step += 1
            if self.n_step == WARM_STEPS:
                self._begin("decode")
            elif self.n_step == WARM_STEPS + TRACED_STEPS:
                self._finish()
        elif event == "end":
            self._finish()

    def _begin(self, phase: str) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.phase = phase
        self.profile = profile(
            activities=activities, record_shapes=True, profile_memory=True, with_flops=True, acc_events=True
        )
        self.profile.start()

    def _finish(self) -> None:
        if self.profile is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.profile.stop()
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self.profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
        write_whole(self.folder / f"{self.phase}_summary.txt", table + "\n")
        with replaced_whole(self.folder / f"{self.phase}_trace.json") as part:
            self.profile.export_chrome_trace(str(part))
        self.written += [f"{self.phase}_summary.txt", f"{self.phase}_trace.json"]
        self.profile = None

    def write(self, report: dict[str, Any]) -> list[str]:
        """Write what is left, and return lines that say where everything is and what opens it."""
        self._finish()
        write_whole(self.folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        lines = [
            "the times above include the profiler's own",
            f"profile in {self.folder}/: {', '.join([*self.written, 'report.json'])}",
            "  traces open in https://ui.perfetto.dev or chrome://tracing; summaries are text",
        ]
        if self.device.type == "cuda":
            with replaced_whole(self.folder / "memory_snapshot.pickle") as part:
                torch.cuda.memory._dump_snapshot(str(part))
            torch.cuda.memory._record_memory_history(enabled=None)
            lines.append("  memory_snapshot.pickle opens in https://pytorch.org/memory_viz")
        return lines
