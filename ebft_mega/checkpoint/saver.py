"""Asynchronous saving: a thread of each rank writes while training continues; rank 0 commits when all have written.

The main threads of all ranks begin a checkpoint together (the copy to host memory, collective) and later settle it
together: rank 0 writes index and manifest and calls `commit.publish`. In between a thread of each rank writes and
hashes that rank's files and communicates with nobody. A checkpoint that is never settled leaves a `.tmp` folder, which
readers ignore.
"""

import logging
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ebft_mega.checkpoint.commit import discard, point_latest, publish, temporary_folder
from ebft_mega.checkpoint.manifest import FileRecord, Manifest, write_file, write_manifest
from ebft_mega.checkpoint.retention import delete_expired
from ebft_mega.checkpoint.snapshot import StateShard, Written, take_snapshot, write_state_shards
from ebft_mega.checkpoint.tensor_index import (
    INDEX_NAME,
    STATE_BYTES,
    coverage_problems,
    merge_indices,
)
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.zero import ZeroEngine
from ebft_mega.runtime.exchange import broadcast_value, gather_values

logger = logging.getLogger(__name__)

# Beside the tensors: state, configuration, indices, tokenizer.
SMALL_FILES_BYTES = 64 * 2**20
LONGEST_CLEANING_SECONDS = 60.0  # that the end of a run waits for the deletion of old checkpoints


@dataclass(frozen=True)
class Outcome:
    """The result of saving a checkpoint, the same on every rank."""

    step: int
    error: str | None  # why it was not committed; None: it is complete
    num_bytes: int = 0
    seconds: float = 0.0  # from `begin` to the commit, during which training continued


@dataclass
class _InFlight:
    """A checkpoint that has begun and is not settled."""

    step: int
    folder: Path
    started: float
    thread: threading.Thread | None = None
    written: Written | None = None
    error: str | None = None
    written_bytes: int = 0  # of tensors, so far


class CheckpointSaver:
    """Save the checkpoints of one run; `begin` starts one, `settle` commits it.

    Args:
        root: the folder `checkpoints` of the run directory, which all ranks see.
        groups: of this rank.
        keep_last, keep_every: see `retention.expired`.
    """

    def __init__(self, root: Path, groups: ProcessGroups, keep_last: int | None, keep_every: int | None):
        self._root, self._groups = root, groups
        self._keep_last, self._keep_every = keep_last, keep_every
        self._in_flight: _InFlight | None = None
        self._cleaning: threading.Thread | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint has begun that is not settled, the same on every rank."""
        return self._in_flight is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still writing."""
        flying = self._in_flight
        return flying is not None and flying.thread is not None and flying.thread.is_alive()

    @property
    def written_bytes(self) -> int:
        """Bytes of tensors that this rank's thread has written so far."""
        return 0 if self._in_flight is None else self._in_flight.written_bytes

    def wait(self, seconds: float) -> None:
        """Wait for this rank's thread, at most `seconds`. Communication: none."""
        if self._in_flight is not None and self._in_flight.thread is not None:
            self._in_flight.thread.join(seconds)

    def begin(
        self,
        step: int,
        engine: ZeroEngine,
        stage: Stage,
        small_files: Mapping[str, bytes],
        others: Sequence[StateShard] = (),
        others_bytes: int = 0,
    ) -> Outcome | None:
        """Copy everything to host memory and let a thread write it.

        Args:
            step: optimizer steps done.
            small_files: contents by name of the files beside the tensors, written by the first rank.
            others: this rank's shards of state that is neither the stage's nor its optimizer's.
            others_bytes: size of those of all ranks.
        Returns:
            The failure, if there is no room for the checkpoint on the disk; else None.
        Communication: that of `take_snapshot`, and one broadcast of a text. A checkpoint in flight must have been
            settled.
        """
        assert self._in_flight is None, "the next checkpoint waits for the last one"
        needed = stage.architecture.num_parameters * STATE_BYTES * len(engine.state_kinds) + SMALL_FILES_BYTES
        needed += sum(map(len, small_files.values())) + others_bytes
        flying = _InFlight(step, temporary_folder(self._root, step), time.monotonic())
        obstacle = broadcast_value(self._obstacle(flying.folder, needed) if self._groups.is_world_first else None)
        if obstacle is not None:
            return Outcome(step, obstacle)
        shards = (*take_snapshot(engine, stage), *others)
        flying.thread = threading.Thread(
            target=self._write, args=(flying, shards, small_files), name=f"checkpoint-{step}", daemon=True
        )
        self._in_flight = flying
        flying.thread.start()
        return None

    def settle(self) -> Outcome | None:
        """Wait until every rank has written its files, and commit the checkpoint if all of them succeeded.

        Returns:
            Its outcome, the same on every rank; None if none was in flight.
        Communication: one gathering of what was written, one broadcast of the outcome; when it returns, the commit has
            happened or never will.
        """
        flying = self._in_flight
        if flying is None:
            return None
        assert flying.thread is not None, "it was started"
        flying.thread.join()
        own = flying.error if flying.written is None else flying.written
        parts: list[Written | str | None] | None = gather_values(own, kinds=(Written,))
        outcome = broadcast_value(None if parts is None else self._committed(flying, parts), kinds=(Outcome,))
        self._in_flight = None
        assert isinstance(outcome, Outcome), "the first rank has sent it"
        return outcome

    def finish(self) -> None:
        """Wait a while for the deletion of old checkpoints, where it runs; the next start deletes the rest."""
        if self._cleaning is not None:
            self._cleaning.join(LONGEST_CLEANING_SECONDS)

    def _obstacle(self, folder: Path, needed_bytes: int) -> str | None:
        """Make room for a checkpoint's folder, on the first rank; return why that cannot be, None if it can."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if folder.exists() and (warnings := discard(folder)):
                return "; ".join(warnings)
            free = shutil.disk_usage(self._root).free
        except OSError as error:
            return f"{self._root}: {error}"
        if free < needed_bytes:
            sizes = f"{needed_bytes / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free"
            return f"no room on the disk of {self._root}: {sizes}"
        return None

    def _write(self, flying: _InFlight, shards: tuple[StateShard, ...], small_files: Mapping[str, bytes]) -> None:
        """Write this rank's files; runs in a thread."""
        try:
            files: dict[str, FileRecord] = {}
            if self._groups.is_world_first:
                for name, content in small_files.items():
                    files[name] = write_file(flying.folder, name, content)

            def count(num_bytes: int) -> None:
                flying.written_bytes += num_bytes

            written = write_state_shards(flying.folder, dist.get_rank(), shards, count)
            flying.written = Written({**files, **written.files}, written.index)
        except Exception as error:  # of any kind: the other ranks have to be told
            logger.exception("writing of %s failed", flying.folder)
            flying.error = f"rank {dist.get_rank()}: {error}"

    def _committed(self, flying: _InFlight, parts: list[Written | str | None]) -> Outcome:
        """Commit a checkpoint, or remove its files if a rank failed; on the first rank."""
        written = [part for part in parts if isinstance(part, Written)]
        failures = [
            part or f"rank {rank}: its thread ended without a word"
            for rank, part in enumerate(parts)
            if not isinstance(part, Written)
        ]
        error = "; ".join(failures) or None
        num_bytes = 0
        try:
            if error is None:
                num_bytes = self._commit(flying, written)
        except Exception as problem:
            logger.exception("commit of %s failed", flying.folder)
            # Once renamed it is committed; `latest` is a hint, which the next start sets right.
            error = str(problem) if flying.folder.exists() else None
        if error is not None:
            shutil.rmtree(flying.folder, ignore_errors=True)
            return Outcome(flying.step, error)
        # A deletion still under way is not disturbed: the next one deletes whatever it leaves.
        if self._cleaning is None or not self._cleaning.is_alive():
            self._cleaning = threading.Thread(target=self._delete_expired, name="checkpoint-cleaning", daemon=True)
            self._cleaning.start()
        return Outcome(flying.step, None, num_bytes, time.monotonic() - flying.started)

    def _commit(self, flying: _InFlight, written: list[Written]) -> int:
        files = {name: record for part in written for name, record in part.files.items()}
        index = merge_indices([part.index for part in written])
        problems = coverage_problems(index, str(flying.folder))
        assert not problems, problems
        files[INDEX_NAME] = write_file(flying.folder, INDEX_NAME, index.to_json().encode())
        write_manifest(flying.folder, Manifest(version=1, step=flying.step, files=files))
        point_latest(self._root, publish(flying.folder, self._root).name)
        return sum(record.bytes for record in files.values())

    def _delete_expired(self) -> None:
        for warning in delete_expired(self._root, self._keep_last, self._keep_every):
            logger.warning("%s", warning)
