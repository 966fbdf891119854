"""Weights that are written while other threads infer."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.models.model_helpers import agree, both_ways, images, pair, randomise


@both_ways
@pytest.mark.refused  # values are written between the two calls of a comparison
@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "data"])
def test_writers_and_readers(how):
    """After the last write every answer is right. During the writes an answer is finite."""
    stock, mine = pair("basic")
    x = images(1, 32)
    states = []
    for seed in (0, 1):
        randomise(stock, seed)
        with torch.no_grad():
            for i, p in enumerate(stock.parameters()):
                if p.dim() == 4:
                    generator = torch.Generator().manual_seed(100 * seed + i)
                    p.copy_(torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5)
        states.append({k: v.clone() for k, v in stock.state_dict().items()})
    stop, errors = threading.Event(), []

    def read() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    assert mine(x).isfinite().all()
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        own = mine.state_dict(keep_vars=True)
        for turn in range(24):
            # Never the same values twice: through `.data`, old values that come back while a plan
            # is made look like no write at all.
            now = {
                k: v * (1 + turn / 100) if v.is_floating_point() else v
                for k, v in states[turn % 2].items()
            }
            if how == "load_state_dict":
                mine.load_state_dict(now)
            else:
                for key, value in now.items():
                    with torch.no_grad():
                        (own[key] if how == "copy_" else own[key].data).copy_(value)
            if turn % 8 == 7:  # while the readers go on
                stock.load_state_dict(now)
                with torch.no_grad():
                    agree(mine(x), stock(x))
    finally:
        stop.set()
    for reader in readers:
        reader.join(60)
    assert not errors, errors
    with torch.no_grad():
        for _ in range(2):
            agree(mine(x), stock(x))
