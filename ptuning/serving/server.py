"""Runs the application: loads, listens, starts the page, and stops without dropping what runs."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from ptuning import distributed
from ptuning.errors import ConfigError
from ptuning.families import Family
from ptuning.generation import Engine
from ptuning.generation.pace import PAUSE
from ptuning.language import VARIABLE, Language, language, speaking
from ptuning.serving.access import Metrics
from ptuning.serving.app import create_app, default_model
from ptuning.serving.backend import Backend, UnknownModel
from ptuning.serving.connections import HttpConfig
from ptuning.serving.divided import LeadingEngine, LeadingModel, join, repeat
from ptuning.serving.doors import HostNames
from ptuning.serving.logs import configure_logs, follow
from ptuning.serving.models import LoadedModel, Registry
from ptuning.serving.options import OUTPUT, ServeOptions, ports_of
from ptuning.serving.traces import Traces
from ptuning.serving.words import words
from ptuning.serving.worker import Worker

log = logging.getLogger("ptuning.serving")

_FAILED = 1  # exit status
_LAST_SECONDS = 2.0  # of the grace time, for sending what is computed and closing connections


def serve(options: ServeOptions) -> int:
    """Serves until it is stopped. Returns the exit status.

    Raises:
        PTuningError: model or prefix can't be used, or a port is taken.
    """
    configure_logs()
    if options.tensor_parallel is None:
        return _serve(options)
    with distributed.session():
        return _serve(options) if join() else follow_first(options)


def _serve(options: ServeOptions) -> int:
    people = options.lang or language()
    traces = None if options.trace_endpoint is None else Traces(options.trace_endpoint)
    # Before the model: loading 12 GB takes long, and a taken port is known at once.
    port, web_port = ports_of(options)
    sockets = [listen(options.host, port)]
    page = not options.no_page
    if page:
        listen("127.0.0.1", web_port, "--web_port").close()
    with speaking("en"):  # logs are for programs
        backend, metrics = build(options)
    try:
        default = backend.find(default_model(options, backend.served())).name
    except UnknownModel as error:
        raise ConfigError(f"--default_model: {error}") from None
    backend.start()
    address = _address(options.host, sockets[0].getsockname()[1])
    with speaking(people):
        _greet(options, address, backend, web_port if page else None, default)
    config = HttpConfig(create_app(backend, options, metrics, traces), options.max_connections)
    server = Server(config, backend, options)
    with _page(options, web_port, address, people) if page else contextlib.nullcontext():
        try:
            server.run(sockets=sockets)
        finally:
            backend.close()
            if traces is not None:
                traces.close()
    return server.status


def build(options: ServeOptions) -> tuple[Backend, Metrics]:
    """Loads the base and the prefixes, and puts a worker around them that hasn't started; or looks for vLLM, which has."""
    if options.engine == "vllm":
        from ptuning.serving.vllm.build import build_vllm  # here, because only it needs httpx

        return build_vllm(options)
    loaded = _load(options, LoadedModel if options.tensor_parallel is None else LeadingModel)
    registry = Registry(options.model, aliases=options.served_model_name)
    if options.prefix is not None:
        registry.add_named(options.prefix, loaded.read_prefix)
    else:
        registry.add_found(Path(OUTPUT), loaded.read_prefix)
    registry.check_aliases()
    if isinstance(loaded, LeadingModel):
        engine: Engine = LeadingEngine(
            loaded.model, loaded.template.stop_ids, companions=loaded.companions, **_limits(options)
        )
    else:
        engine = Engine(loaded.model, loaded.template.stop_ids, **_limits(options))
    metrics = Metrics()
    queue = options.max_queue + (options.max_concurrent - 1 if options.sequential else 0)
    limits = {"timeout": options.request_timeout, "step_timeout": options.step_timeout}
    return Worker(loaded, registry, engine, max_queue=queue, metrics=metrics, **limits), metrics


def follow_first(options: ServeOptions) -> int:
    """Computes this process's share of what the first one serves, until that ends. Returns the exit status."""
    with speaking("en"):
        loaded = _load(options, LoadedModel)
    repeat(loaded, Engine(loaded.model, loaded.template.stop_ids, **_limits(options)))
    return 0


def _load(options: ServeOptions, kind: type[LoadedModel]) -> LoadedModel:
    asked = (options.quantization_bit, options.quantization, options.double_quantization)
    divided = (options.device_map, options.tensor_parallel)
    return kind.load(options.model, options.dtype, *asked, options.cpu_kernels, *divided, log.info, options.kernels)


def _limits(options: ServeOptions) -> dict[str, Any]:
    """The engine's options, the same in every process."""
    return {
        "batch_tokens": options.batch_tokens,
        "max_rows": 1 if options.sequential else options.max_concurrent,
        "pause": PAUSE if options.tensor_parallel is None else None,
        "prefix_cache_tokens": 0 if options.sequential else options.batch_tokens // 4,
        "notify": log.warning,
    }


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A socket bound to the address.

    Raises:
        ConfigError: it is taken, or isn't this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as cause:
        raise ConfigError(
            f"can't listen on {host}, port {port}: {cause.strerror}; choose another with {flag}"
        ) from cause
    return made


class Server(uvicorn.Server):
    """Goes on listening while it finishes what runs, so that new requests get a 503 and not a refused connection."""

    def __init__(self, config: uvicorn.Config, backend: Backend, options: ServeOptions):
        super().__init__(config)
        self.backend, self.grace = backend, options.grace_seconds
        self.ending: asyncio.Task | None = None
        self.status = 0  # of the process
        self.last = min(_LAST_SECONDS, self.grace / 2)
        config.timeout_graceful_shutdown = self.last  # type: ignore[assignment]  # seconds to wait: a float does

    async def serve(self, sockets=None) -> None:
        self.loop = asyncio.get_running_loop()
        self.backend.on_death(self.fail)
        await super().serve(sockets)

    def fail(self) -> None:
        """The backend can't answer any more: the process ends, so that what watches it starts a new one. Those who waited have
        their error on the way, and the usual time to take it."""
        log.critical("the server ends, because the model's thread has failed", extra={"fields": {"status": _FAILED}})
        self.status, self.should_exit = _FAILED, True

    def handle_exit(self, sig, frame) -> None:
        """The first signal ends in peace, the second at once. The exit status is 0: being stopped is no failure."""
        if self.backend.stats().draining:
            self.force_exit = self.should_exit = True
        else:
            self.backend.drain()
            self.loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self.ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        seconds = self.grace - self.last
        log.info("stopping", extra={"fields": {"running": self.backend.stats().running, "grace_seconds": self.grace}})
        idle = await asyncio.to_thread(self.backend.wait_idle, seconds)
        if not idle:
            log.warning("grace time is over; what still ran got an error")
            await asyncio.to_thread(self.backend.close)
        self.should_exit = True


def page_command(host: str = "127.0.0.1", port: int = Family.web_port, allowed_hosts: Sequence[str] = ()) -> list[str]:
    """The command line of the page's process. It takes PTUNING_API, PTUNING_API_KEY and PTUNING_LANG from its environment,
    for other users of the machine can read a command line.

    Args:
        host: to listen on.
        allowed_hosts: names by which the page may be asked for beside those of this machine; see doors.py.
    """
    options = {
        "server.address": host,  # with an address given, Streamlit does not ask the internet for this machine's own
        "server.port": port,
        "server.headless": "true",  # opens no browser, asks for no e-mail address
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",  # no Deploy button
        "client.showErrorDetails": "none",  # a traceback belongs in the log
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--server.allowedHosts={name}" for name in HostNames(host, allowed_hosts).list()]
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("page.py")), *flags]


@contextlib.contextmanager
def _page(options: ServeOptions, port: int, address: str, people: Language) -> Iterator[None]:
    """The Streamlit page as a process of its own, for as long as the block lasts."""
    environment = os.environ | {"PTUNING_API": address, VARIABLE: people}
    environment.pop("PTUNING_ADMIN_KEY", None)
    if options.keys:
        environment["PTUNING_API_KEY"] = options.keys[0].secret
    command = page_command(port=port, allowed_hosts=options.allowed_host)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    reader = None if process.stderr is None else follow(process.stderr, "the page says")
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader is not None:
            reader.join(timeout=5)


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(options: ServeOptions, address: str, backend: Backend, web_port: int | None, default: str) -> None:
    names = [served.name for served in backend.served()]
    key = " -H 'Authorization: Bearer KEY'" if options.keys else ""
    print(words("api", address=address, names=", ".join(names), default=default))
    if web_port is not None:
        print(words("page", address=f"http://127.0.0.1:{web_port}"))
    command = f"""curl {address}{backend.template.route or "/"}{key} -d '{{"prompt": "你好", "history": []}}'"""
    print(words("try", command=command), flush=True)
