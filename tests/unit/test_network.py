"""Joining: a worker must tell a server that is not quite ready from something that is no server."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from multi_process import network
from multi_process.network import interface_towards


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_server_that_has_just_begun_to_listen_is_waited_for(store: TCPStore) -> None:
    timer = threading.Timer(0.5, store.set, (network._HELLO, "{}"))
    timer.start()
    assert network._open_store(("127.0.0.1", store.port)).get(network._HELLO) == b"{}"
    timer.join()


def test_a_store_of_another_program_is_no_server(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "STORE_TIMEOUT", timedelta(seconds=0.5))
    with pytest.raises(ConnectionError, match="is not a server of this project"):
        network._open_store(("127.0.0.1", store.port))


def test_the_interface_is_the_one_that_the_route_takes() -> None:
    loopback = interface_towards(("127.0.0.1", 1))
    assert "127.0.0.1" in {entry.address for entry in psutil.net_if_addrs()[loopback]}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert interface_towards(("localhost", listener.getsockname()[1])) == loopback


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match=r"--ip no\.such\.host\.invalid is neither"):
        interface_towards(("no.such.host.invalid", 1))
