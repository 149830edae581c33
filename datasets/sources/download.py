"""Downloads: a file from the first of its addresses that delivers it whole."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import sleep

from datasets.storage import tell

PAUSES_SECONDS = (1.0, 2.0, 4.0)
"""Before the second attempt and each one after it; an attempt tries every address once."""

SILENCE_SECONDS = 60.0
"""A server that sends nothing for so long has failed."""


@contextlib.contextmanager
def incoming_folder(place: Path, name: str) -> Iterator[Path]:
    """An empty folder, `.<name>-incoming`, that is renamed once all is in it, so that nothing half-written is taken for
    data. What is left of it when the block ends is removed; so is what a process that was killed had left.
    """
    folder = place / f".{name}-incoming"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def download(urls: Sequence[str], md5: str, folder: Path) -> Path:
    """The file with that MD5, in the folder, under the name that ends the first address.

    A file is there whole or not at all. Raises OSError, saying the last failure, when the attempts are used up.
    """
    import pooch  # here, because it takes a third of a second, and few runs download

    pooch.get_logger().setLevel("ERROR")  # it would print each address
    progressbar = sys.stderr is not None and sys.stderr.isatty()
    # Servers may unpack a .gz on its way to those who accept that, and its MD5 would be another.
    transfer = pooch.HTTPDownloader(progressbar, timeout=SILENCE_SECONDS, headers={"Accept-Encoding": "identity"})
    name = urls[0].rpartition("/")[2]
    failure = ""
    for pause in (0.0, *PAUSES_SECONDS):
        if pause:
            tell(f"{failure}; trying again in {pause:g} s")
            sleep(pause)
        for url in urls:
            try:
                return Path(pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=transfer))
            except (OSError, ValueError) as error:  # requests' errors, or another MD5
                failure = f"{url}: {' '.join(str(error).split())}"
    raise OSError(failure)
