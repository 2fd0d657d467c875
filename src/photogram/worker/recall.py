"""Which calls of a job are answered without running anything, and what is noted of the answers of the others."""

from __future__ import annotations

from typing import Any

from .fibers import Call
from .job import Job
from .prompt_cache import PromptCache, readable


class Recall:
    """Answers calls from the prompt cache, from what a job's solver skips or its quality mode leaves out, and, where it
    `foresees`, from what was run before the job has asked for it."""

    def __init__(self, prompt_cache: PromptCache, *, foresees: bool) -> None:
        self._prompt_cache = prompt_cache
        self._foresees = foresees

    def answer(self, job: Job, call: Call) -> tuple[bool, Any]:
        """Return whether a call that the job has just made need not be run, and its answer. Once for each call."""
        if call.module.is_denoiser:
            known, answer = job.watch.skipped_answer()
            if known:
                return True, answer
            known, answer = job.shortcuts.answer(call, job.watch.moment)
            return (True, _noted_for_replay(job, call, answer)) if known else self._foreseen(job, call)
        if call.module.phase(call.method) != "encode":
            return False, None
        key = self._prompt_cache.key(call)
        answer = self._prompt_cache.get(key) if key is not None else None
        if answer is None:
            return False, None
        return True, _noted_for_replay(job, call, answer)

    def noted(self, job: Job, call: Call, answer: Any) -> Any:
        """Note an answer where it may be wanted again, and return it as the fiber is to have it."""
        if call.module.is_denoiser:
            job.watch.note_answer(answer)
            job.shortcuts.note(call, job.watch.moment, answer)
        if call.module.phase(call.method) == "encode":
            key = self._prompt_cache.key(call)
            if key is not None:
                answer = readable(call, answer)
                job.to_remember.append((key, answer))
        return _noted_for_replay(job, call, answer)

    def remember(self, job: Job) -> None:
        """Keep the answers that the pipeline has read by now: it is at its next call."""
        for key, answer in job.to_remember:
            self._prompt_cache.put(key, answer)
        job.to_remember.clear()

    def _foreseen(self, job: Job, call: Call) -> tuple[bool, Any]:
        if not self._foresees or call.method != "forward" or job.shortcuts.leaves_out_guidance(job.watch.moment):
            return False, None
        job.foresight.note(call, job.watch.position)
        answer = job.foresight.answer(call)
        return (False, None) if answer is None else (True, self.noted(job, call, answer))


def _noted_for_replay(job: Job, call: Call, answer: Any) -> Any:
    if job.answers is not None:
        job.answers.note(call, answer, job.watch.steps_done)
    return answer
