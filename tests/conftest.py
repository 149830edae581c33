from __future__ import annotations

import contextlib
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fork_source import ADDRESS_VARIABLE, running_source
from progress import Progress

from perfedavg.machine.cores import usable_cores

if TYPE_CHECKING:
    from helpers import Launched

MAX_WORKERS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # what pytest-xdist gives its workers, which show nothing
        config.pluginmanager.register(Progress(config))
        source = contextlib.ExitStack()
        os.environ[ADDRESS_VARIABLE] = source.enter_context(running_source())
        config.add_cleanup(source.close)
        if config.getoption("numprocesses", None):
            return  # this process runs no test, and so needs nothing of what takes seconds to import
    import hypothesis

    from compat import import_fedlab

    gc.disable()  # until all is imported, most of which lives as long as the process
    import_fedlab("fedlab.core")  # some tests import fedlab by themselves
    # The same examples each time, but with --slow, where what fails is printed with what repeats it; and no limit of
    # time, which a busy machine would exceed.
    is_slow = config.getoption("--slow")
    hypothesis.settings.register_profile(
        "suite",
        deadline=None,
        derandomize=not is_slow,
        print_blob=is_slow,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: processes that run tests. Two more than cores, because many tests wait for what takes its time."""
    return min(MAX_WORKERS, usable_cores() + 2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is slow, and keep the tests of a module that share a run or the like in one process."""
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        definitions = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
        if any(fixture.scope == "module" for defined in definitions for fixture in defined):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish() -> None:
    """The collector need not visit what has been imported: it runs in many tests, and pytest runs it five times."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _reproducible_kernels() -> None:
    """The tests compute as the entry points do."""
    from perfedavg.training.compute import use_reproducible_kernels

    use_reproducible_kernels()


@pytest.fixture
def launched() -> Iterator[Launched]:
    """Starts real processes; whatever still runs when the test ends is killed, by process id."""
    from helpers import Launched

    with Launched() as processes:
        yield processes


def _root_with(folder: str) -> Path:
    """The folder of the data sets. The test is skipped where this one is not in it."""
    root = Path(os.environ.get("PERFEDAVG_DATA", "datasets/data"))
    if not (root / folder).is_dir():
        pytest.skip(f"there is no {root / folder}; name the folder of the real data sets in PERFEDAVG_DATA")
    return root


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of a server and its workers."""
    from multi_process.transport.keys import make_keys

    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder of the real MNIST."""
    return _root_with("MNIST/raw")


@pytest.fixture(scope="session")
def fashion_and_plays_root() -> Path:
    """The folder of the real Fashion-MNIST and of Shakespeare's plays."""
    _root_with("FashionMNIST/raw")
    return _root_with("plays")


@pytest.fixture
def make_read_only() -> Iterator[Callable[[Path], None]]:
    """Makes folders read-only until the test ends, for root as well, by mounting them over themselves."""
    with contextlib.ExitStack() as undo:

        def make(folder: Path) -> None:
            for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
                mounted = subprocess.run(["mount", *options], capture_output=True)
                if mounted.returncode != 0:
                    pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
                if options[0] == "--bind":
                    undo.callback(subprocess.run, ["umount", "--lazy", folder], check=True)

        yield make
