"""A thousand requests of sixteen clients: every answer arrives, whole, at who asked for it."""

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.serving.conftest import Servers
from tests.serving.running import JSON, Server
from tests.serving.test_line import wait_for

CLIENTS = 16
# A tenth leave in the middle of an answer, or before it.
KINDS = ("whole",) * 5 + ("stream",) * 4 + ("leave",)
# The engine's buffers and Python's arenas settle; an answer that is kept would be seen: a thousand
# of them, with their requests and events, are more.
GROWTH_BYTES = 24 << 20


def learn(server: Server) -> dict[str, str]:
    """Return questions and the model's answers, no two of them alike, asked one by one."""
    answers: dict[str, str] = {}
    cities = ("France", "Japan", "Italy", "Spain", "Egypt", "Peru", "Norway", "Kenya", "Cuba")
    questions = [f"What is the capital of {country}?" for country in cities]
    questions += [f"What is {number} plus 7?" for number in range(1, 40)]
    for question in questions:
        text = server.chat(question, max_tokens=24).text
        if text not in answers.values():
            answers[question] = text
    assert len(answers) >= 30
    return answers


class Client(threading.Thread):
    """Asks at random, and compares; `found` counts what happened."""

    def __init__(self, server: Server, answers: dict[str, str], count: int, seed: int) -> None:
        super().__init__()
        self._server, self._answers, self._count = server, answers, count
        self._random = random.Random(seed)
        self._link = server.connect()
        self.found: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            for _ in range(self._count):
                question = self._random.choice(list(self._answers))
                kind = self._random.choice(KINDS)
                while not self._ask(question, kind):
                    self.found["busy"] += 1
                    time.sleep(self._random.uniform(0.01, 0.05))
                self.found[kind] += 1
        except Exception as error:
            self.wrong.append(f"lost: {error!r}")
        finally:
            self._link.close()

    def _ask(self, question: str, kind: str) -> bool:
        """Ask once; False when the line is full."""
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24}
        body["stream"] = kind == "stream" or (kind == "leave" and self._random.random() < 0.5)
        if kind == "leave":
            self._leave(body)
            return True
        link = self._link if self._random.random() < 0.7 else None
        reply = self._server.ask("POST", "/v1/chat/completions", body, connection=link)
        if reply.status == 429:
            return False
        text = reply.streamed_text if kind == "stream" else reply.text
        if text != self._answers[question]:
            self.wrong.append(f"{question} {text}")
        return True

    def _leave(self, body: dict[str, object]) -> None:
        link = self._server.connect()
        link.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        time.sleep(self._random.uniform(0, 0.02))
        if body["stream"] and self._random.random() < 0.5:
            link.getresponse().read(1)
        link.close()


def survey(server: Server) -> dict[str, int]:
    """Threads, open files and memory of the server's process, when no client is connected."""
    assert wait_for(lambda: server.measure("connections") == 1)
    process = Path(f"/proc/{server.process.pid}")
    status = process.joinpath("status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "threads": int(values["Threads"]),
        "files": len(list(process.joinpath("fd").iterdir())),
        "bytes": int(values["VmRSS"].split()[0]) * 1024,
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(("kind", "requests"), [("onnx", 1000), ("gguf", 160)])
def test_soak(servers: Servers, kind: str, requests: int) -> None:
    server = servers[kind]
    answers = learn(server)
    run_clients(server, answers, requests // 8)  # until what only grows once has grown
    before = survey(server)
    ended = {end: server.measure("answers_total", end=end) for end in ("stop", "failed", "refused")}
    found = run_clients(server, answers, requests)
    after = survey(server)

    assert sum(found[one] for one in ("whole", "stream", "leave")) >= requests - CLIENTS
    assert min(found[one] for one in ("whole", "stream", "leave", "busy")) > 0
    # No answer was made that nobody got, but for those who left.
    stopped = server.measure("answers_total", end="stop") - ended["stop"]
    assert 0 <= stopped - found["whole"] - found["stream"] <= found["leave"]
    assert server.measure("answers_total", end="failed") == ended["failed"]
    assert server.measure("queue_depth") == 0
    # The engines' own pools may still grow; what leaks, leaks with every request.
    assert after["threads"] <= before["threads"] + 4
    assert after["files"] <= before["files"] + 4
    assert after["bytes"] - before["bytes"] < GROWTH_BYTES
    assert {question: server.chat(question).text for question in list(answers)[:5]} == {
        question: answers[question] for question in list(answers)[:5]
    }


def run_clients(server: Server, answers: dict[str, str], requests: int) -> Counter[str]:
    clients = [Client(server, answers, requests // CLIENTS, seed) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(300)
    assert not [one for client in clients for one in client.wrong]
    return sum((client.found for client in clients), Counter())
