"""The README of the client runs, from its first block to its last."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.scripted import HANDLE, SECRET, Sidecar

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"


class Provider(BaseHTTPRequestHandler):
    """Answers a chat completion to the platform's key, and 401 to the user's."""

    signed_with: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        authorization = str(self.headers["Authorization"])
        self.signed_with.append(authorization)
        refused = SECRET in authorization
        body = json.dumps({"usage": {"prompt_tokens": 9, "completion_tokens": 4}}).encode()
        self.send_response(401 if refused else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def provider() -> Iterator[tuple[str, list[str]]]:
    """Where a provider's API is, and with what its requests were signed."""
    Provider.signed_with = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Provider.signed_with
        server.shutdown()
        thread.join()


def test_the_readme_runs(
    sidecar: Sidecar,
    provider: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, signed_with = provider
    monkeypatch.setenv("KEYTURN_ADDRESS", sidecar.target)
    monkeypatch.setenv("OPENAI_API_KEY", "platform")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    ticket = scripted.credits_pay()
    sidecar.answers("Decide", ticket, ticket, scripted.own_key(), ticket, ticket)

    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{README.name}, block {number}", "exec"), namespace)  # noqa: S102

    assert len(blocks) == 6
    platform = "Bearer platform"
    assert signed_with == [platform, f"Bearer {SECRET}", platform]
    outcomes = pb.Outcome
    assert [outcomes.Name(each.outcome) for each in sidecar.calls("Record")] == [
        "OUTCOME_SUCCESS",
        "OUTCOME_NEVER_SENT",
        "OUTCOME_AUTH_REJECTED",
        "OUTCOME_SUCCESS",
        "OUTCOME_SUCCESS",
        "OUTCOME_NEVER_SENT",
    ]
    assert sidecar.calls("Record")[2].key_handle == HANDLE
    assert "1500 498500" in capsys.readouterr().out
