"""Answers of big modules that need no pass: of encoders from the prompt cache, of denoisers where a step is skipped.

Also notes what was answered, where it may be wanted again: by another job, or by a replay for a partial picture.
"""

from __future__ import annotations

from typing import Any

from .fibers import Call
from .job import Job
from .prompt_cache import PromptCache, readable


class Recall:
    """One per worker."""

    def __init__(self, prompt_cache: PromptCache) -> None:
        self._prompt_cache = prompt_cache

    def known(self, job: Job, call: Call) -> tuple[bool, Any]:
        """Return whether a call's answer is known, and the answer."""
        if call.module.is_denoiser:
            return job.watch.skipped_answer()
        if call.module.phase(call.method) != "encode":
            return False, None
        key = self._prompt_cache.key(call)
        answer = self._prompt_cache.get(key) if key is not None else None
        if answer is None:
            return False, None
        return True, self._note_for_replay(job, call, answer)

    def noted(self, job: Job, call: Call, answer: Any) -> Any:
        """Note an answer where it may be wanted again, and return it as the fiber is to have it."""
        if call.module.is_denoiser:
            job.watch.note_answer(answer)
        if call.module.phase(call.method) == "encode":
            key = self._prompt_cache.key(call)
            if key is not None:
                answer = readable(call, answer)
                job.to_remember.append((key, answer))
        return self._note_for_replay(job, call, answer)

    def _note_for_replay(self, job: Job, call: Call, answer: Any) -> Any:
        if job.answers is not None:
            job.answers.note(call, answer, job.watch.steps_done)
        return answer

    def remember(self, job: Job) -> None:
        """Keep the answers that the pipeline has read by now: it is at its next call."""
        for key, answer in job.to_remember:
            self._prompt_cache.put(key, answer)
        job.to_remember.clear()
