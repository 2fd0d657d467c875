"""The loop: takes the scheduler's decisions, runs the calls they name, and resumes the fibers with the answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..core.config import WorkerConfig
from ..core.errors import GenerationFailed, OutOfMemory, RequestError, ServiceError
from ..core.messages import (
    Began,
    Failed,
    Finished,
    LorasReady,
    LorasRefused,
    PrepareLoras,
    Preview,
    Progress,
    SetLoras,
    ToHost,
)
from ..core.request import GenerateRequest
from ..models.derive import token_side
from ..scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig, Start
from .arguments import to_frames, to_sound
from .fibers import Call, Returned
from .frame_store import FrameStore
from .job import Job, replay
from .loading import ServedPipeline
from .lora.mixing import NotMixable
from .lora.service import GetLoras, Loras
from .lora.sets import ModuleLoras
from .memory import DeviceLost, PeakMemory, device_error, free_bytes
from .pace import Pace
from .passes import Passes
from .probe import same_call_for_two
from .prompt_cache import PromptCache
from .recall import Recall
from .stacking import Stacker
from .tokens import count_tokens
from .vitals import VitalSigns

logger = logging.getLogger(__name__)

# Shares of a job's progress that lie before the first step and after the last.
ENCODE_SHARE, DECODE_SHARE = 0.03, 0.05


class Worker:
    """Runs jobs of one served pipeline; `turn` takes one decision of the scheduler.

    `emit` is given every message for the host. Single-threaded: submit, cancel and turn are called by one thread. From
    another one `wake` is called when a `turn` is worth while though the last one found nothing to do.
    """

    def __init__(
        self,
        served: ServedPipeline,
        config: WorkerConfig,
        emit: Callable[[ToHost], None],
        clock: Callable[[], float],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.served = served
        self.stacker = Stacker()
        self._passes = Passes(self.stacker, served.run_both)
        self.prompt_cache = PromptCache(config.prompt_cache_bytes)
        self._recall = Recall(self.prompt_cache, foresees=self._passes.has_halves)
        self.jobs: dict[str, Job] = {}
        self.loras = Loras(
            served,
            lambda: set().union(*(job.loras.versions for job in self.jobs.values())),
            wake,
            cache_bytes=config.lora_cache_bytes,
            file_bytes=config.lora_file_bytes,
        )
        self.config = config
        self._emit = emit
        self._clock = clock
        self._frames = FrameStore(config.frames_dir)
        self._pace = Pace(served.device, clock)
        self._peak = PeakMemory(served.device)
        self._vitals = VitalSigns(served.device, lambda: self.loras.num_switches)
        graph_bytes = config.tuning.cuda_graph_memory_bytes if config.tuning.cuda_graphs else 0
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_batch_size=config.max_batch_size,
                max_live_jobs=1 if served.runs_alone else config.max_live_jobs,
                memory_bytes=free_bytes(served.device, reserved=served.visitors.largest_bytes + graph_bytes),
            )
        )

    @contextmanager
    def heard_by(self, emit: Callable[[ToHost], None]) -> Iterator[None]:
        """Send messages elsewhere for a while (the warm-up's are not for the host)."""
        self._emit, hosts = emit, self._emit
        try:
            yield
        finally:
            self._emit = hosts

    # --- what the host asks

    def submit(self, request: GenerateRequest) -> None:
        """Queue a job, once its LoRAs are loaded. A request that cannot even be prepared fails at once."""
        # Where calls run one at a time a seed gives the same bits at any load, and so must its LoRAs.
        exact = self._runs_alone(request) or self.config.max_batch_size == 1
        queue = partial(self._queue, request, self._clock())
        self.loras.of_job(request.job_id, request.loras, exact=exact, then=queue)

    def _queue(self, request: GenerateRequest, arrived_at: float, loras: GetLoras) -> None:
        try:
            job = Job(request, self.served, loras(), arrived_at)
        except Exception as error:
            self._emit(self._failure(request.job_id, error))
            return
        self.jobs[request.job_id] = job
        pixels = request.width * request.height * (request.num_frames or 1)
        self._scheduler.submit(
            JobTicket(
                job_id=request.job_id,
                owner=request.owner,
                priority=request.priority,
                arrived_at=arrived_at,
                expected_steps=job.expected_steps,
                size_hint=pixels,
                kind=_job_kind(job),
                batchable=not self._runs_alone(request),
            ),
            self._clock(),
        )

    def cancel(self, job_id: str) -> None:
        """End a job where it waits; unknown ids are ignored."""
        job = self.jobs.get(job_id)
        if job is not None:
            self._end(job)
        elif not self.loras.drop(job_id):
            return
        self._emit(Failed(job_id, "cancelled", "The job was cancelled."))

    def set_loras(self, message: SetLoras | PrepareLoras) -> None:
        """Load, merge or take out LoRAs, and answer. Jobs go on while files are read."""
        self.loras.answer(message, self._answered)

    def _answered(self, answer: LorasReady | LorasRefused) -> None:
        self._emit(answer)
        for name, weights in self.loras.merged().items():
            self._scheduler.holds(name, weights)

    @property
    def caches_steps(self) -> bool:
        return any(module.caches_steps for module in self.served.modules.values())

    # --- the loop

    def turn(self) -> bool:
        """Take one decision and carry it out; False when there is nothing to do now."""
        self.loras.take()
        now = self._clock()
        plan = self._scheduler.next_plan(now)
        vitals = self._vitals.news(now, is_idle=plan is None)
        if vitals is not None:
            self._emit(vitals)
        match plan:
            case None:
                return False
            case Start(job_id=job_id):
                self._start(self.jobs[job_id], now)
            case Run():
                self._run(plan)
        return True

    def _start(self, job: Job, now: float) -> None:
        job.started_at = now
        self._proceed(job, job.fiber.resume)
        self._scheduler.ran(Start(job.job_id), self._clock() - now, self._clock())

    def _run(self, plan: Run) -> None:
        jobs = [self.jobs[job_id] for job_id in plan.job_ids]
        # One order for one set of LoRAs, so that what was put side by side for the last pass serves this one.
        jobs.sort(key=lambda job: job.call.loras[0][0].key)
        calls = [job.call for job in jobs]
        for job in jobs:
            job.calls_run += 1
        self._emit(Began(plan.job_ids, calls[0].module.name, self._scheduler.expected_s(plan)))
        self._pace.wait_for_room()
        self._peak.begin()
        started = self._clock()
        try:
            self._bring_loras(plan, jobs)
            with self._pace.measured((plan.kind, len(jobs)), partial(self._ran, plan, calls)):
                answers = self._passes.run(jobs)
        except Exception as error:
            self._could_not_run(plan, jobs, error, self._clock() - started)
            return
        for job, call, answer in zip(jobs, calls, answers, strict=True):
            job.calls_shared += len(jobs) > 1
            job.largest_batch = max(job.largest_batch, len(jobs))
            self._proceed(job, partial(job.fiber.resume, self._recall.noted(job, call, answer)))

    def _bring_loras(self, plan: Run, jobs: list[Job]) -> None:
        """Bring the weights to where the plan's calls can be run, before the pass, so that its price stays its own."""
        module = jobs[0].call.module
        if module.loras is None:
            return
        before, started = module.loras.weights.merged.key, self._clock()
        loras = jobs[0].call.loras[0][0]
        if not any(self._wants_other(job, module.name, loras) for job in self.jobs.values()):
            passes = max(max(1, job.num_steps - job.watch.steps_done) for job in jobs)
            module.loras.merge_if_it_pays(loras, passes * (self._scheduler.expected_s(plan) or 0.0))
        module.loras.fit([job.call.loras[0] for job in jobs], exact=jobs[0].call.exact)
        if module.loras.weights.merged.key != before:
            seconds = self._clock() - started
            self._scheduler.holds(module.name, module.loras.weights.merged.key, seconds)

    @staticmethod
    def _wants_other(job: Job, module: str, loras: ModuleLoras) -> bool:
        """Say whether a job that is under way will call the module with other LoRAs."""
        return job.started_at is not None and job.phase != "decode" and job.loras.of(module).key != loras.key

    def _ran(self, plan: Run, calls: list[Call], seconds: float) -> None:
        if calls[0].module.loras is not None:
            calls[0].module.loras.note_pass([call.loras[0] for call in calls], seconds)
        self._scheduler.ran(plan, seconds, self._clock(), peak_bytes=self._peak.taken())

    def _could_not_run(self, plan: Run, jobs: list[Job], error: Exception, seconds: float) -> None:
        """A call failed: the device is lost, a batch did not fit and is cut, or the job hears of it."""
        error = device_error(error, self.served.device)
        if isinstance(error, DeviceLost):
            raise error
        out_of_memory = isinstance(error, OutOfMemory)
        loras = jobs[0].call.module.loras
        if isinstance(error, NotMixable) and loras is not None:
            loras.exclude(error.layer, str(error))
        if out_of_memory:
            if loras is not None:
                loras.free_memory()
            if self.served.graphs is not None:
                self.served.graphs.forget()
            # The traceback holds the failed pass's tensors.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._pace.release_memory()
        self._scheduler.ran(plan, seconds, self._clock(), out_of_memory=out_of_memory)
        if len(jobs) > 1 and not isinstance(error, RequestError):
            if not out_of_memory:
                if not isinstance(error, NotMixable):
                    logger.warning("a pass of %d jobs failed, running them alone: %s", len(jobs), error)
                    self.stacker.give_up(jobs[0].stackable)
                for job in jobs:
                    self._wait_at(job, job.call)
            return
        for job in jobs:  # several only where they share LoRAs that cannot be merged
            self._proceed(job, partial(job.fiber.fail, error))

    # --- fibers

    def _proceed(self, job: Job, advance: Callable[[], Call | Returned]) -> None:
        """Advance the fiber until it waits at a call that must be run, or is done."""
        try:
            outcome = advance()
            self._recall.remember(job)
            self._make_preview(job)
            while isinstance(outcome, Call):
                known, answer = self._recall.answer(job, outcome)
                if not known:
                    break
                outcome = job.fiber.resume(answer)
                self._make_preview(job)  # several steps may go by here
            self._recall.remember(job)
        except Exception as error:
            lost = device_error(error, self.served.device)
            if isinstance(lost, DeviceLost):
                raise lost from error
            self._fail(job, lost)
            return
        if isinstance(outcome, Call):
            self._wait_at(job, outcome)
            self._report(job)
        else:
            self._finish(job, outcome.value)

    def _wait_at(self, job: Job, call: Call) -> None:
        phase = call.module.phase(call.method)
        job.call, job.phase = call, phase
        job.stackable = None
        may_stack = call.module.is_denoiser and call.method == "forward" and not self._runs_alone(job.request)
        if may_stack:
            if not self.stacker.is_known(call):
                self.stacker.learn(call, same_call_for_two(job, call, self.served))
            job.stackable = self.stacker.prepare(call, job.digest)
        loras, serving = call.loras[0][0], call.module.loras
        mixes = serving is not None and not call.exact and serving.mixes(loras)
        now = self._clock()
        job.stages.enter(phase, now)
        self._scheduler.stepped(job.job_id, job.watch.steps_done, job.num_steps)
        self._scheduler.waiting(
            job.job_id,
            PendingCall(
                key=(job.stackable.key, () if mixes else loras.key) if job.stackable is not None else None,
                kind=_kind(call, job.stage.request),
                phase=phase,
                rows=job.stackable.num_rows if job.stackable is not None else 1,
                module=call.module.name,
                weights=loras.key if serving is not None else (),
                mixes=mixes,
            ),
            now,
        )

    def _runs_alone(self, request: GenerateRequest) -> bool:
        return request.deterministic or self.config.deterministic or self.served.runs_alone

    # --- what the host hears

    def _report(self, job: Job) -> None:
        """Tell how far the job is, once for each step: with guidance a step can be several calls."""
        done, num_steps = job.watch.steps_done, job.num_steps
        if job.reported == (job.phase, done):
            return
        job.reported = (job.phase, done)
        share = {"encode": 0.0, "denoise": ENCODE_SHARE, "decode": 1 - DECODE_SHARE}[job.phase]
        if job.phase == "denoise":
            share += (1 - ENCODE_SHARE - DECODE_SHARE) * min(1.0, done / num_steps)
        job.fraction = max(job.fraction, share)
        self._emit(
            Progress(
                job_id=job.job_id,
                phase=job.phase,
                step=done,
                num_steps=num_steps,
                fraction=job.fraction,
                eta_s=self._scheduler.eta_s(job.job_id, self._clock()),
            )
        )

    def _make_preview(self, job: Job) -> None:
        """Show what the job is heading for. A picture that cannot be made costs the job its partial pictures only."""
        estimate = job.watch.take_estimate()
        if estimate is None or job.answers is None:
            return
        try:
            pixels = to_frames(replay(job, estimate))
        except Exception as error:
            if isinstance(device_error(error, self.served.device), DeviceLost):
                raise
            logger.warning("%s goes on without partial pictures: %s", job.job_id, error)
            job.answers = None
            return
        self._emit(Preview(job.job_id, job.num_previews, self._frames.put(pixels)))
        job.num_previews += 1

    def _finish(self, job: Job, result: Any) -> None:
        try:
            self._pace.finish()
            job.stages.enter("frames", self._clock())
            block = self._frames.put(to_frames(result))
            heard = to_sound(job.stage.pipeline, result)
            sound = None if heard is None else self._frames.put_sound(*heard)
        except Exception as error:
            self._fail(job, device_error(error, self.served.device))
            return
        prompt_tokens, warnings = count_tokens(self.served.pipeline, job.stage.arguments)
        now = self._clock()
        run_s = now - job.started_at
        job.stages.enter(None, now)
        self._scheduler.finished(job.job_id, now)
        self._end(job)
        left_out = job.shortcuts.num_answered
        logger.info(
            "%s done: %d steps in %.2f s (%s), %d of %d calls shared, largest batch %d%s",
            job.job_id,
            job.watch.steps_done,
            run_s,
            job.stages,
            job.calls_shared,
            job.calls_run,
            job.largest_batch,
            f", {job.request.quality_mode}: {left_out} calls left out" if left_out else "",
        )
        self._emit(
            Finished(
                job_id=job.job_id,
                frames=block,
                prompt_tokens=prompt_tokens,
                image_tokens=self._image_tokens(job.request),
                run_s=run_s,
                warnings=tuple(warnings),
                sound=sound,
            )
        )

    def _image_tokens(self, request: GenerateRequest) -> int:
        """Tokens of the picture as the denoiser sees it: one for each square of `token_side` and latent frame."""
        side = token_side(self.served.pipeline)
        latent_frames = 1 + ((request.num_frames or 1) - 1) // self.served.card.frame_multiple
        return (request.width // side) * (request.height // side) * latent_frames

    def _fail(self, job: Job, error: Exception) -> None:
        failure = self._failure(job.job_id, error)  # which asks how far the job has come
        self._end(job)
        self._emit(failure)

    def _failure(self, job_id: str, error: Exception) -> Failed:
        if isinstance(error, ServiceError):
            return Failed(job_id, error.code, error.message, error.param)
        job = self.jobs.get(job_id)
        # What a pipeline says of its arguments before any network has run is said of the request.
        if isinstance(error, ValueError | TypeError) and (job is None or job.calls_run == 0):
            return Failed(job_id, RequestError.code, f"The pipeline refused the request: {error}")
        logger.error("%s failed", job_id, exc_info=error)
        return Failed(job_id, GenerationFailed.code, f"The pipeline failed: {type(error).__name__}: {error}")

    def _end(self, job: Job) -> None:
        """Forget a job and free all it holds."""
        self.jobs.pop(job.job_id, None)
        self._scheduler.cancel(job.job_id)
        job.fiber.close()
        job.call = job.stackable = None
        for module in self.served.modules.values():
            module.forget(job.job_id)


def _job_kind(job: Job) -> str:
    """What changes the price of a job's steps beside its size."""
    guided = "guided" if (job.request.guidance_scale or 0) > 1 else "plain"
    stages = " in two stages" if job.in_two_stages else ""
    return f"{job.request.task} {guided} {job.request.quality_mode}{stages}"


def _kind(call: Call, request: GenerateRequest) -> str:
    """What costs the same time and memory: the same method at the same size."""
    frames = f"x{request.num_frames}" if request.num_frames else ""
    return f"{call.module.name}.{call.method} {request.width}x{request.height}{frames}{' fp8' if call.in_fp8 else ''}"


def run_until_idle(worker: Worker) -> None:
    """Turn until nothing is left to do."""
    with torch.inference_mode():
        while worker.turn() or worker.loras.wait():
            pass
