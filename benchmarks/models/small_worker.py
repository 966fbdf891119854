"""Times one model on a small input, where Python takes most of the time: a worker process of
`compare_checkouts.py`, which imports the package of whichever checkout PYTHONPATH names."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import fused_resnet as fr


def make(case: dict[str, Any]) -> Any:
    """A function without arguments that runs the case once and returns its output."""
    torch.manual_seed(0)
    name = case["model"]
    depth = name.removeprefix("cifar_resnet")
    model = fr.cifar_resnet(int(depth)) if depth != name else fr.get_model(name)
    x = torch.randn(case["batch"], 3, case["size"], case["size"])
    dtype = getattr(torch, case["dtype"])
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    if case["mode"] == "infer":
        model.eval()

        def run() -> torch.Tensor:
            with torch.no_grad(), autocast:
                return model(x)

    else:
        x = x if case["size"] > 32 else x.repeat(2, 1, 1, 1)[: max(2, case["batch"])]
        target = torch.zeros(len(x), dtype=torch.int64)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def run() -> torch.Tensor:
            optimizer.zero_grad()
            with autocast:
                y = model(x)
                loss = torch.nn.functional.cross_entropy(y, target)
            loss.backward()
            optimizer.step()
            return y.detach()

    return run


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    run = make(request["case"])
    output = run().float().flatten().tolist()
    for _ in range(5):
        run()
    begin = time.perf_counter()
    run()
    repeats = max(1, int(0.1 / (time.perf_counter() - begin)))
    for line in sys.stdin:
        if line.strip() == "enter":
            print(json.dumps({"output": output}), flush=True)
            continue
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        print(json.dumps((time.perf_counter() - begin) / repeats), flush=True)


if __name__ == "__main__":
    main()
