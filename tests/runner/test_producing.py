"""The thread that works for an engine."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from toolkit.runner.engines._producing import Producer, Put
from toolkit.runner.failure import Failure


@pytest.fixture
def producer() -> Iterator[Producer[int]]:
    with closing(Producer[int]("the engine")) as producer:
        yield producer


def test_everything_is_done_in_one_thread(producer: Producer[int]) -> None:
    threads = [producer.call(threading.get_ident)]

    def work(put: Put[int]) -> None:
        put(threading.get_ident())

    threads += [*producer.produce(work), *producer.produce(work)]
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_closing_waits_for_the_work_to_end(producer: Producer[int]) -> None:
    is_over = threading.Event()

    def work(put: Put[int]) -> None:
        while put(1):
            pass
        threading.Event().wait(0.2)  # what an engine needs to notice
        is_over.set()

    stream = producer.produce(work)
    assert next(stream) == 1
    stream.close()
    assert is_over.is_set()


def test_what_goes_wrong_is_told_and_ends_nothing_else(producer: Producer[int]) -> None:
    def fail(put: Put[int]) -> None:
        put(1)
        raise RuntimeError("out of memory")

    stream = producer.produce(fail)
    assert next(stream) == 1
    with pytest.raises(Failure, match="the engine failed: out of memory"):
        next(stream)
    with pytest.raises(KeyError):
        producer.call(lambda: {}["missing"])
    assert producer.call(lambda: 2) == 2
