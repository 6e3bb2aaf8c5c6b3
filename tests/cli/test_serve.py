"""`funnelrec serve`: what would open the server to strangers unasked is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from funnelrec.cli import serve as words
from funnelrec.cli.app import run
from funnelrec.serve.gate import LOOPBACK
from funnelrec.serve.server import allowed_hosts, is_loopback


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the server would have been started with."""
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(words, "serve", lambda *given: started.append(given))
    return started


def test_loopback_is_the_default_and_its_names_the_only_ones(served: list[tuple[Any, ...]]) -> None:
    assert run(["serve", "shop.funnel", "--queue", "3", "--allow-host", "Shop.Example"]) == 0
    folder, settings, place = served[0]
    assert (folder, place.host, place.port, settings.queue) == (Path("shop.funnel"), "127.0.0.1", 8000, 3)
    assert settings.hosts == LOOPBACK | {"shop.example"} and settings.token is None and not settings.may_reload
    assert settings.threads >= 1


def test_others_are_let_in_with_a_token_or_on_purpose(
    served: list[tuple[Any, ...]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["serve", "shop.funnel", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 lets others in, and there is no token" in capfd.readouterr().err
    assert run(["serve", "shop.funnel", "--token-env", "SHOP_TOKEN"]) == 2
    assert "SHOP_TOKEN must hold a token of 8 characters or more" in capfd.readouterr().err
    monkeypatch.setenv("SHOP_TOKEN", "open-sesame-12")
    assert run(["serve", "shop.funnel", "--host", "0.0.0.0", "--token-env", "SHOP_TOKEN"]) == 0
    assert run(["serve", "shop.funnel", "--host", "0.0.0.0", "--insecure"]) == 0
    assert [given[1].token for given in served] == ["open-sesame-12", None]
    assert served[0][1].hosts is None


def test_a_folder_that_is_no_funnel_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "is not a funnel: it has no funnel.json" in capfd.readouterr().err


def test_names() -> None:
    assert is_loopback("127.0.0.9") and is_loopback("::1") and not is_loopback("0.0.0.0")
    assert allowed_hosts("10.0.0.1", ["Shop.example"]) == {"shop.example"} and allowed_hosts("10.0.0.1", []) is None
