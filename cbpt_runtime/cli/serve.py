"""`cbpt-runtime serve`: a model repository on a real Triton, verified, hardened and self-tested."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbpt_runtime.cli.options import DigestOption, JsonOption, TrustOption, given_trust
from cbpt_runtime.cli.output import print_json, print_note, print_pairs

if TYPE_CHECKING:
    from cbpt_runtime.serving import RunningServer
    from cbpt_runtime.trust import Trust

_POLL_S = 0.5


def command(
    repository: Annotated[Path, typer.Argument(help="Model repository.")],
    host: Annotated[str, typer.Option(help="IPv4 address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port for HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for metrics; 0 takes a free one.")] = 8002,
    ui_port: Annotated[
        int | None, typer.Option(help="Also serve a page for people on loopback; 0 takes a free port.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name the HTTP ports may be asked by; may be given several times."),
    ] = None,
    allow_foreign_code: Annotated[
        bool,
        typer.Option(
            "--allow-foreign-code", help="Serve code or a graph that this version would not have written."
        ),
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="cpu, cuda, tensorrt or python. Default: what the server can run.")
    ] = None,
    instances: Annotated[
        int | None, typer.Option(help="Copies of the classifier. Default: the repository's number.")
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(help="Program or its folder. Default: the first one found."),
    ] = None,
    log_file: Annotated[Path | None, typer.Option(help="Where the server's whole log goes.")] = None,
    startup_timeout_s: Annotated[float, typer.Option(help="For loading and warming up.")] = 300.0,
    drain_timeout_s: Annotated[float, typer.Option(help="For requests to finish when stopping.")] = 30.0,
    trust: TrustOption = None,
    digest: DigestOption = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the tritonserver command and start nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a model repository until Ctrl-C or SIGTERM; ready only after a self-test through the wire."""
    from cbpt_runtime.serving import ServeConfig, running_server
    from cbpt_runtime.serving.config import require_free_page_port

    config = ServeConfig(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        profile=profile,
        instances=instances,
        tritonserver=tritonserver,
        log_file=log_file,
        startup_timeout_s=startup_timeout_s,
        drain_timeout_s=drain_timeout_s,
        allow_foreign_code=allow_foreign_code,
        host_names=frozenset(name.lower() for name in allow_host or ()),
    )
    asked = given_trust(trust, digest)
    if print_command:
        _print_command(repository, config, asked, as_json=as_json)
        return
    if ui_port is not None:
        require_free_page_port(ui_port)
    print_note(f"verifying {repository} and starting a server")
    with (
        running_server(repository, config, trust=asked, tell=print_note) as server,
        _page(server, ui_port) as page,
    ):
        _print_ready(server, page, as_json=as_json)
        _wait(server)
        print_note("stopping: requests on their way are finished first")


@contextmanager
def _page(server: RunningServer, port: int | None) -> Iterator[str | None]:
    """Serve a page for people while the block runs and give its URL; None when none is wanted."""
    if port is None:
        yield None
        return
    from cbpt_runtime.serving.page import UiServer

    repository = server.plan.repository
    limit = repository.manifest.profile.max_image_bytes
    with UiServer(
        server.config.http_url,
        repository.name,
        port=port,
        max_image_bytes=limit,
        alarm_threshold=repository.manifest.alarm_threshold,
    ) as page:
        yield page.url


def _wait(server: RunningServer) -> None:
    """Until a signal comes or the server ends."""
    with _signals() as stopped:
        while not stopped.wait(_POLL_S):
            server.require_running()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C or SIGTERM sets; the next one interrupts as usual."""
    stopped = threading.Event()
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: Any) -> None:
        stopped.set()
        for number, handler in earlier.items():
            signal.signal(number, handler)

    for number in earlier:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _print_ready(server: RunningServer, page: str | None, *, as_json: bool) -> None:
    import sys

    plan, config, selftest = server.plan, server.config, server.selftest
    name = plan.repository.name
    if as_json:
        print_json(
            {
                "ready": True,
                "model": name,
                "http": config.http_url,
                "grpc": config.grpc_url,
                "metrics": config.metrics_url,
                "page": page,
                "pid": server.process.pid,
                "tritonserver": {
                    "path": str(plan.server.executable),
                    "origin": plan.server.origin,
                    "version": server.version,
                },
                "backend": plan.placement.backend,
                "provider": plan.placement.provider,
                "instances": plan.placement.instances,
                "threads": plan.placement.threads,
                "repository_digest": plan.repository.digest,
                "selftest": {
                    "images": selftest.images,
                    "largest_difference": selftest.largest_difference,
                    "note": selftest.note,
                },
            }
        )
    else:
        pairs = {
            "ready": f"{name}, {plan.repository.manifest.classes} classes; self-test of {selftest.images} "
            f"images over HTTP and gRPC passed, largest difference {selftest.largest_difference:.2g}",
            "digest": plan.repository.digest,
            "server": f"tritonserver {server.version} ({plan.server.origin}), {plan.placement.describe()}",
            "http": config.http_url,
            "grpc": config.grpc_url,
            "metrics": config.metrics_url,
        }
        if page is not None:
            pairs["page"] = page
        print_pairs(pairs | {"next": f"cbpt-runtime classify --url {config.grpc_url} photo.jpg"})
    sys.stdout.flush()


def _print_command(repository: Path, config: Any, trust: Trust, *, as_json: bool) -> None:
    from cbpt_runtime.serving.triton.command import require_plain, shell_text
    from cbpt_runtime.serving.triton.startup import make_plan

    plan = make_plan(repository, config, trust=trust, must_be_free=False)
    backends = plan.server.executable.parent.parent / "backends"
    for path in (repository.absolute(), backends):
        require_plain(path)
    command = plan.command(repository=repository.absolute(), backends=backends)
    # This process's name for its shared memory is not for one that outlives it.
    arguments = [word for word in command.arguments if command.region_prefix not in word]
    if as_json:
        print_json({"command": arguments})
    else:
        typer.echo(shell_text(arguments))
    print_note(f"digest of {repository}: {plan.repository.digest}")
    print_note("note: by itself it answers anybody, web pages included; `serve` puts a guard in front")
    if plan.repository.ignored:
        print_note(f"note: by itself it minds what `serve` ignores: {', '.join(plan.repository.ignored)}")
    if plan.placement.configs:
        print_note("note: by itself it uses the instances and threads of the repository, not of this machine")
    if plan.server.wheel is not None:
        print_note(
            "note: nvidia-pytriton's server also needs its stub and libraries set up; `serve` does that"
        )
