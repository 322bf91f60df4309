"""A peer's process: answers each line of JSON on its input by one on its output, until the input ends.

``open`` (a file of inputs, truth and allowed errors) holds the peer against the gate; ``warm_up``, ``turn`` and
``peak`` then time and weigh it by the same code as every other provider; ``close`` drops the case.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

import torch

from genkernels._machine import keep_freed_memory
from genkernels.benchmarks import peers
from genkernels.benchmarks.measure import WIDE_FLOOR, Inputs, Standard, Work, values


class Worker:
    def __init__(self, peer: str):
        self.peer = peer
        self.work: Work | None = None

    def open(self, file: str) -> dict:
        problem = torch.load(file, weights_only=False)  # our own parent wrote it
        torch.set_num_threads(problem["threads"])
        direction = problem["direction"]
        module = peers.adapters(problem["operator"])
        if hasattr(module, "open_step"):  # whole models, not operators
            fault, self.work = module.open_step(self.peer, problem)
            return {"fault": fault}
        adapter = module.adapter(self.peer, problem["settings"], direction, problem["shape"])
        ours = Inputs(problem["args"], problem["cotangents"], problem["constants"])
        # arranging inside the graph brings the gradients back into our layout, for the gate alone
        produced = values(lambda *args: adapter.op(*adapter.arrange(*args)), ours.fresh(direction), direction)
        fault = Standard(**problem["standard"]).fault(produced, floor=WIDE_FLOOR, same_dtypes=False)
        if not fault:
            arranged = tuple(t.contiguous() for t in adapter.arrange(*ours.args))
            theirs = Inputs(arranged, ours.cotangents, ours.constants if adapter.arrange is peers.as_they_are else ())
            sets = [theirs.fresh(direction) for _ in range(problem["sets"])]
            self.work = Work(adapter.op, sets, direction)
        return {"fault": fault}

    def warm_up(self) -> dict:
        return {"seconds": self.work.warm_up()}

    def turn(self) -> dict:
        time.sleep(0.002)  # lets the idle threads of the other processes fall asleep
        return {"seconds": self.work.turn()}

    def peak(self) -> dict:
        return {"bytes": self.work.peak_bytes()}

    def close(self) -> dict:
        self.work = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {}


def main(peer: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    importlib.import_module(peer)
    keep_freed_memory()
    worker = Worker(peer)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(worker, message.pop("do"))(**message)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
