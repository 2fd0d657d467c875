"""Statements that are compiled once give what SQLAlchemy's own execution gives, rows and errors alike."""

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, bindparam, create_engine, insert, select, update
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.exc import IntegrityError, OperationalError

from photogram.jobs.prepared import Prepared, _Form

metadata = MetaData()
things = Table("things", metadata, Column("number", Integer, primary_key=True), Column("name", Text))
ADD = Prepared(insert(things).values(number=bindparam("n"), name=bindparam("word")))
FIND = Prepared(select(things).where(things.c.number == bindparam("n"), things.c.name != "nobody"))
RENAME = update(things).where(things.c.number == bindparam("n")).values(name=bindparam("word")).returning(*things.c)


@pytest.fixture
def connection(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'things.sqlite3'}")
    metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_rows_are_written_found_and_changed(connection):
    with connection.begin():
        assert ADD.run(connection, {"n": 1, "word": "a cube"}) is None
        assert FIND.run(connection, {"n": 1}) == (1, "a cube")
        assert FIND.run(connection, {"n": 2}) is None
        assert Prepared(RENAME).run(connection, {"n": 1, "word": "紅"}) == (1, "紅")
    assert connection.execute(select(things)).all() == [(1, "紅")]


def test_a_transaction_that_is_rolled_back_takes_them_along(connection):
    transaction = connection.begin()
    ADD.run(connection, {"n": 1, "word": "a"})
    transaction.rollback()
    assert connection.execute(select(things)).all() == []


def test_errors_of_the_driver_are_sqlalchemys(connection):
    with connection.begin():
        ADD.run(connection, {"n": 1, "word": "a"})
        with pytest.raises(IntegrityError, match="UNIQUE"):
            ADD.run(connection, {"n": 1, "word": "b"})
        connection.exec_driver_sql("DROP TABLE things")
        with pytest.raises(OperationalError, match="no such table"):
            FIND.run(connection, {"n": 1})


def test_drivers_that_name_parameters_get_names():
    form = _Form(RENAME, psycopg.dialect())
    assert "%(n)s" in form.text
    assert form.parameters({"n": 1, "word": "a"}) == {"n": 1, "word": "a"}
