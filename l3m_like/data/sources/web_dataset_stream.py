"""Webdataset tars read from front to back: files, HTTP, and the output of commands."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import IO

from l3m_like.core.errors import UserError
from l3m_like.data.paths import DataMissing, expand_braces, resolve, short_names
from l3m_like.data.sources.web_dataset import Header, key_and_extension

PIPE = "pipe:"
REMOTE = (PIPE, "http://", "https://")
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, http.client.HTTPException)  # what a connection that dies raises
GONE = (401, 403, 404, 410)  # HTTP: trying again does not help
READ_BYTES = 2**16
TIMEOUT = 60.0  # seconds without a byte


class WebDatasetStream:
    """Samples of tars, read from front to back; a shard is a tar, compressed or not. Members with one key are neighbours.

    Args:
        path: files (see ``l3m_like.data.paths.resolve``), or an ``http(s)`` URL or ``pipe:COMMAND`` that may have braces:
            ``pipe:aws s3 cp s3://bucket/train-{000..127}.tar -``.
        retries: how often in a row a URL or command that dies is opened again. What was given out is then skipped; a sample
            that is given out resets the count.
        backoff: seconds before the first of them; doubled for each next one.

    Raises (by ``shards``):
        DataMissing: no such file.
    """

    def __init__(self, path: str, retries: int = 5, backoff: float = 1.0) -> None:
        if retries < 0 or backoff < 0:
            raise UserError(f"retries is {retries} and backoff is {backoff}; neither is negative.")
        self.path = path
        self.retries = retries
        self.backoff = backoff

    def shards(self) -> list[str]:
        """The tars' names, in the order of ``path``."""
        return list(self._names)

    def open(self, shard: int, skip: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """``(SHARD#KEY, {extension: content})`` from sample number ``skip`` of the shard on.

        Raises:
            DataMissing: the server says that there is no such file. UserError: the shard cannot be read to its end, naming
                the shard and the number of the sample.
        """
        location, name = self._locations[shard], self._names[shard]
        retries = self.retries if location.startswith(REMOTE) else 0
        failures = 0
        while True:
            try:
                with (
                    _opened(location) as stream,
                    tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as tar,
                ):
                    for key, sample in _samples(tar, skip):
                        yield f"{name}#{key}", sample
                        skip, failures = skip + 1, 0
                return
            except BROKEN as error:
                if isinstance(error, urllib.error.HTTPError) and error.code in GONE:
                    raise DataMissing(self.path, f"path: {location}: {error}.") from error
                if failures == retries:
                    again = f", {retries} retries in a row" if retries else ""
                    raise UserError(f"{name}, sample {skip}: {location} cannot be read{again}: {error}.") from error
                time.sleep(self.backoff * 2**failures)
                failures += 1

    @cached_property
    def _locations(self) -> list[str]:
        """What to open, by shard."""
        if self.path.startswith(REMOTE):
            return expand_braces(self.path)
        return [str(file) for file in resolve(self.path)]

    @cached_property
    def _names(self) -> list[str]:
        if not self.path.startswith(REMOTE):
            return short_names(resolve(self.path))
        found = [re.search(r"[^\s/'\"=?&]+\.(tar(\.\w+)?|tgz)\b", location) for location in self._locations]
        names = [match[0] if match else location for match, location in zip(found, self._locations)]
        return names if len(set(names)) == len(names) else self._locations


def _samples(tar: tarfile.TarFile, skip: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: content}) from sample number ``skip`` on. A sample is complete when the next one, or the end, is seen."""
    number, key = -1, None
    sample: dict[str, bytes] = {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        names = key_and_extension(member)
        if names is None:
            continue
        name, extension = names
        if name != key:
            if key is not None and number >= skip:
                yield key, sample
            number, key, sample = number + 1, name, {}
        if number >= skip:
            content = tar.extractfile(member)
            assert content is not None  # it is a file
            sample[extension] = content.read()
    if key is not None and number >= skip:
        yield key, sample


@contextmanager
def _opened(location: str) -> Iterator[IO[bytes]]:
    if not location.startswith(PIPE):
        with urllib.request.urlopen(location, timeout=TIMEOUT) if location.startswith(REMOTE) else open(location, "rb") as stream:
            yield stream
        return
    # with a session of its own, Ctrl-C does not reach it, and its end is that of all that the shell has started
    process = subprocess.Popen(
        location.removeprefix(PIPE), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        try:
            yield process.stdout
        except BROKEN as error:
            _wait(process, error)  # its exit status says more
            raise
        _wait(process)
    finally:  # also of a reader that stops early
        process.stdout.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], cause: Exception | None = None) -> None:
    """Wait for the end of a command whose tar was read.

    Raises:
        OSError: it failed.
    """
    assert process.stdout is not None
    while process.stdout.read(READ_BYTES):  # what follows the end mark of the tar
        pass
    if process.wait():
        raise OSError(f"the command ended with status {process.returncode}") from cause
