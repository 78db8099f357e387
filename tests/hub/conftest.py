"""A Hub on this machine (`local_hub.py`), and the client of this process pointed at it."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.hub.local_hub import LocalHub

TOKEN = "hf_never_to_be_seen"


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """The server. The client has an empty cache and knows the token; what it read from the environment is replaced."""
    with LocalHub(token=TOKEN) as hub:
        settings = {
            "ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")),
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()
