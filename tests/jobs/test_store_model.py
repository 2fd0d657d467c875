"""The store against a plain dict, in any order of calls, with restarts between them."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from photogram.core.errors import Conflict, NotFound
from photogram.jobs.record import FINISHED, TRANSITIONS, IllegalTransition
from photogram.jobs.store import open_store

from .records import Clock, job

KINDS, OWNERS = st.sampled_from(["image", "video"]), st.sampled_from(["ann", "bob"])


class StoreAgainstDict(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.runner = asyncio.Runner()
        self.store = open_store(self.folder, clock=self.clock)
        self.model = {}  # job_id -> JobRecord, in the order of acceptance

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def teardown(self):
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @rule(target=ids, kind=KINDS, owner=OWNERS, prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    def create(self, kind, owner, prompt):
        record = job(self.clock.now, kind=kind, owner=owner, prompt=prompt)
        self.run(self.store.create([record]))
        self.model[record.job_id] = record
        return record.job_id

    @rule(job_id=ids)
    def create_again(self, job_id):
        if job_id in self.model:
            try:
                self.run(self.store.create([job(), self.model[job_id]]))
            except Conflict:
                return
            raise AssertionError("one id was given twice")

    @rule(
        job_id=ids,
        to=st.sampled_from(list(TRANSITIONS)),
        file_bytes=st.none() | st.integers(0, 2**40),
        run_s=st.none() | st.floats(0, 1e6),
    )
    def move(self, job_id, to, file_bytes, run_s):
        known = {"file_bytes": file_bytes, "run_s": run_s}
        if to == "failed":
            known |= {"error_code": "timeout", "error_message": "too slow"}
        try:
            moved = self.run(self.store.move(job_id, to, **known))
        except NotFound:
            assert job_id not in self.model
            return
        except IllegalTransition as error:
            assert to not in TRANSITIONS[self.model[job_id].state]
            refused_in = error.state
            assert refused_in == self.model[job_id].state
            return
        before = self.model[job_id]
        assert to in TRANSITIONS[before.state]
        changes = {name: value for name, value in known.items() if value is not None}
        if to == "running":
            changes |= {"started_at": self.clock.now, "attempts": before.attempts + 1}
        if to in FINISHED:
            changes["finished_at"] = self.clock.now
        self.model[job_id] = msgspec.structs.replace(before, state=to, **changes)
        assert moved == self.model[job_id]

    @rule(job_id=ids)
    def delete(self, job_id):
        assert self.run(self.store.delete(job_id)) == (self.model.pop(job_id, None) is not None)

    @rule()
    def interrupt(self):
        failed = self.run(self.store.fail_interrupted())
        expected = []
        for job_id, record in self.model.items():
            if not record.outlives_client and not record.is_finished:
                self.model[job_id] = msgspec.structs.replace(
                    record,
                    state="failed",
                    finished_at=self.clock.now,
                    error_code="interrupted",
                    error_message=next(each.error_message for each in failed if each.job_id == job_id),
                )
                expected.append(self.model[job_id])
        assert list(failed) == expected

    @rule(seconds=st.floats(0, 1000))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def restart(self):
        self.run(self.store.close())
        self.store = open_store(self.folder, clock=self.clock)

    @rule(kind=KINDS, owner=OWNERS, limit=st.integers(1, 5), descending=st.booleans())
    def list_all(self, kind, owner, limit, descending):
        expected = [record for record in self.model.values() if (record.kind, record.owner) == (kind, owner)]
        if descending:
            expected.reverse()
        found, after = [], None
        order = "desc" if descending else "asc"
        while page := self.run(self.store.list(kind=kind, owner=owner, after=after, limit=limit, order=order)):
            assert len(page) <= limit
            found += page
            after = page[-1].job_id
        assert found == expected

    @invariant()
    def store_says_what_the_dict_says(self):
        finished = [record for record in self.model.values() if record.is_finished]
        totals = self.run(self.store.totals())
        assert totals.num_jobs == len(finished)
        assert totals.file_bytes == sum(record.file_bytes or 0 for record in finished)
        unfinished = self.run(self.store.unfinished())
        assert list(unfinished) == [record for record in self.model.values() if not record.is_finished]
        ended = sorted(finished, key=lambda record: (record.finished_at, record.job_id))
        assert list(self.run(self.store.oldest_finished(1000))) == ended


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
