"""Several replicas of a camelid server behind Ray Serve's proxy: `ray_serve.py MODEL [--replicas N] [--port P]`.

Needs `pip install 'camelid[serve]' 'ray[serve]'`. Each replica has an engine of its own; a request goes to the one with
the shortest queue. Keys are those of CAMELID_API_KEY, as for `camelid serve`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray import serve


def application(model: str, threads: int, quantization: str | None) -> Any:
    """The ASGI application of one replica; built in the replica's own process."""
    from camelid.generate.engine import Engine
    from camelid.serve.app import Service, app_of
    from camelid.serve.auth import Keys

    engine = Engine.from_pretrained(model, quantization, threads)
    # Ray's proxy checks nothing: the replica asks for the key and looks at the host itself.
    return app_of(Service(engine, Path(model).name, Keys()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    model = str(Path(options.model).resolve())

    @serve.deployment(
        num_replicas=options.replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": options.threads},
    )
    @serve.ingress(lambda: application(model, options.threads, options.quantization))
    class Camelid:
        pass

    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(Camelid.bind(), blocking=True)


if __name__ == "__main__":
    main()
