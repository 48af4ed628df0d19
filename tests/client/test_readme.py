"""The README of the client runs, from its first block to its last."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests.client import scripted
from tests.client.scripted import HANDLE, SECRET, Sidecar
from tests.llm_providers import playing_llm_providers, refuse

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"


async def test_the_readme_runs(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket = scripted.credits_pay()
    # The own key pays in the block about keys that the provider refuses.
    sidecar.answers("Decide", *[ticket] * 3, scripted.own_key(), ticket)
    async with playing_llm_providers() as llm:
        llm.will(SECRET, refuse)
        monkeypatch.setenv("KEYTURN_ADDRESS", sidecar.target)
        monkeypatch.setenv("OPENAI_API_KEY", "platform")
        monkeypatch.setenv("OPENAI_BASE_URL", llm.openai_url)
        blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
        await asyncio.to_thread(run, blocks)

    assert len(blocks) == 9
    assert [seen.key for seen in llm.seen] == ["platform", "platform", SECRET, "platform"]
    foreground = [(pb.Outcome.Name(each.outcome), each.key_handle) for each in sidecar.calls("Record")]
    assert foreground == [
        ("OUTCOME_SUCCESS", ""),
        ("OUTCOME_NEVER_SENT", ""),
        ("OUTCOME_AUTH_REJECTED", HANDLE),
        ("OUTCOME_SUCCESS", ""),
        ("OUTCOME_SUCCESS", ""),
        ("OUTCOME_NEVER_SENT", ""),
    ]
    background = [each for batch in sidecar.calls("BatchRecord") for each in batch.requests]
    assert [each.usage.output_tokens or each.cost_micros for each in background] == [30, 1_200, 80]
    printed = capsys.readouterr().out
    assert "1500 498500" in printed
    assert "True {'Authorization': 'Bearer ours'}" in printed


def run(blocks: list[str]) -> None:
    """Each block sees what those before it made."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{README.name}, block {number}", "exec"), namespace)  # noqa: S102
    namespace["openai"].close()  # the life of the process ends here
