"""The contract at /openapi.json against the server: generated requests, good ones and bad ones, and every answer held
against what the contract says of it. A server that breaks it is found by the same run."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from funnelrec.serve.app import Settings, create_app
from funnelrec.serve.gate import Gate
from funnelrec.serve.live import Live
from serve.funnels import small_dataset, small_funnel
from serve.test_server import report

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies, at import
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shop")
    return small_funnel(small_dataset(place / "data")).save(place / "shop.funnel")


def application(folder: Path) -> Gate:
    live = Live(folder)
    live.swap(live.load())
    return create_app(live, Settings())


def check(app: Gate, examples: int) -> tuple[Counter[int], list[str]]:
    """Statuses of up to `examples` good and as many bad requests to each path, and what broke the contract."""
    statuses: Counter[int] = Counter()
    broken: list[str] = []
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        for mode in MODES:
            _ask(found.ok(), mode, examples, statuses, broken)
    return statuses, broken


def _ask(operation: Any, mode: GenerationMode, examples: int, statuses: Counter[int], broken: list[str]) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def run(case: Any) -> None:
        answer = case.call()
        statuses[answer.status_code] += 1
        # 422 says that this funnel has no such field or value, which no schema can know.
        unless = [positive_data_acceptance] if answer.status_code == 422 else []
        try:
            case.validate_response(answer, excluded_checks=unless)
        except BaseExceptionGroup as group:
            broken.extend(f"{operation.label} {mode.value} {answer.status_code}: {e}" for e in group.exceptions)

    with suppress(Unsatisfiable):  # nothing can be wrong about a path that takes nothing
        run()


def test_a_few_generated_requests_keep_the_contract(folder: Path) -> None:
    statuses, broken = check(application(folder), examples=4)
    assert broken == [] and sum(statuses.values()) > 60 and statuses[200] and statuses[400] and statuses[404]


def test_a_server_that_breaks_the_contract_is_found(folder: Path) -> None:
    app = application(folder)
    loaded = app.app.state.shop.live.current  # type: ignore[attr-defined]
    card = loaded.card
    loaded.card = lambda: card() | {"metrics": None}
    loaded.find_users = lambda query, limit: 1 // 0
    _, broken = check(app, examples=2)
    assert any("GET /v1/funnel" in b for b in broken) and any("Server error" in b for b in broken)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_generated_requests_keep_the_contract(folder: Path) -> None:
    statuses, broken = check(application(folder), examples=160)
    cases = sum(statuses.values())
    report("schemathesis", cases=cases, statuses={str(s): n for s, n in sorted(statuses.items())}, broken=len(broken))
    assert broken == [] and cases >= 2_000 and not [s for s in statuses if s >= 500]
