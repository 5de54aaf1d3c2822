"""schemathesis on `/openapi.json`: whatever is sent, by the schema or against it, there is no 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from servers import Running

from dgemma.server.app import create_app
from dgemma.server.service import Service
from dgemma.server.settings import ServerSettings

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 20
DOCUMENT = schemathesis.openapi.from_dict(
    create_app(Service(ServerSettings(data_dir=Path("no such folder")))).openapi()
)
OPERATIONS = {operation.ok().label: operation.ok() for operation in DOCUMENT.get_all_operations()}
CASES = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
CASES += [(label, GenerationMode.NEGATIVE) for label, one in OPERATIONS.items() if list(one.body)]


def test_the_document_is_the_servers_own(server: Running) -> None:
    assert server.http.get("/openapi.json").json() == DOCUMENT.raw_schema
    assert set(OPERATIONS) == {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "GET /v1/responses/{response_id}",
        "DELETE /v1/responses/{response_id}",
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        "DELETE /v1/files/{file_id}",
        "POST /v1/batches",
        "GET /v1/batches",
        "GET /v1/batches/{batch_id}",
        "POST /v1/batches/{batch_id}/cancel",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /health",
    }


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_no_500(label: str, mode: Any, server: Running) -> None:
    operation = OPERATIONS[label]
    server.model.delay = 0.0
    session = requests.Session()
    taken = []

    @given(case=operation.as_strategy(mode))
    @settings(
        max_examples=EXAMPLES if operation.method == "post" else 10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        response = case.call(base_url=server.url, session=session)
        taken.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    run()
    if mode is GenerationMode.NEGATIVE:
        assert set(taken) <= {400, 415}
