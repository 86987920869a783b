"""A service that answers from several threads: one int8 model, loaded from one file.

    python examples/serving.py --check        # starts it, asks from 8 threads, compares every answer, stops
    python examples/serving.py --port 8000    # goes on; then: curl -d '{"pixels": [0.0, ...]}' localhost:8000

It uses FastAPI, whose plain functions run on a pool of threads, or else Python's own http.server. Three things matter:
one thread of torch for each call, since the calls themselves are parallel; `inference_mode`; and as many calls at a
time as there are cores.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from data import digits
from torch import nn

import torchq


def network() -> nn.Module:
    """Gives the float model's class; no weights of it are needed to load the int8 ones."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


def make_file(path: Path) -> None:
    """Trains, converts and saves. This happens elsewhere, once."""
    torch.manual_seed(0)
    model, (images, labels) = network(), digits()[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torchq.save(torchq.convert(model, images.split(64)), path)


class Service:
    """Answers requests, from any thread."""

    def __init__(self, path: Path) -> None:
        torch.set_num_threads(1)
        with torch.device("meta"):
            empty = network()
        self.model = torchq.load(path, empty)
        self.turns = threading.Semaphore(os.cpu_count() or 1)

    def answer(self, request: dict[str, list[float]]) -> dict[str, object]:
        """{"pixels": 64 numbers} -> {"digit": ..., "logits": ...}."""
        with self.turns, torch.inference_mode():
            logits = self.model(torch.tensor([request["pixels"]]))[0]
        return {"digit": int(logits.argmax()), "logits": logits.tolist()}


def fastapi_server(service: Service, port: int):
    """Gives what runs the service by FastAPI, and what stops it."""
    import fastapi
    import uvicorn

    app = fastapi.FastAPI()
    app.post("/")(service.answer)  # no `async`: FastAPI calls it on a thread of its pool
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    return server.run, lambda: setattr(server, "should_exit", True)


def plain_server(service: Service, port: int):
    """The same by http.server, which has a thread for each connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(service.answer(json.loads(body))).encode())

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)

    def serve() -> None:
        with server:  # closes the socket in the end
            server.serve_forever()

    return serve, server.shutdown


def ask(port: int, image: torch.Tensor) -> dict[str, object]:
    """Sends one image."""
    data = json.dumps({"pixels": image.tolist()}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def check(service: Service, port: int, requests: int) -> None:
    """Asks from 8 threads, and compares with the model called alone."""
    images, labels = (tensor[:requests] for tensor in digits()[1].tensors)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: ask(port, image), images))
    with torch.inference_mode():
        alone = [service.model(image[None])[0].tolist() for image in images]
    same = sum(answer["logits"] == logits for answer, logits in zip(answers, alone, strict=True))
    right = sum(answer["digit"] == label for answer, label in zip(answers, labels.tolist(), strict=True))
    print(f"{len(answers)} answers to 8 threads: {same} the same as alone, bit for bit; {right} right")


def main() -> None:
    """Makes the file, serves, and with --check asks and stops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--plain", action="store_true", help="http.server, though FastAPI is there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        make_file(path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
        service = Service(path)
    try:
        run, stop = plain_server(service, options.port) if options.plain else fastapi_server(service, options.port)
    except ImportError:
        run, stop = plain_server(service, options.port)
    if not options.check:
        run()
        return
    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(options.port)
        check(service, options.port, options.requests)
    finally:
        stop()
        thread.join()


def wait_for(port: int) -> None:
    """Returns as soon as somebody listens."""
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")


if __name__ == "__main__":
    main()
