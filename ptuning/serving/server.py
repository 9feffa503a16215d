"""Runs the application: loads, listens, starts the page, and stops without dropping what runs."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from ptuning.errors import ConfigError
from ptuning.generation import Engine
from ptuning.serving import logs
from ptuning.serving.app import create_app, default_model
from ptuning.serving.backend import UnknownModel
from ptuning.serving.metrics import Metrics
from ptuning.serving.models import Models
from ptuning.serving.options import OUTPUT, ServeOptions, parse
from ptuning.serving.page_start import page_command
from ptuning.serving.worker import Worker

log = logging.getLogger("ptuning.serving")

_LAST_SECONDS = 2.0  # of the grace time, for sending what is computed and closing connections


def serve(argv: Sequence[str]) -> int:
    """`ptuning serve`. Returns the exit status.

    Raises:
        PTuningError: options, model or prefix can't be used, or a port is taken.
    """
    options = parse(argv)
    logs.configure()
    sockets = [
        listen(options.host, options.port)
    ]  # before the model: nobody should load 12 GB to learn of a taken port
    page = not options.no_page
    if page:
        listen("127.0.0.1", options.web_port, "--web_port").close()
    worker, metrics = build(options)
    try:
        default = worker.find(default_model(options, worker.served())).name
    except UnknownModel as error:
        raise ConfigError(f"--default_model: {error}") from None
    worker.start()
    address = _address(options.host, sockets[0].getsockname()[1])
    _greet(options, address, worker, page, default)
    server = Server(
        uvicorn.Config(create_app(worker, options, metrics), log_config=None, access_log=False), worker, options
    )
    with _page(options, address) if page else contextlib.nullcontext():
        try:
            server.run(sockets=sockets)
        finally:
            worker.close()
    return 0


def build(options: ServeOptions) -> tuple[Worker, Metrics]:
    """Loads the base and the prefixes, and puts a worker around them that hasn't started."""
    models = Models.load(options.model, options.dtype)
    if options.prefix is not None:
        models.add_named(options.prefix)
    else:
        models.add_found(Path(OUTPUT))
    engine = Engine(
        models.model,
        models.tokenizer.eos_token_id,
        batch_tokens=options.batch_tokens,
        max_rows=1 if options.sequential else options.max_concurrent,
        past_tokens=0 if options.sequential else options.batch_tokens // 4,
        notify=log.warning,
    )
    metrics = Metrics()
    queue = options.max_queue + (options.max_concurrent - 1 if options.sequential else 0)
    return Worker(models, engine, max_queue=queue, timeout=options.request_timeout, metrics=metrics), metrics


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
    """Goes on listening while it finishes what runs, so that whoever is new gets a 503 and not a refused connection."""

    def __init__(self, config: uvicorn.Config, worker: Worker, options: ServeOptions):
        super().__init__(config)
        self.worker, self.grace = worker, options.grace_seconds
        self.ending: asyncio.Task | None = None
        config.timeout_graceful_shutdown = min(_LAST_SECONDS, self.grace / 2)

    async def serve(self, sockets=None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig, frame) -> None:
        """The first signal ends in peace, the second at once. The exit status is 0: being stopped is no failure."""
        if self.worker.stats().draining:
            self.force_exit = self.should_exit = True
        else:
            self.worker.drain()
            self.loop.call_soon_threadsafe(self._begin_end)

    def _begin_end(self) -> None:
        self.ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        seconds = self.grace - self.config.timeout_graceful_shutdown
        log.info("stopping", extra={"fields": {"running": self.worker.stats().running, "grace_seconds": self.grace}})
        idle = await asyncio.to_thread(self.worker.wait_idle, seconds)
        if not idle:
            log.warning("grace time is over; what still ran got an error")
            await asyncio.to_thread(self.worker.close)
        self.should_exit = True


@contextlib.contextmanager
def _page(options: ServeOptions, address: str) -> Iterator[None]:
    """The Streamlit page as a process of its own, for as long as the block lasts."""
    environment = os.environ | {"PTUNING_API": address}
    environment.pop("PTUNING_ADMIN_KEY", None)
    if options.api_key is not None:
        environment["PTUNING_API_KEY"] = options.api_key
    process = subprocess.Popen(page_command(port=options.web_port), env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(options: ServeOptions, address: str, worker: Worker, page: bool, default: str) -> None:
    names = [served.name for served in worker.served()]
    key = " -H 'Authorization: Bearer KEY'" if options.api_key else ""
    print(f"API    {address}   models: {', '.join(names)}; requests that name none get {default}")
    if page:
        print(f"Page   http://127.0.0.1:{options.web_port}")
    print(f"""Try    curl {address}/chatglm{key} -d '{{"prompt": "你好", "history": []}}'""", flush=True)
