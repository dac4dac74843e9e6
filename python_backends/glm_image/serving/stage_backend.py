"""What both stages share as Triton Python models: each request is tracked from its arrival to its one response."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from glm_image.config.instance import Instance
from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.errors import InvalidInputError, UnavailableError
from glm_image.ipc.protocol import Message
from glm_image.ipc.server import Handler, IpcServer
from glm_image.lifecycle.call_header import CallHeader
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.lifecycle.control import start_control_server
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.serving import bytes_tensors
from glm_image.serving.exit import end_process
from glm_image.serving.metrics_export import MetricsExporter
from glm_image.serving.responder import PendingResponses, Responder
from glm_image.serving.tensors import Inputs
from glm_image.telemetry.heartbeat import Heartbeat
from glm_image.telemetry.metrics import LatencyHistograms, LatencyRecorder, MetricSpec, OutcomeRecorder
from glm_image.telemetry.request_log import RequestLog
from glm_image.telemetry.tracing import RequestTracing

if TYPE_CHECKING:
    from glm_image.checkpoint.checkpoint import Checkpoint
    from glm_image.devices.base import Device
    from glm_image.parallel.rank_group import WorkerConfig

logger = logging.getLogger(__name__)

ABANDONED_POLL_SECONDS: Final = 0.5
"""Between two questions to Triton whether callers have disconnected. It knows the callers of this model itself, not
those of an ensemble."""


@dataclass(frozen=True)
class StageCall:
    """A request that is being served. It does not refer to Triton's request, whose memory is released before.

    Attributes:
        header: what it was sent with.
    """

    header: CallHeader
    context: RequestContext
    responder: Responder


class StageBackend(ABC):
    """A stage as a Triton Python model; a subclass loads the engine and passes it the requests."""

    parameters: ClassVar[type[ArParameters] | type[DitParameters]]
    reserves_first_device: ClassVar[bool]
    metrics: ClassVar[tuple[MetricSpec, ...]]
    counters: ClassVar[Mapping[str, MetricSpec]]
    latencies: ClassVar[LatencyHistograms]

    def initialize(self, args: Mapping[str, str]) -> None:
        bytes_tensors.install()
        self._instance = instance = Instance.read(args, self.parameters)
        self._limits, self._timeouts = instance.parameters.limits, instance.parameters.timeouts
        self._tracing = RequestTracing(instance.name)
        self._metrics = MetricsExporter(self.metrics, instance)
        self._pending = PendingResponses()
        self._ipc = IpcServer()
        self._registry = RequestRegistry(self.outcome, self._ipc.publish)
        is_last = self.outcome == RequestState.FINISHED
        self._request_log = RequestLog(instance.name, is_last=is_last, record=self._metrics.record)
        self._observers: list[RequestObserver] = [
            self._registry,
            self._pending,
            self._request_log,
            OutcomeRecorder(self.counters, self._metrics.record),
            LatencyRecorder(self.latencies, self._metrics.record),
        ]
        self._handlers: dict[str, Handler] = {}
        self._topics: dict[bytes, Callable[[], None]] = {}
        self._load(instance)
        start_control_server(self._ipc, instance.name, self._registry, self._handlers, self._topics)
        self._closing = threading.Event()
        self._abandoned_thread = threading.Thread(target=self._cancel_abandoned, name="abandoned", daemon=True)
        self._abandoned_thread.start()
        self._start_heartbeat()

    @property
    @abstractmethod
    def outcome(self) -> RequestState:
        """The state of a request that this stage has served."""

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            context = RequestContext()
            responder = self._tracked(context, request)
            with responder.errors_sent():
                header = CallHeader.read(request)
                responder.is_relayed = header.options.arrived_ns is not None
                context.id = header.id or context.id
                context.limit(self._timeouts.of(header.timeout_us))
                self._tracing.observe(context, request, header.options.trace)
                self._handle(StageCall(header, context, responder), Inputs(request, header.parameters))

    def finalize(self) -> None:
        """Ends what runs, with a response to each request."""
        self._heartbeat.close()
        self._close_engine()
        self._closing.set()
        self._abandoned_thread.join()
        self._ipc.close()
        self._request_log.close()
        self._metrics.close()
        self._tracing.close()
        end_process()

    def _load(self, instance: Instance[Any]) -> None:
        place = instance.take_place(reserve_first=self.reserves_first_device)
        folder = instance.parameters.checkpoint_folder  # before seconds of imports, to report a mistake early
        # These import torch, which must not happen before the instance's device is chosen.
        from glm_image.checkpoint.checkpoint import Checkpoint  # noqa: PLC0415
        from glm_image.devices.open import open_device  # noqa: PLC0415

        device = open_device(place.local_names[0], display_name=place.devices[0])
        logger.info("loading the engine on %s", device)
        self._heartbeat = Heartbeat(instance.name, instance.hang_seconds(device))
        checkpoint = Checkpoint.open(folder, instance.parameters.load_format)
        defaults = checkpoint.defaults
        self._handlers["defaults"] = lambda _: Message({"defaults": defaults})
        self._checkpoint = {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
        }
        description = {**self._checkpoint, "instances": instance.siblings, "slots": self._slots(instance.parameters)}
        self._handlers["describe"] = lambda _: Message({"stage": instance.model, **description})
        workers = instance.workers(place, device, self._end_process)
        self._load_engine(instance.parameters, checkpoint, device, workers)

    @abstractmethod
    def _slots(self, parameters: Any) -> int:
        """Returns how many images an instance works on at the same time."""

    def _check_revision(self, revision: str) -> None:
        """Refuses a request that is for another checkpoint; "" = any.

        Raises:
            InvalidInputError: ``revision`` is neither the checkpoint's revision nor its fingerprint.
        """
        if revision not in {"", self._checkpoint["revision"], self._checkpoint["fingerprint"]}:
            raise InvalidInputError.of("revision", revision, self._checkpoint["revision"])

    def _end_process(self, error: UnavailableError) -> None:
        """Fails all requests and ends this process, in which the engine may hang for ever.

        The watchdog sees the process end and restarts the server.
        """
        try:
            self._pending.fail_all(error)
            logger.error("this instance ends: %s", error)
            self._request_log.close()
        finally:  # a process that went on would refuse all requests and never be restarted
            end_process(1)

    def _tracked(self, context: RequestContext, request: Any) -> Responder:
        """Attaches the observers to a request's context, and returns its responder."""
        responder = Responder(request, context.finish)
        context.is_abandoned = responder.is_abandoned
        for observer in self._observers:
            context.add_observer(observer)
        self._pending.add(context, responder)
        return responder

    def _cancel_abandoned(self) -> None:
        while not self._closing.wait(ABANDONED_POLL_SECONDS):
            self._registry.cancel_abandoned()

    @abstractmethod
    def _load_engine(self, parameters: Any, checkpoint: Checkpoint, device: Device, workers: WorkerConfig) -> None:
        """Loads the engine, which imports torch; may add observers, and handlers and topics of the IPC server."""

    @abstractmethod
    def _handle(self, call: StageCall, inputs: Inputs) -> None:
        """Works on a request, or passes it to a thread that does. Exceptions become its response."""

    @abstractmethod
    def _close_engine(self) -> None:
        """Ends the engine and the threads that work for it."""

    @abstractmethod
    def _start_heartbeat(self) -> None:
        """Starts the heartbeat, with the watchdog's commands that the instance carries out."""
