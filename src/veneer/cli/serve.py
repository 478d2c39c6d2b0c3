"""``veneer serve --base MODEL --adapters DIR``: the OpenAI API over one base, with every adapter as a model.

Clients also upload files and start fine-tuning jobs, which train on the same base while it serves. Ctrl-C saves the running jobs and
stops; the same command goes on with them. ``--replay TRACE`` runs a trace of requests in place of serving, and compares each answer with
the same request alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import note, status
from veneer.checkpoints.locate import QUANTIZED
from veneer.cli._parser import add_device, add_dtype, at_least, number
from veneer.errors import ConfigError, listed

if TYPE_CHECKING:
    from veneer.serve.loading import EngineOptions
    from veneer.serve.server import Server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", default="smollm2-135m", metavar="MODEL", help="base model (default: smollm2-135m)")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="folder of adapters and runs to serve")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("veneer-state"),
        metavar="DIR",
        help="folder for keys, files and jobs (default: veneer-state)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than the loopback address need a key (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=at_least(0, 65535), default=8000, help="port to listen on; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="also answer under this host name, such as that of a proxy; repeat for several",
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="file with VENEER_API_KEY=... and VENEER_ADMIN_KEY=... (default: the environment, else generated keys)",
    )
    _add_limits(parser)
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="serve from replicas in a Ray cluster: HOST:PORT, or auto, the one that this machine belongs to",
    )
    parser.add_argument(
        "--replicas", type=at_least(1), default=2, metavar="N", help="replicas in the cluster (default: 2)"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="TRACE",
        help="in place of serving, run a trace of requests (JSON lines) and compare each answer with the same request alone",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments about jobs, the cache, waiting requests and the base in memory."""
    parser.add_argument(
        "--jobs", type=at_least(1), default=2, metavar="N", help="fine-tuning jobs that run at once (default: 2)"
    )
    parser.add_argument(
        "--training-share",
        type=number("more than 0 and less than 1", lambda value: 0 < value < 1),
        default=0.5,
        metavar="F",
        help="part of the time that jobs may take while requests run (default: 0.5)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=at_least(16),
        metavar="N",
        help="tokens whose keys and values are kept (default: four contexts)",
    )
    parser.add_argument(
        "--adapter-slots",
        type=at_least(1),
        default=64,
        metavar="N",
        help="adapters kept on the device, in addition to those in use (default: 64)",
    )
    parser.add_argument(
        "--adapters-in-memory",
        type=at_least(1),
        default=256,
        metavar="N",
        help="adapters kept in memory; others are read again when a request names them (default: 256)",
    )
    parser.add_argument(
        "--max-waiting", type=at_least(1), default=10_000, metavar="N", help="requests that may wait (default: 10000)"
    )
    parser.add_argument(
        "--drain",
        type=number("0 or more", lambda value: value >= 0),
        default=10.0,
        metavar="SECONDS",
        help="time for running answers when the server stops (default: 10)",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", *QUANTIZED),
        default="none",
        help="quantize the base while it is read (default: none)",
    )
    add_device(parser)
    parser.add_argument("--log-requests", action="store_true", help="log a line per request, without its text")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"veneer serve needs {error.name}, which is not installed; install it with: pip install 'veneer[serve]'"
        ) from None
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("veneer.serve.access").setLevel(logging.INFO if args.log_requests else logging.WARNING)
    if args.cluster is not None:
        return _replicas(args)
    if args.replay is not None:
        return _replay(args)
    with status(f"loading {args.base}"):
        server = _server(args)
    print(start_screen(server), flush=True)
    server.run()
    return 0


def _options(args: argparse.Namespace) -> EngineOptions:
    """The base and the limits of an engine on it."""
    from veneer.serve.engine.adapters import AdapterLimits
    from veneer.serve.engine.engine import EngineLimits
    from veneer.serve.loading import EngineOptions

    if args.adapters is not None and not args.adapters.is_dir():
        raise ConfigError(f"--adapters {args.adapters}: no such folder")
    return EngineOptions(
        base=args.base,
        dtype=args.dtype,
        device=args.device,
        quantize=None if args.quantize == "none" else args.quantize,
        adapters=args.adapters,
        limits=EngineLimits(
            cache_tokens=args.cache_tokens,
            waiting=args.max_waiting,
            background_share=args.training_share,
            adapters=AdapterLimits(args.adapter_slots, args.adapters_in_memory),
        ),
    )


def _server(args: argparse.Namespace) -> Server:
    from veneer.serve.loading import load_engine
    from veneer.serve.server import ServeOptions, Server

    base, bank, engine = load_engine(_options(args))
    options = ServeOptions(
        state=args.state,
        adapters=args.adapters,
        host=args.host,
        port=args.port,
        allow_hosts=tuple(args.allow_host),
        key_file=args.key_file,
        parallel_jobs=args.jobs,
        drain_seconds=args.drain,
    )
    return Server(base, bank, engine, options)


def _replay(args: argparse.Namespace) -> int:
    """Run a trace; a difference is an error."""
    from veneer.serve.loading import load_served_base
    from veneer.serve.replay import Replay, require, summary
    from veneer.serve.trace import read_trace

    if args.adapters is None:
        raise ConfigError("--replay needs --adapters DIR, the folder that the trace's adapters are in")
    steps, options = read_trace(args.replay), _options(args)
    with status(f"loading {args.base}"):
        base, bank = load_served_base(options)
    report = Replay(base.model, base.tokenizer, bank, args.adapters, options.limits).run(steps, note)
    print(summary(report), flush=True)
    require(report)
    return 0


def _replicas(args: argparse.Namespace) -> int:
    """Serve from the machines of a Ray cluster."""
    from veneer.serve.replicas.ray_application import RayOptions, serve_on_ray

    if args.replay is not None:
        raise ConfigError("--replay runs on one machine; leave out --cluster")
    options = RayOptions(
        cluster=args.cluster,
        replicas=args.replicas,
        engine=_options(args),
        state=args.state,
        host=args.host,
        port=args.port,
        allow_hosts=tuple(args.allow_host),
        key_file=args.key_file,
        drain_seconds=args.drain,
    )
    serve_on_ray(options, say=lambda line: print(line, flush=True))
    return 0


def start_screen(server: Server) -> str:
    """The lines that tell where the server is, what it serves, and how to call it."""
    cards = [card for card in server.registry.cards() if ":" not in card.id]
    names = [card.id for card in cards]
    lines = [f"Veneer serves at {server.url}", f"  key      {server.keys.source}", f"  models   {listed(names, 12)}"]
    lines += [f"  problem  {name}: {problem}" for name, problem in server.problems.items()]
    waiting = len(server.context.jobs.with_status("validating_files", "queued", "running"))
    if waiting:
        lines.append(f"  jobs     {waiting} to go on with")
    if str(server.options.state / "keys") in server.keys.source:
        lines += ["", "In another shell:", f"  export $(grep VENEER_API_KEY {server.options.state / 'keys'})"]
    body = f'{{"model": "{names[-1]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines += [
        "",
        f"  curl {server.url}/chat/completions -H \"Authorization: Bearer $VENEER_API_KEY\" -H 'Content-Type: application/json' \\",
        f"    -d '{body}'",
        "",
        "From Python:",
        f'  client = openai.OpenAI(base_url="{server.url}", api_key=os.environ["VENEER_API_KEY"])',
        f'  client.chat.completions.create(model="{names[-1]}", messages=[{{"role": "user", "content": "Hello"}}])',
        "",
        "Ctrl-C lets running answers end and stops the server.",
    ]
    return "\n".join(lines)
