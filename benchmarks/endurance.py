"""Threads that serve a converted model while others load checkpoints into it, convert, simulate and force kernels.

    python -m benchmarks.endurance --seconds 60

Every answer is checked, bit for bit: a model whose checkpoints change gives that of one of them, layer by layer, and a
model that is left alone gives its own. Prints how many answers there were, and exits with 1 if one was wrong.
"""

import argparse
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from torchq import QConfig, convert, kernels, simulate

DATA = [torch.randn(64, 256, generator=torch.Generator().manual_seed(i)) for i in range(3)]
X = [torch.randn(m, 256, generator=torch.Generator().manual_seed(m)) for m in (1, 48)]  # keeps the GIL; gives it away
STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")


def network() -> nn.Module:
    """Codes between its layers, if static."""
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()


def checkpoints(config: QConfig) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A converted model, and the states of two like it."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = convert(network(), DATA, config=config)
        states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
    return model, states


def answers(model: nn.Module, states: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """For each input, what the model may answer. Each of its two layers has all of one state.

    The second may read codes in the range of the other: the range is taken when the codes are made.
    """
    found: list[list[Tensor]] = [[] for _ in X]
    for first, second, made in itertools.product(states, repeat=3):
        codes = {key: made[key] for key in made if key.startswith("2.input")}
        model.load_state_dict({**second, **{key: first[key] for key in first if key.startswith("0.")}, **codes})
        for right, x in zip(found, X, strict=True):
            right.append(model(x))
    model.load_state_dict(states[0])
    return found


class Endurance:
    """What all threads share: whether it is over, and what they have seen."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.errors: list[BaseException] = []

    def check(self, who: str, y: Tensor, right: list[Tensor]) -> None:
        """Counts an answer."""
        self.seen[who] += 1
        if not any(torch.equal(y, other) for other in right):
            self.wrong[who] += 1

    def again_and_again(self, work: Callable[[int], None]) -> threading.Thread:
        """A thread that calls `work` with 0, 1, 2, ... until all is over."""

        def run() -> None:
            try:
                for i in itertools.count():
                    if self.over.is_set():
                        return
                    work(i)
            except BaseException as error:
                self.errors.append(error)

        return threading.Thread(target=run)


def threads(endurance: Endurance, servers: int) -> list[threading.Thread]:
    """So many that serve, and five that disturb them."""
    torch.manual_seed(2)
    source = network()
    alone = convert(source, DATA, config=STATIC)
    still = [[alone(x)] for x in X]
    with simulate():
        simulated = [[alone(x)] for x in X]
    static, static_states = checkpoints(STATIC)
    dynamic, dynamic_states = checkpoints(QConfig(activation="dynamic"))
    changing = {
        "static": (static, answers(static, static_states)),
        "dynamic": (dynamic, answers(dynamic, dynamic_states)),
    }

    def serve(i: int) -> None:
        who = ("still", "static", "dynamic")[i % 3]
        model, right = (alone, still) if who == "still" else changing[who]
        endurance.check(who, model(X[i % 2]), right[i % 2])

    def load(i: int) -> None:
        """The same checkpoint, and the other one."""
        static.load_state_dict(static_states[i // 2 % 2])
        dynamic.load_state_dict(dynamic_states[i // 2 % 2])

    copy, _ = checkpoints(QConfig(activation="dynamic"))

    def save(i: int) -> None:
        copy.load_state_dict(dynamic.state_dict())
        endurance.check("saved", copy(X[i % 2]), changing["dynamic"][1][i % 2])

    def convert_again(i: int) -> None:
        again = convert(source, DATA, config=STATIC)
        endurance.check("converted", again(X[i % 2]), still[i % 2])

    def simulate_it(i: int) -> None:
        with simulate():
            endurance.check("simulated", alone(X[i % 2]), simulated[i % 2])
        endurance.check("after simulate()", alone(X[i % 2]), still[i % 2])

    def force(i: int) -> None:
        names = kernels.runnable()
        with kernels.use(names[i % len(names)]) if i % 2 else nullcontext():
            endurance.check("under use()", alone(X[i % 2]), still[i % 2])

    disturbing = [load, save, convert_again, simulate_it, force]
    return [endurance.again_and_again(work) for work in [*[serve] * servers, *disturbing]]


def main() -> int:
    """Runs it, and gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8, help="that serve; five more disturb them")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # Python's threads take turns 50 times as often
    endurance = Endurance()
    running = threads(endurance, arguments.threads)
    for thread in running:
        thread.start()
    time.sleep(arguments.seconds)
    endurance.over.set()
    for thread in running:
        thread.join()
    for who, number in endurance.seen.items():
        print(f"{who:18} {number:8} answers, {endurance.wrong[who]} wrong")
    for error in endurance.errors:
        print(f"error: {error!r}")
    total, wrong = sum(endurance.seen.values()), sum(endurance.wrong.values())
    print(f"{arguments.threads} threads x {arguments.seconds:g} s: {total} answers, {wrong} wrong")
    return 1 if wrong or endurance.errors else 0


if __name__ == "__main__":
    sys.exit(main())
