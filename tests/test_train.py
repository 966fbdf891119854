"""A run of training: its data, its optimizers, its steps, and what goes wrong in them."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train_helpers import config, losses, rows  # isort: skip - it skips where something is missing

import fused_resnet as fr
from fused_resnet.train import Config, NonFinite, OutOfMemory, Trainer, checkpointing, data, run
from fused_resnet.train.data import Batches
from fused_resnet.train.distributed import Place
from fused_resnet.train.optim import Lamb, make_optimizer, make_schedule

HERE = Place(0, 1, torch.device("cpu"))


# --- optimizers and schedule ----------------------------------------------------------------------


def lamb_by_the_paper(w, gradients, lr, b1, b2, eps, decay):
    """Algorithm 2 of You et al. 2019, on lists of numbers."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g, strict=True)]
        r = [
            (a / (1 - b1**t)) / ((b / (1 - b2**t)) ** 0.5 + eps) for a, b in zip(m, v, strict=True)
        ]
        u = [a + decay * b for a, b in zip(r, w, strict=True)]
        size, length = sum(a * a for a in w) ** 0.5, sum(a * a for a in u) ** 0.5
        ratio = size / length if size > 0 and length > 0 else 1.0
        w = [a - lr * ratio * b for a, b in zip(w, u, strict=True)]
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", ["random", "zero"])
def test_lamb_is_the_papers(start, decay):
    w = torch.randn(7, dtype=torch.float64) * (start == "random")
    gradients = torch.randn(4, 7, dtype=torch.float64)
    want = lamb_by_the_paper(w.tolist(), gradients.tolist(), 0.03, 0.9, 0.99, 1e-6, decay)
    p = nn.Parameter(w.clone())
    optimizer = Lamb([p], lr=0.03, betas=(0.9, 0.99), weight_decay=decay)
    for g in gradients:
        p.grad = g
        optimizer.step()
    assert torch.allclose(p, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_lamb_names_what_is_wrong():
    p = [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        Lamb(p, lr=-1)
    with pytest.raises(ValueError, match=r"betas must be .* got \(0.9, 1.0\)"):
        Lamb(p, betas=(0.9, 1.0))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_biases_and_norms_do_not_decay(name):
    model = fr.cifar_resnet(8)
    optimizer = make_optimizer(name, model, 0.1, 0.9, 0.5)
    by_id = {id(p): n for n, p in model.named_parameters()}
    decays = {by_id[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(by_id)
    for key, value in decays.items():
        weighs = "conv" in key or key == "fc.weight"
        assert value == (0.5 if weighs else 0.0), key
    # Without a gradient nothing but decay moves a weight: norms stay.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    norm, conv = model.bn1.weight.clone(), model.conv1.weight.clone()
    optimizer.step()
    assert torch.equal(model.bn1.weight, norm)
    assert not torch.equal(model.conv1.weight, conv)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    import math

    optimizer = make_optimizer("sgd", nn.Linear(2, 2), 0.8, 0.9, 0.0)
    schedule = make_schedule(optimizer, 50, 10)
    seen = []
    for _ in range(50):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    want = [0.8 * (0.01 + 0.99 * t / 10) for t in range(10)]
    want += [0.8 * (1 + math.cos(math.pi * t / 40)) / 2 for t in range(40)]
    assert seen == pytest.approx(want, abs=1e-9)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.0, abs=1e-9)


# --- data -----------------------------------------------------------------------------------------


def indices(**options):
    return [[i for _, i in batch] for batch in Batches(**options)]


def test_an_epochs_order_is_its_own_and_goes_on_anywhere():
    whole = indices(count=103, batch=10, seed=1, epoch=3)
    assert [len(b) for b in whole] == [10] * 10
    seen = [i for b in whole for i in b]
    assert len(set(seen)) == 100 and set(seen) <= set(range(103))
    assert indices(count=103, batch=10, seed=1, epoch=3, first=7) == whole[7:]
    assert indices(count=103, batch=10, seed=1, epoch=4) != whole
    assert indices(count=103, batch=10, seed=2, epoch=3) != whole
    left_out = {i for e in range(20) for i in set(range(103)) - set(
        j for b in indices(count=103, batch=10, seed=1, epoch=e) for j in b)}  # fmt: skip
    assert len(left_out) > 30  # three of an epoch, others in the next


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_batch(processes):
    whole = indices(count=60, batch=12, seed=1, epoch=0)
    parts = [
        indices(count=60, batch=12, seed=1, epoch=0, rank=r, processes=processes)
        for r in range(processes)
    ]
    for i, batch in enumerate(whole):
        shares = [part[i] for part in parts]
        assert sorted(x for share in shares for x in share) == sorted(batch)
        assert {len(share) for share in shares} == {12 // processes}


@pytest.mark.parametrize("count", [21, 20, 1])
def test_every_test_image_counts_once(count):
    seen, lengths = [], set()
    for rank in range(3):
        batches = Batches(count, 10, rank=rank, processes=3, training=False)
        own = list(batches)
        lengths.add(len(own))
        assert len(batches) == len(own)
        for i, batch in enumerate(own):
            seen += [index for _, index in batch] if batches.counted(i) else []
    assert sorted(seen) == list(range(count))
    assert len(lengths) == 1  # a forward of sharded parameters needs every process


def test_an_images_augmentation_is_its_own():
    part = data.load("digits", None, 8).train
    batches = [Batches(40, 20, seed=5, epoch=2) for _ in range(3)]
    state = torch.get_rng_state()
    first = [x for x, _, _ in data.loader(part, batches[0], 5, 0)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are taken
    torch.rand(3)
    workers = [x for x, _, _ in data.loader(part, batches[1], 5, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, workers, strict=True))
    other = [x for x, _, _ in data.loader(part, Batches(40, 20, seed=5, epoch=3), 5, 0)]
    order = [i for batch in batches[2] for _, i in batch]
    later = [i for batch in Batches(40, 20, seed=5, epoch=3) for _, i in batch]
    a, b = torch.cat(first), torch.cat(other)
    same = [torch.equal(a[order.index(i)], b[later.index(i)]) for i in range(40)]
    assert 0 < sum(same) < 20  # nine shifts of a pixel


def test_the_digits_are_whole_and_normalised():
    from sklearn.datasets import load_digits

    found = data.load("digits", None, 8)
    assert len(found.train.items) == 1437 and len(found.test.items) == 360
    raw = load_digits()
    for i in (0, 1, 77):  # every fifth is for testing
        image, label = found.test.items[i]
        x = found.test.transform(image)
        want = torch.from_numpy(raw.images[5 * i]).float()
        corner, step = x[0, 0, 0] - want[0, 0] * (s := (x[0].max() - x[0].min()) / want.max()), s
        assert label == raw.target[5 * i]
        assert torch.allclose(x[0], want * step + corner, atol=0.02)  # rounded to 8 bits
        assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
    pixels = torch.stack([found.test.transform(image) for image, _ in found.test.items])
    assert abs(pixels.mean()) < 0.05 and abs(pixels.std() - 1) < 0.05
    resized = data.load("digits", None, 64).train
    assert resized.transform(resized.items[0][0]).shape == (3, 64, 64)


def cifar_on_disk(folder: Path, monkeypatch) -> None:
    """A CIFAR-10 of 20 and 8 images in the format of the real one, whose checksums are waived."""
    from torchvision.datasets import CIFAR10

    base = folder / "cifar-10-batches-py"
    base.mkdir()
    values = torch.arange(28)[:, None].expand(-1, 3072).to(torch.uint8).numpy() * 9
    for name, part in (("data_batch_1", slice(0, 20)), ("test_batch", slice(20, 28))):
        labels = [i % 10 for i in range(28)][part]
        (base / name).write_bytes(pickle.dumps({"data": values[part], "labels": labels}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def test_cifar_10_from_disk(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--root must hold CIFAR-10"):
        data.load("cifar10", str(tmp_path), 32)
    cifar_on_disk(tmp_path, monkeypatch)
    found = data.load("cifar10", str(tmp_path), 32)
    assert found.classes[3] == "c3"
    assert [label for _, label in found.train.items] == [i % 10 for i in range(20)]
    image, _ = found.test.items[2]
    want = (22 * 9 % 256 / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    )
    assert torch.allclose(found.test.transform(image), want[:, None, None].expand(3, 32, 32))
    cropped = found.train.transform(found.train.items[19][0])
    assert cropped.shape == (3, 32, 32)


def images_on_disk(folder: Path, each: int = 8) -> list[Path]:
    """Two classes of bright and of dark images, and among them files that are none."""
    from PIL import Image

    torch.manual_seed(0)
    for label, level in (("bright", 200), ("dark", 40)):
        (folder / label).mkdir(parents=True)
        for i in range(each):
            noise = torch.randint(0, 40, (20 + i, 24, 3)).add(level).to(torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / label / f"{i}.png")
    whole = (folder / "bright" / "1.png").read_bytes()
    (folder / "bright" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dark" / "2.png").write_text("not an image")
    Image.new("L", (1, 1), 30).save(folder / "dark" / "3.png")
    Image.new("CMYK", (30, 20), (200, 200, 200, 60)).save(folder / "dark" / "4.jpg")
    return [folder / "bright" / "1.png", folder / "dark" / "2.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_of_a_folder_are_named_and_the_others_go_on(tmp_path, workers):
    bad = images_on_disk(tmp_path / "images")
    warned: list[str] = []
    made = config(
        tmp_path / "run", data="folder", root=str(tmp_path / "images"), batch=6, epochs=3,
        workers=workers, image_size=16,
    )  # fmt: skip
    run(made, warn=warned.append)
    for path in bad:
        assert sum(str(path) in line for line in warned) == 1, warned
    assert len(warned) == len(bad)
    assert len([r for r in rows(tmp_path / "run") if "loss" in r]) == 3 * 2  # 13 images of 17


def test_an_unreadable_test_image_is_not_counted(tmp_path):
    from PIL import Image

    for part, count in (("train", 6), ("val", 3)):
        for label, level in (("bright", 220), ("dark", 20)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / part / label / f"{i}.png")
    (tmp_path / "val" / "dark" / "0.png").write_text("not an image")
    found = data.load("folder", str(tmp_path), 16)
    assert found.classes == ["bright", "dark"] and len(found.test.items) == 6

    class Bright(nn.Module):  # tells all that can be read right, and a stand-in wrong
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            light = x.mean((1, 2, 3)) + 0 * self.w
            return torch.stack([light, -light], 1)

    trainer = Trainer(config(tmp_path / "run", batch=4), 2, 3, HERE, model=Bright())
    said: list[str] = []
    found_test = trainer.test(found.test, 2, said.extend)
    assert found_test.accuracy == 1.0
    assert [line for line in said if line] and "0.png" in "".join(said)
    test = found.test._replace(items=[(p, 1 - label) for p, label in found.test.items])
    assert trainer.test(test, 2, said.extend).accuracy == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "folder of images for each class"),
        (lambda p: (p / "train" / "a").mkdir(parents=True), "val or test beside train"),
        (lambda p: (p / "a").mkdir(), "folder of images for each class"),
    ],
    ids=["no classes", "no test set", "no images"],
)
def test_a_folder_that_is_no_data_set(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"--root must.*{words}"):
        data.load("folder", str(tmp_path), 32)


def test_a_folder_of_no_readable_image(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            (tmp_path / label / f"{i}.png").write_text("no")
    made = config(tmp_path / "run", data="folder", root=str(tmp_path), batch=4)
    with pytest.raises(ValueError, match=r"--root must hold readable images, got none;.*png"):
        run(made)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "resnet19"}, "--model: no ResNet has 19 layers.* 14 or 20, got 'resnet19'"),
        ({"model": "vgg16"}, "--model must be one of resnet18, .*got 'vgg16'"),
        ({"data": "mnist"}, "--data must be one of digits, cifar10, folder, got 'mnist'"),
        ({"data": "cifar10"}, "--root must be a folder, with cifar10 in it.*got None"),
        ({"data": "folder", "root": "/no/such"}, "--root must be a folder.*'/no/such'"),
        ({"optimizer": "adam"}, "--optimizer must be one of sgd, adamw, lamb, got 'adam'"),
        ({"amp": "fp16"}, "--amp must be one of no, bfloat16, float16, got 'fp16'"),
        ({"parallel": "pipeline"}, "--parallel must be one of ddp, fsdp"),
        ({"activation_memory": "none"}, "--activation-memory must be one of full, low"),
        ({"batch": 1}, "--batch must be at least 2, got 1"),
        ({"batch": 10, "accumulate": 4}, "--batch must be a multiple of --accumulate, 4, got 10"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing must be at least 0 and below 1, got 1.0"),
        ({"lr": float("nan")}, "--lr must be at least 0 and below inf, got nan"),
        ({"ema": 1.5}, "--ema must be"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_options_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        Config(**change)


def test_options_that_only_the_data_or_the_processes_show_to_be_bad(tmp_path):
    with pytest.raises(ValueError, match=r"--batch must be at most the 1437 .* got 2000"):
        run(config(tmp_path, batch=2000))
    with pytest.raises(ValueError, match="--parallel fsdp must be run by torchrun"):
        run(config(tmp_path, parallel="fsdp"))
    with pytest.raises(ValueError, match="processes x --accumulate, 3 x 1, got 128"):
        Trainer(config(tmp_path), 10, 11, Place(0, 3, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


def test_the_core_imports_none_of_it():
    code = (
        "import sys, fused_resnet\n"
        "names = {'torchvision', 'torchmetrics', 'sklearn', 'fused_resnet.train'}\n"
        "found = names & set(sys.modules)\n"
        "assert not found, found\n"
        "sys.modules['torchmetrics'] = None\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "gone = ('torchmetrics', 'sklearn')\n"
        "importlib.util.find_spec = lambda n: None if n in gone else find(n)\n"
        "from fused_resnet.train import Config, run\n"
        "try: run(Config(out='never'))\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    want = "training needs torchmetrics and scikit-learn: pip install fused-resnet[train]"
    assert said.stdout.strip() == want, said.stderr


# --- steps ----------------------------------------------------------------------------------------


def digits(count: int = 32):
    part = data.load("digits", None, 8).train
    items = [part.items[i] for i in range(count)]
    return torch.stack([part.transform(x) for x, _ in items]), torch.tensor([y for _, y in items])


def test_a_step_is_the_gradient_of_the_smoothed_loss():
    """Against PyTorch's own operations in a plain loop: loss, gradient norm and weights."""
    x, y = digits()
    made = config("never", batch=32, lr=0.1, warmup=0.0, label_smoothing=0.2, clip=0.5)
    trainer = Trainer(made, 10, 11, HERE)
    torch.manual_seed(made.seed)
    model = fr.cifar_resnet(8).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer("sgd", model, 0.1, 0.9, 1e-4)
    taken = [trainer.step(x, y) for _ in range(2)]
    schedule = make_schedule(optimizer, 22, 0)
    for step in taken:
        optimizer.zero_grad()
        logp = torch.log_softmax(model(x.contiguous(memory_format=torch.channels_last)), 1)
        loss = -(0.8 * logp[range(32), y] + 0.2 * logp.mean(1)).mean()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= 0.5 / norm
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        optimizer.step()
        schedule.step()
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_accumulated_passes_are_one_step():
    """Two halves of a batch: the mean of their gradients, in the model of the whole step."""
    x, y = digits()
    trainer = Trainer(config("never", batch=32, accumulate=2, momentum=0.0), 10, 11, HERE)
    halves = []
    for part in (slice(0, 16), slice(16, 32)):
        other = Trainer(config("never", batch=16, momentum=0.0), 10, 11, HERE)
        other._passes(x[part], y[part])
        halves.append([p.grad for p in other.model.parameters()])
    trainer._passes(x, y)
    for p, a, b in zip(trainer.model.parameters(), *halves, strict=True):
        assert torch.allclose(p.grad, (a + b) / 2, rtol=1e-5, atol=1e-7)


def test_the_average_follows_the_weights_and_is_what_is_tested():
    x, y = digits()
    trainer = Trainer(config("never", batch=32, ema=0.75), 10, 11, HERE)
    want = None
    for _ in range(3):
        trainer.step(x, y)
        now = [t.detach().clone() for t in trainer.model.state_dict().values() if t.dim()]
        want = (
            now if want is None else [0.75 * w + 0.25 * n for w, n in zip(want, now, strict=True)]
        )
    average = [t for t in trainer.average.module.state_dict().values() if t.dim()]
    assert all(torch.allclose(a, w, atol=1e-6) for a, w in zip(average, want, strict=True))
    part = data.load("digits", None, 8).test
    before = trainer.test(part, 10, lambda problems: None)
    with torch.no_grad():
        trainer.model.fc.weight.zero_()
    assert trainer.test(part, 10, lambda problems: None) == before
    assert trainer.model.training


def poison(name: str, trainer: Trainer, x: torch.Tensor) -> None:
    if name == "input":
        x[3, 1, 2, 2] = float("inf")
    elif name == "layer":
        with torch.no_grad():  # finite itself, and so is all before it
            trainer.model.layer2[0].conv1.weight.fill_(3e38)
    elif name == "classifier":
        with torch.no_grad():
            trainer.model.fc.weight.fill_(3e38)
    elif name == "weight":
        with torch.no_grad():
            trainer.model.layer3[0].bn2.bias[1] = float("nan")
    else:
        trainer.model.layer1[0].conv2.weight.register_hook(lambda g: g * float("nan"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("input", "the input"),
        ("layer", "the output of layer2.0.conv1"),
        ("classifier", "the output of fc"),
        ("weight", "the weight layer3.0.bn2.bias, before the step,"),
        ("gradient", "the gradient of layer1.0.conv2.weight"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "amp": "bfloat16"}], ids=["", "amp"])
def test_where_numbers_first_stop_being_finite(name, words, changes):
    x, y = digits()
    trainer = Trainer(config("never", batch=32, **changes), 10, 11, HERE)
    for _ in range(2):
        trainer.step(x, y)
    poison(name, trainer, x)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(NonFinite, match=f"step 3: the loss is .*{words} is the first that is not"):
        trainer.step(x, y)
    after = trainer.model.state_dict()
    assert all(torch.equal(v, after[k]) or v.isnan().any() for k, v in before.items())
    assert trainer.taken == 2 and all(p.grad is None for p in trainer.model.parameters())
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_a_run_that_blows_up_leaves_the_checkpoint_of_the_step_before(tmp_path):
    made = config(tmp_path, lr=1e30, warmup=0.0, checkpoint_every=100)
    with pytest.raises(NonFinite, match=r"step 2: the loss is nan.*is of the step before") as error:
        run(made)
    (kept,) = checkpointing.files(tmp_path)
    assert str(kept) in str(error.value) and kept.name == "checkpoint-00000001.pt"
    state = checkpointing.read(kept)
    assert state["step"] == 1 and all(v.isfinite().all() for v in state["model"].values())
    assert [r["step"] for r in rows(tmp_path)] == [1]


def allocate_far_too_much(module, inputs):
    if len(inputs[0]) > 16:
        torch.empty(2**50, dtype=torch.uint8)


def test_out_of_memory_says_what_helps_and_the_next_step_works():
    x, y = digits()
    trainer = Trainer(config("never", batch=32), 10, 11, HERE)
    twin = Trainer(config("never", batch=32), 10, 11, HERE)
    trainer.model.layer3.register_forward_pre_hook(allocate_far_too_much)
    words = "step 1 did not fit in memory.*--activation-memory low or .*--accumulate 2, a --batch"
    with pytest.raises(OutOfMemory, match=words):
        trainer.step(x, y)
    assert all(p.grad is None for p in trainer.model.parameters())
    for small in (slice(0, 16), slice(16, 32)):
        # As if nothing had happened: the loss and the statistics of one that never failed.
        assert trainer.step(x[small], y[small]) == twin.step(x[small], y[small])
    for a, b in zip(trainer.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_other_errors_are_not_called_out_of_memory():
    trainer = Trainer(config("never", batch=32), 10, 11, HERE)
    with pytest.raises(RuntimeError, match="channels") as error:
        trainer.step(torch.randn(32, 5, 8, 8), torch.zeros(32, dtype=torch.long))
    assert not isinstance(error.value, OutOfMemory)


def test_a_loss_scale_that_overflows_leaves_the_step_out():
    x, y = digits()
    trainer = Trainer(config("never", batch=32, amp="float16"), 10, 11, HERE)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.step(x, y).gradient_norm == float("inf") or trainer.scaler.get_scale() < 2.0**40
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    while trainer.scaler.get_scale() > 2.0**10:
        trainer.scaler.update(2.0**10)
    assert trainer.step(x, y).gradient_norm < float("inf")
    assert not torch.equal(weights[0], next(trainer.model.parameters()))


# --- whole runs -----------------------------------------------------------------------------------


def test_the_digits_are_learned_and_the_files_say_so(tmp_path):
    said: list[str] = []
    result = run(config(tmp_path, batch=64, epochs=6), said.append)
    assert result.test_accuracy > 0.9 and result.steps == 6 * 22 and result.folder == tmp_path
    tests = [r for r in rows(tmp_path) if "test_accuracy" in r]
    assert len(tests) == 6 and tests[-1]["test_accuracy"] == result.test_accuracy
    steps = [r for r in rows(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 133))
    assert steps[-1]["loss"] < 0.5 < steps[0]["loss"]
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert sum("test accuracy" in line for line in said) == 6
    # What is on disk is the network that was tested.
    state = checkpointing.read(checkpointing.files(tmp_path)[0])
    model = fr.cifar_resnet(8).eval()
    model.load_state_dict(state["model"])
    part = data.load("digits", None, 8).test
    x = torch.stack([part.transform(image) for image, _ in part.items])
    with torch.no_grad():
        right = model(x).argmax(1) == torch.tensor([label for _, label in part.items])
    assert right.float().mean().item() == pytest.approx(result.test_accuracy, abs=1 / 360 + 1e-6)


class Stop(Exception):
    pass


def stopping_at(*steps: int):
    def progress(step: int, of: int, loss: float) -> None:
        if step in steps:
            raise Stop

    return progress


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "clip": 1.0, "label_smoothing": 0.1, "accumulate": 2},
        {"optimizer": "lamb", "amp": "bfloat16", "activation_memory": "minimal"},
        {"optimizer": "adamw", "amp": "float16", "deterministic": True},
        {"channels_last": False, "workers": 1, "keep": 1},
    ],
    ids=lambda c: "-".join(c),
)
def test_a_resumed_run_has_the_same_losses(tmp_path, changes):
    one, two = tmp_path / "one", tmp_path / "two"
    run(config(one, **changes))
    for stop in (7, 11, 14):  # in an epoch, at the end of one before its test, in the next
        with pytest.raises(Stop):
            run(config(two, **changes), resume=stop > 7, progress=stopping_at(stop))
    run(config(two, **changes), resume=True)
    assert losses(two) == losses(one) and len(losses(one)) == 2 * 12
    last = [checkpointing.read(checkpointing.files(f)[0]) for f in (one, two)]
    same(last[0], last[1])


def same(a, b, where="") -> None:
    """Equal bit by bit, whatever it is nested in."""
    skipped = {"metrics_bytes", "python"}  # rates in the metrics are of different lengths
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a.keys() - skipped:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_finished_run_says_so_and_another_is_not_overwritten(tmp_path):
    made = config(tmp_path, epochs=1)
    said: list[str] = []
    first = run(made, said.append, resume=True)
    assert "nothing to resume" in said[0]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(made, said.append, resume=True) == first
    assert said[-1] == "finished before: all 11 steps are taken"
    with pytest.raises(ValueError, match="holds this run, after step 11 of 11: --resume"):
        run(made)
    for resume in (False, True):
        other = dataclasses.replace(made, lr=0.5, seed=7)
        with pytest.raises(ValueError, match=r"another configuration \(.*--lr 0.1, not 0.5\)"):
            run(other, resume=resume)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    # What changes no number may change.
    assert run(dataclasses.replace(made, checkpoint_every=3, keep=5), resume=True) == first
