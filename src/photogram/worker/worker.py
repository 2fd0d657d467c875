"""The loop: takes the scheduler's decisions, runs the calls they name, and resumes the fibers with the answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from ..core.errors import OutOfMemory, RequestError
from ..core.messages import Began, Failed, LorasReady, LorasRefused, PrepareLoras, SetLoras, ToHost
from ..core.request import GenerateRequest
from ..core.worker_config import WorkerConfig
from ..scheduler import JobTicket, PendingCall, Run, Scheduler, SchedulerConfig, Start
from .beside import AtOnce, Lane, streams_of
from .fibers import Call, Returned
from .frame_store import Drawn
from .job import Job, replay
from .loading import ServedPipeline, goes_beside
from .lora.mixing import NotMixable
from .lora.service import GetLoras, Loras
from .lora.sets import ModuleLoras
from .memory import DeviceLost, PeakMemory, device_error, free_bytes
from .pace import Pace
from .passes import Passes
from .probe import same_call_for_two
from .prompt_cache import PromptCache
from .recall import Recall
from .reports import Reports, failure
from .stacking import Stacker
from .vitals import VitalSigns

logger = logging.getLogger(__name__)


class Worker:
    """Runs jobs of one served pipeline; `turn` takes one decision of the scheduler.

    `emit` is given every message for the host. Single-threaded: submit, cancel and turn are called by one thread. From
    others `wake` is called when a `turn` is worth while though the last one found nothing to do.
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
        self._reports = Reports(served, config.frames_dir, emit)
        self._emit = self._reports.send
        self._clock = clock
        beside = goes_beside(config, served.device)
        self._lane = Lane(streams_of(served.device), wake, "beside") if beside else AtOnce()
        self._leaving = Lane(streams_of(served.device), wake, "frames") if beside else AtOnce()
        if served.graphs is not None:
            served.graphs.is_quiet = lambda: not (self._lane.is_busy or self._leaving.is_busy)
        self._pace = Pace(served.device, clock)
        self._peak = PeakMemory(served.device)
        self._vitals = VitalSigns(served.device, lambda: self.loras.num_switches)
        graph_bytes = config.tuning.cuda_graph_memory_bytes if served.tuning.cuda_graphs else 0
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_batch_size=config.max_batch_size,
                max_live_jobs=1 if served.runs_alone else config.max_live_jobs,
                memory_bytes=free_bytes(served.device, reserved=served.visitors.largest_bytes + graph_bytes),
            )
        )

    def heard_by(self, emit: Callable[[ToHost], None]) -> AbstractContextManager[None]:
        """Send messages elsewhere for a while."""
        return self._reports.heard_by(emit)

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
            self._emit(failure(request.job_id, error, None))
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
        self._lane.take()
        self._leaving.take()
        now = self._clock()
        plan = self._scheduler.next_plan(now)
        vitals = self._vitals.news(now, is_idle=plan is None and not self._lane.is_busy)
        if vitals is not None:
            self._emit(vitals)
        match plan:
            case None:
                return False
            case Start(job_id=job_id):
                self._start(self.jobs[job_id], now)
            case Run(beside=True):
                self._run_beside(plan)
            case Run():
                self._run(plan)
        return True

    def wait(self) -> bool:
        """Wait for what is done beside the loop and go on with it; False where nothing is."""
        return any([self._lane.take(wait=True), self._leaving.take(wait=True), self.loras.wait()])

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
        self._tell_began(plan, calls[0])
        self._pace.wait_for_room()
        self._peak.begin()
        peak = None if self._lane.is_busy or self._leaving.is_busy else self._peak  # it would be that of both
        started = self._clock()
        try:
            self._bring_loras(plan, jobs)
            with self._pace.measured((plan.kind, len(jobs)), partial(self._ran, plan, calls, peak)):
                answers = self._passes.run(jobs)
        except Exception as error:
            self._could_not_run(plan, jobs, error, self._clock() - started)
            return
        if len(jobs) == 1 and self.served.peaks is not None:
            size = jobs[0].request.width, jobs[0].request.height, jobs[0].request.num_frames
            self.served.peaks.note(calls[0].module.phase(calls[0].method), size, self._peak.highest())
        for job, call, answer in zip(jobs, calls, answers, strict=True):
            job.calls_shared += len(jobs) > 1
            job.largest_batch = max(job.largest_batch, len(jobs))
            self._proceed(job, partial(job.fiber.resume, self._recall.noted(job, call, answer)))

    def _run_beside(self, plan: Run) -> None:
        """Begin a call that others are run beside. The fiber stays in this thread: only the network runs elsewhere."""
        job = self.jobs[plan.job_ids[0]]
        call, started = job.call, self._clock()
        job.calls_run += 1
        self._tell_began(plan, call)
        try:
            self._bring_loras(plan, [job])
        except Exception as error:
            self._could_not_run(plan, [job], error, self._clock() - started)
            return
        work = partial(call.module.run, call, job.job_id, beside=True)
        self._lane.begin(work, partial(self._ran_beside, plan, job, call, started))

    def _ran_beside(self, plan: Run, job: Job, call: Call, started: float, outcome: Future[Any]) -> None:
        seconds = self._clock() - started
        error = outcome.exception()
        if isinstance(error, Exception) and self._is_alive(job):
            self._could_not_run(plan, [job], error, seconds)
            return
        if isinstance(error, Exception) and isinstance(lost := device_error(error, self.served.device), DeviceLost):
            raise lost from error
        self._ran(plan, [call], None, seconds)
        if self._is_alive(job):  # else it was cancelled meanwhile
            self._proceed(job, partial(job.fiber.resume, self._recall.noted(job, call, outcome.result())))

    def _tell_began(self, plan: Run, call: Call) -> None:
        """Tell the host, which takes a worker for hung that is silent for much longer than is expected here."""
        expected_s = self._scheduler.expected_s(plan)
        if expected_s is not None:
            expected_s = max(expected_s, self._scheduler.expected_beside_s())
        self._emit(Began(plan.job_ids, call.module.name, expected_s))

    def _is_alive(self, job: Job) -> bool:
        """Say whether a job was not cancelled while something was done for it."""
        return self.jobs.get(job.job_id) is job

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

    def _ran(self, plan: Run, calls: list[Call], peak: PeakMemory | None, seconds: float) -> None:
        if calls[0].module.loras is not None:
            calls[0].module.loras.note_pass([call.loras[0] for call in calls], seconds)
        self._scheduler.ran(plan, seconds, self._clock(), peak_bytes=None if peak is None else peak.taken())

    def _could_not_run(self, plan: Run, jobs: list[Job], error: Exception, seconds: float) -> None:
        """A call failed: the device is lost, a batch did not fit and is cut, or the job hears of it."""
        error = device_error(error, self.served.device)
        if isinstance(error, DeviceLost):
            raise error
        out_of_memory = isinstance(error, OutOfMemory)
        loras = jobs[0].call.module.loras
        if isinstance(error, NotMixable) and loras is not None:
            loras.exclude(error.layer, str(error))
        impossible = self._scheduler.ran(plan, seconds, self._clock(), out_of_memory=out_of_memory)
        if out_of_memory:
            # The traceback holds the failed pass's tensors.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._lane.take(wait=True)
            if loras is not None:
                loras.free_memory()
            if self.served.graphs is not None:
                self.served.graphs.forget()
            self._pace.release_memory()
            if not impossible:
                return
        if len(jobs) > 1 and not isinstance(error, RequestError):
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
            self._reports.progress(job, lambda: self._scheduler.eta_s(job.job_id, self._clock()))
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
                may_be_beside=call.module.may_be_beside,
                has_twin=call.module.twin is not None,
            ),
            now,
        )

    def _runs_alone(self, request: GenerateRequest) -> bool:
        return request.deterministic or self.config.deterministic or self.served.runs_alone

    # --- pictures

    def _make_preview(self, job: Job) -> None:
        """Show what the job is heading for. A picture that cannot be made costs the job its partial pictures only."""
        estimate = job.watch.take_estimate()
        if estimate is None or job.answers is None:
            return
        try:
            result = replay(job, estimate)
        except Exception as error:
            self._give_up_previews(job, error)
            return
        put = partial(self._reports.frames.put_result, job.stage.pipeline, result)
        self._leaving.begin(put, partial(self._previewed, job))

    def _previewed(self, job: Job, outcome: Future[Drawn]) -> None:
        error = outcome.exception()
        if isinstance(error, Exception):
            self._give_up_previews(job, error)
        elif self._is_alive(job):
            self._reports.preview(job, outcome.result())
        else:
            outcome.result().unlink()

    def _give_up_previews(self, job: Job, error: Exception) -> None:
        lost = device_error(error, self.served.device)
        if isinstance(lost, DeviceLost):
            raise lost from error
        logger.warning("%s goes on without partial pictures: %s", job.job_id, error)
        job.answers = None

    def _finish(self, job: Job, result: Any) -> None:
        now = self._clock()
        job.stages.enter("frames", now)
        self._scheduler.finished(job.job_id, now)
        put = partial(self._reports.frames.put_result, job.stage.pipeline, result)
        self._leaving.begin(put, partial(self._finished, job))

    def _finished(self, job: Job, outcome: Future[Drawn]) -> None:
        error = outcome.exception()
        if isinstance(error, Exception):
            lost = device_error(error, self.served.device)
            if isinstance(lost, DeviceLost):
                raise lost from error
            if self._is_alive(job):
                self._fail(job, lost)
            return
        if not self._is_alive(job):
            outcome.result().unlink()
            return
        now = self._clock()
        job.stages.enter(None, now)
        self._end(job)
        self._reports.finished(job, outcome.result(), now - (job.started_at or now))

    def _fail(self, job: Job, error: Exception) -> None:
        message = failure(job.job_id, error, job)
        self._end(job)
        self._emit(message)

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
        while worker.turn() or worker.wait():
            pass
