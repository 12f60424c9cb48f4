"""The Hub is asked once whether it can be reached, instead of being retried for half a minute."""

import socket

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from adderkit.convert.hub import reachable_hub


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def use(error=None):
    """Return whether only cached files are used inside the context, which may end with an error."""
    with reachable_hub():
        if error is not None:
            raise error
        return constants.HF_HUB_OFFLINE


def test_a_hub_that_cannot_be_reached(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert use()
    with pytest.raises(ConnectionError, match=f"cannot reach {address}: "):
        use(LocalEntryNotFoundError("not cached"))
    with pytest.raises(KeyError):
        use(KeyError())
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert not use()
    with pytest.raises(LocalEntryNotFoundError):
        use(LocalEntryNotFoundError("not there"))
    assert len(hub.requests) == 2


def test_an_offline_user_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert use()
    assert constants.HF_HUB_OFFLINE
