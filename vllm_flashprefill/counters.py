"""Counters of what was sparse, what was dense and why, readable from every process of an engine.

Each process that runs attention keeps its counters in a memory-mapped file of ``FLASHPREFILL_STATS_DIR``,
which the process that starts an engine creates and the engine's own inherit; `read_stats` sums the files.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import multiprocessing.util
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from vllm_flashprefill.config import ENV_STATS_DIR, log_interval
from vllm_flashprefill.routing import DenseReason

# Under vLLM's own logger, so that its handlers and levels apply.
logger = logging.getLogger("vllm.flashprefill")

_FIELDS = ("sparse_tokens", "kept_blocks", "visible_blocks", "selection_seconds", "attention_seconds")
_REASONS = tuple(DenseReason)
_PLACE = {reason: len(_FIELDS) + n for n, reason in enumerate(_REASONS)}
_NUM_COUNTERS = len(_FIELDS) + len(_REASONS)


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the attention layers did. Tokens are counted once in each attention layer they pass.

    Attributes:
        sparse_tokens: prefill tokens attended sparsely.
        dense_tokens: tokens that took vLLM's own path, by reason.
        kept_blocks: key blocks that sparse queries attended to, over query blocks, heads and layers.
        visible_blocks: key blocks that the same queries could have attended to.
        selection_seconds, attention_seconds: time in stages 1 to 3, and in stage 4; on a GPU an estimate, see
            `vllm_flashprefill.backend.stage_times`.
    """

    sparse_tokens: int = 0
    dense_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    kept_blocks: int = 0
    visible_blocks: int = 0
    selection_seconds: float = 0.0
    attention_seconds: float = 0.0

    @property
    def density(self) -> float | None:
        """kept_blocks / visible_blocks; None where nothing was sparse."""
        return self.kept_blocks / self.visible_blocks if self.visible_blocks else None

    def __sub__(self, earlier: Stats) -> Stats:
        dense = {name: n - earlier.dense_tokens.get(name, 0) for name, n in self.dense_tokens.items()}
        return Stats(
            dense_tokens={name: n for name, n in dense.items() if n},
            **{name: getattr(self, name) - getattr(earlier, name) for name in _FIELDS},
        )

    def __str__(self) -> str:
        dense = sum(self.dense_tokens.values())
        share = self.sparse_tokens / max(1, self.sparse_tokens + dense)
        density = "-" if self.density is None else f"{self.density:.1%}"
        reasons = ", ".join(f"{name} {n}" for name, n in sorted(self.dense_tokens.items(), key=lambda x: -x[1]))
        seconds = ""
        if self.attention_seconds:
            seconds = f"selection {self.selection_seconds:.2f} s, attention {self.attention_seconds:.2f} s, "
        return (
            f"density {density}, sparse {share:.1%} of {self.sparse_tokens + dense} layer-tokens, "
            f"{seconds}dense: {reasons or 'none'}"
        )


class StatsRecorder:
    """The counters of this process; logs them at intervals where ``FLASHPREFILL_LOG_STATS`` asks for it.

    Attributes:
        is_shared: whether other processes can read them.
        file: (name, inode) of the file that they are in; None where they are not shared.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        directory = os.environ.get(ENV_STATS_DIR)
        self._counters: np.ndarray | None = None
        trouble: str | Exception | None = None
        self.file: tuple[str, int] | None = None
        if directory:
            path = Path(directory) / f"{os.getpid()}.f64"
            try:
                self._counters = _mapped_counters(path)
                self.file = path.name, path.stat().st_ino
            except (OSError, ValueError) as error:
                trouble = error
        elif multiprocessing.parent_process() is not None:
            trouble = f"{ENV_STATS_DIR} was not set when it was started"
        if trouble is not None:
            logger.warning(
                "FlashPrefill: no file for the counters of process %d (%s); its log has them, /metrics and the "
                "stats() of other processes do not",
                os.getpid(),
                trouble,
            )
        self.is_shared = self._counters is not None
        if self._counters is None:
            self._counters = np.zeros(_NUM_COUNTERS)
        # Every layer of every step adds to it: a number in a memoryview costs half of one in an array.
        self._cells = memoryview(self._counters)
        self._log_interval = log_interval()
        self._logged_at = time.monotonic()
        self._logged = _to_stats(self._counters)
        if self._log_interval is not None:
            atexit.register(self._log)

    def add_sparse(self, tokens: int, kept_blocks: int, visible_blocks: int, selection: float, attention: float):
        with self._lock:
            for place, number in enumerate((tokens, kept_blocks, visible_blocks, selection, attention)):
                if number:
                    self._cells[place] += number

    def add_dense(self, reason: DenseReason, tokens: int) -> None:
        self._cells[_PLACE[reason]] += tokens

    def step_done(self) -> None:
        """Log what happened since the last line, if the interval has passed."""
        if self._log_interval is not None and time.monotonic() - self._logged_at >= self._log_interval:
            self._log()

    def _log(self) -> None:
        now = _to_stats(self._counters)
        if now != self._logged:
            logger.info("FlashPrefill: %s", now - self._logged)
        self._logged, self._logged_at = now, time.monotonic()


_recorder: StatsRecorder | None = None


def recorder() -> StatsRecorder:
    """This process's recorder, made on first use (a forked child makes its own)."""
    global _recorder
    if _recorder is None:
        _recorder = StatsRecorder()
    return _recorder


def _forget_recorder() -> None:
    global _recorder
    _recorder = None


os.register_at_fork(after_in_child=_forget_recorder)


def read_stats() -> Stats:
    """The sum over all processes of this one's engines, since the first of them was started."""
    total = np.zeros(_NUM_COUNTERS)
    directory = os.environ.get(ENV_STATS_DIR)
    for path in _files(directory) if directory else ():
        # What goes meanwhile is a server's that has ended.
        with contextlib.suppress(OSError):
            counters = path.read_bytes()
            if len(counters) == total.nbytes:
                total += np.frombuffer(counters)
    if _recorder is not None and not _recorder.is_shared:
        total += _recorder._counters
    return _to_stats(total)


def _files(directory: str) -> list[Path]:
    try:
        return [Path(directory, name) for name in os.listdir(directory) if name.endswith(".f64")]
    except OSError:
        return []


# (process, folder) that `share_stats` made last.
_made: tuple[int, str] | None = None
# How vLLM names the processes that belong to an engine of the one that starts them by multiprocessing.
OF_PARENTS_ENGINE = ("ApiServer_", "EngineCore", "VllmWorker", "VLLM_DP_Coordinator")


def share_stats() -> None:
    """Have a folder for the counters of an engine that this process is about to start; it goes when this process ends.

    A folder that this process made is kept, and so is that of the parent of one of vLLM's own processes, such as its
    API servers. Any other in the environment is another server's, or a launcher's that may have ended.
    """
    global _made
    directory = os.environ.get(ENV_STATS_DIR)
    is_ours = _made == (os.getpid(), directory) or of_parents_engine()
    if directory and is_ours and os.path.isdir(directory):
        return
    os.environ.pop(ENV_STATS_DIR, None)
    try:
        directory = tempfile.mkdtemp(prefix="flashprefill-stats-")
    except OSError as error:
        _warn_no_folder(str(error))
        return
    os.environ[ENV_STATS_DIR] = directory
    _made = os.getpid(), directory
    # Of this process alone, after its children. A forked multiprocessing child ends without what atexit was given.
    multiprocessing.util.Finalize(None, shutil.rmtree, (directory, True), exitpriority=-100)


@functools.cache
def _warn_no_folder(error: str) -> None:
    logger.warning("FlashPrefill: no folder for counters (%s); what other processes count is in their logs", error)


def of_parents_engine() -> bool:
    """Whether this process is one that vLLM has started for its parent's engine."""
    return multiprocessing.current_process().name.startswith(OF_PARENTS_ENGINE)


def unshare_stats() -> None:
    """Forget the folder of the counters and this process's recorder."""
    _forget_recorder()
    os.environ.pop(ENV_STATS_DIR, None)


def _mapped_counters(path: Path) -> np.ndarray:
    """Counters in a file; those of a process that is gone and had this one's number are part of the sum and go on.

    Raises:
        OSError, ValueError: there is no such folder, no room in it, no writing to it, or no mapping of its files.
    """
    num_bytes = 8 * _NUM_COUNTERS
    if not path.exists() or path.stat().st_size != num_bytes:
        # Written, not left a hole: on a full disk a hole is a signal at the first addition, in a layer.
        path.write_bytes(bytes(num_bytes))
    return np.memmap(path, dtype=np.float64, mode="r+", shape=_NUM_COUNTERS).view(np.ndarray)


def _to_stats(counters: np.ndarray) -> Stats:
    values = counters.tolist()
    fields = dict(zip(_FIELDS, values[: len(_FIELDS)], strict=True))
    dense = dict(zip((reason.value for reason in _REASONS), values[len(_FIELDS) :], strict=True))
    return Stats(
        sparse_tokens=int(fields["sparse_tokens"]),
        dense_tokens={name: int(n) for name, n in dense.items() if n},
        kept_blocks=int(fields["kept_blocks"]),
        visible_blocks=int(fields["visible_blocks"]),
        selection_seconds=fields["selection_seconds"],
        attention_seconds=fields["attention_seconds"],
    )
