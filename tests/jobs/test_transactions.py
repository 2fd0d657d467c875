"""Works on the database share transactions while one runs, and share nothing else."""

import asyncio
import sqlite3
import threading

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, select

from photogram.core.errors import Conflict, StorageFailed
from photogram.jobs.transactions import Transactions

metadata = MetaData()
numbers = Table("numbers", metadata, Column("number", Integer, primary_key=True))


@pytest.fixture
def engine(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'numbers.sqlite3'}")
    metadata.create_all(engine)
    return engine


def add(number):
    def work(connection):
        connection.execute(insert(numbers).values(number=number))
        return connection.scalars(select(numbers.c.number).order_by(numbers.c.number)).all()

    return work


class Blocked:
    """Works asked for inside wait behind one that is running, and so stand together."""

    def __init__(self, transactions):
        self._transactions = transactions
        self._open = threading.Event()

    async def __aenter__(self):
        began = threading.Event()

        def wait(connection):
            began.set()
            self._open.wait()

        self._waiting = asyncio.ensure_future(self._transactions.run(wait))
        await asyncio.to_thread(began.wait)

    async def __aexit__(self, *_):
        self._open.set()
        await self._waiting


def commits(engine):
    seen = []
    event.listen(engine, "commit", lambda connection: seen.append(connection))
    return seen


async def ask_together(transactions, works, **options):
    async with Blocked(transactions):
        asked = [asyncio.ensure_future(transactions.run(work, **options)) for work in works]
        await asyncio.sleep(0)
    return asked


def test_what_waits_shares_a_commit_and_sees_what_was_asked_for_before(engine):
    async def scenario():
        transactions = Transactions(engine)
        asked = await ask_together(transactions, [add(n) for n in (1, 2, 3)], promise=True)
        results = await asyncio.gather(*asked)
        await transactions.close()
        return results

    seen = commits(engine)
    assert asyncio.run(scenario()) == [[1], [1, 2], [1, 2, 3]]
    assert len(seen) == 2  # that of the work which held them up, and theirs


def test_a_work_that_fails_is_undone_alone(engine):
    def adds_then_fails(connection):
        add(7)(connection)
        raise ValueError("no")

    async def scenario():
        transactions = Transactions(engine)
        works = [add(1), adds_then_fails, add(1), add(2)]
        results = await asyncio.gather(*await ask_together(transactions, works), return_exceptions=True)
        left = await transactions.run(lambda connection: connection.scalars(select(numbers.c.number)).all())
        await transactions.close()
        return results, left

    results, left = asyncio.run(scenario())
    assert results[0] == [1]
    assert isinstance(results[1], ValueError)
    assert isinstance(results[2], Conflict)
    assert results[3] == [1, 2]
    assert left == [1, 2]


def test_a_failed_commit_fails_all_that_shared_it_and_none_is_run_again(engine, monkeypatch):
    runs, tries = [], []

    def counted(connection):
        runs.append(1)
        return add(len(runs))(connection)

    def refuse_the_second(connection):
        tries.append(1)
        if len(tries) == 2:
            raise sqlite3.OperationalError("disk I/O error")
        connection.commit()

    async def scenario():
        transactions = Transactions(engine)
        monkeypatch.setattr(engine.dialect, "do_commit", refuse_the_second)
        results = await asyncio.gather(*await ask_together(transactions, [counted] * 2), return_exceptions=True)
        assert len(tries) == 2
        left = await transactions.run(lambda connection: connection.scalars(select(numbers.c.number)).all())
        await transactions.close()
        return results, left

    results, left = asyncio.run(scenario())
    assert [type(result) for result in results] == [StorageFailed] * 2
    assert left == []
    assert len(runs) == 2


def test_a_work_whose_caller_has_left_before_it_began_is_not_run(engine):
    async def scenario():
        transactions = Transactions(engine)
        async with Blocked(transactions):
            left, stayed = (asyncio.ensure_future(transactions.run(add(n))) for n in (1, 2))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.sleep(0)
        result = await stayed
        await transactions.close()
        return result

    assert asyncio.run(scenario()) == [2]


def test_a_closed_database_says_so(engine):
    async def scenario():
        transactions = Transactions(engine)
        await transactions.close()
        with pytest.raises(StorageFailed, match="stopping"):
            await transactions.run(add(1))

    asyncio.run(scenario())
