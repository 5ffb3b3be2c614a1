"""buffer_experiments: the buffer, its compression, and simulated asynchronous DGL."""

import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same_run, equal, load, log_of, refused, run, state
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = "buffer_experiments"
SCRIPT = f"{FOLDER}/cifar_buffer.py"
script = load(FOLDER, "cifar_buffer")
buffer, cifar, models, utils = (sys.modules[name] for name in ("buffer", "cifar", "models", "utils"))
BATCH = 16
TINY = ["--ncnn", 3, "--down", "[0]", "--feature_size", 4, "--mlp", 1, "--batch_size", BATCH, "--seed", 0]
QUICK = [*TINY, "--data", "digits", "--train-size", 64, "--threads", 1, "--nepochs", 3]
every = settings(max_examples=100, deadline=None, derandomize=True)


def make(*flags, size=64):
    """A simulation as the script makes it, on random images of 4 classes, in 4 batches."""
    args = script.parse_args([str(flag) for flag in (*TINY, "--nepochs", 3, *flags)])
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (size,), generator=generator)
    images = torch.randint(128, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    images += 32 * labels.byte()[:, None, None, None]
    batches = cifar.Batches(images, labels, BATCH, "cpu", torch.Generator().manual_seed(args.seed), drop_last=True)
    model = utils.to_device(models.make_network(args, 10), args, torch.device("cpu"))
    return script.Simulation(args, model, batches, torch.device("cpu"))


def train(simulation):
    for epoch in range(1, simulation.args.epochs + 1):
        script.train_epoch(simulation, epoch)
    return simulation


# The buffer


@every
@given(
    size=st.integers(1, 5),
    max_reuse=st.none() | st.integers(1, 3),
    sampling=st.sampled_from(buffer.SAMPLINGS),
    operations=st.lists(st.sampled_from(["put", "sample", "save and load"]), max_size=40),
)
def test_buffer_against_an_obvious_one(size, max_reuse, sampling, operations):
    def new():
        return buffer.Buffer(size, 2, (3, 4, 4), sampling=sampling, max_reuse=max_reuse)

    ring, obvious, number = new(), [], 0  # obvious: [number, uses] of each batch, oldest first
    for operation in operations:
        if operation == "put":
            batch = torch.full((2, 3, 4, 4), float(number))
            ring.put(batch.to(memory_format=torch.channels_last), torch.tensor([number, number + 1]))
            obvious = [*obvious, [number, 0]][-size:]
            number += 1
        elif operation == "save and load":
            saved, ring = copy.deepcopy(ring.state_dict()), new()
            ring.load_state_dict(saved)
        else:
            usable = [entry for entry in obvious if max_reuse is None or entry[1] < max_reuse]
            batch = ring.sample()
            assert (batch is None) == (not usable)
            if batch:
                representation, labels = batch
                assert representation.shape == (2, 3, 4, 4)
                assert representation.is_contiguous(memory_format=torch.channels_last)
                chosen = labels[0].item()
                assert ring.sampled == chosen
                assert labels.tolist() == [chosen, chosen + 1]
                assert (representation == chosen).all()
                if sampling != "random":
                    least_used = [i for i, uses in usable if uses == min(uses for _, uses in usable)]
                    oldest_first = sampling == "published" and least_used[0] == number - size
                    assert chosen == least_used[0 if oldest_first else -1]
                (entry,) = (entry for entry in usable if entry[0] == chosen)
                entry[1] += 1


def test_random_sampling_takes_every_batch_as_often_whichever_was_last():
    ring = buffer.Buffer(4, 1, (1, 1, 1), sampling="random")
    for i in range(4):
        ring.put(torch.zeros(1, 1, 1, 1), torch.tensor([i]))
    chosen = torch.cat([ring.sample()[1].clone() for _ in range(2000)])
    assert (chosen.bincount() / 500).sub(1).abs().max() < 0.2
    assert (chosen[1:] == chosen[:-1]).float().mean() == pytest.approx(1 / 4, abs=0.04)


@pytest.mark.parametrize(
    "sampling, expected",
    [
        ("priority_lifo", [1, 0, 2, 2, 1, 0, 3, 3, 3, 2]),
        ("published", [1, 0, 2, 0, 2, 1, 3, 3, 1, 3]),
    ],
)
def test_sampling_by_hand(sampling, expected):
    """A ring of three: filled in two steps (s: sample), then full, then batch 3 in place of batch 0."""
    ring, sampled, number = buffer.Buffer(3, 1, (1, 1, 1), sampling=sampling), [], itertools.count()
    for operation in "ppsspsssspssss":
        if operation == "p":
            ring.put(torch.zeros(1, 1, 1, 1), torch.tensor([next(number)]))
        else:
            sampled.append(ring.sample()[1].item())
    assert sampled == expected


def test_what_the_published_off_by_one_changes():
    """M = 50, the same turns for both: a quarter of all picks differ, and three quarters of a twice as slow layer's."""
    picks = {}  # (slow layer, layer): [number, different, staleness of priority_lifo, staleness of published]
    for slow in (None, 1):
        turns = script.Turns([0.5 if n == slow else 1.0 for n in range(3)], False, 0)
        rings = [[buffer.Buffer(50, 1, (1, 1, 1), sampling=s) for s in buffer.SAMPLINGS[:2]] for _ in range(2)]
        batch = torch.zeros(1, 1, 1, 1), torch.zeros(1)
        for n in (next(turns) for _ in range(3 * 4000)):
            if n > 0:
                meant, published = rings[n - 1]
                meant.sample(), published.sample()
                ages = [ring.count - 1 - ring.sampled for ring in (meant, published)]
                entry = picks.setdefault((slow, n), torch.zeros(4))
                entry += torch.tensor([1.0, meant.sampled != published.sampled, *ages])
            for ring in rings[n] if n < 2 else []:
                ring.put(*batch)
    number, different, *_ = sum(entry for (slow, _), entry in picks.items() if slow is None)
    assert different / number == pytest.approx(0.25, abs=0.04)
    _, different, staleness_meant, staleness = picks[1, 1] / picks[1, 1][0]
    assert different == pytest.approx(0.75, abs=0.05)
    assert staleness_meant < 1.5
    assert staleness == pytest.approx(24, abs=2)


def test_storage_is_allocated_once():
    ring = buffer.Buffer(2, 2, (3, 4, 4))
    places = set()
    for i in range(6):
        ring.put(torch.zeros(2, 3, 4, 4), torch.zeros(2))
        places.add(ring.sample()[0].data_ptr())
        assert ring.stored.shape == (2, 2, 4, 4, 3), i
    assert len(places) == 2
    assert ring.num_bytes() == 4 * 2 * 2 * 3 * 16 + 8 * 2 * 2 == ring.uncompressed_bytes()


# Turns


@every
@given(
    layers=st.integers(1, 4),
    sequential=st.booleans(),
    operations=st.lists(st.sampled_from(["next", "next", "next", "warm up", "save and load"]), max_size=60),
)
def test_turns_against_obvious_ones(layers, sequential, operations):
    def new():
        return script.Turns([1.0] * layers, sequential, 3)

    undisturbed, turns = new(), new()
    warm_up = [] if sequential else [n for n in range(layers) for _ in range(2)]
    for expected in warm_up:
        assert next(undisturbed) == expected
    pending = [*warm_up]
    for operation in operations:
        if operation == "warm up":
            turns.warm_up()
            pending = [*warm_up]
        elif operation == "save and load":
            saved, turns = copy.deepcopy(turns.state_dict()), new()
            turns.load_state_dict(saved)
        else:
            assert next(turns) == (pending.pop(0) if pending else next(undisturbed))
    if sequential:
        first = next(undisturbed)
        assert [next(undisturbed) for _ in range(layers)] == [(first + i) % layers for i in range(1, layers + 1)]


def test_draw_frequencies():
    turns = make("--buffer", 2, "--noise", 0.5, "--layer_noise", 1, "--ncnn", 4).turns
    assert [next(turns) for _ in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    draws = torch.tensor([next(turns) for _ in range(20000)])
    shares = draws.bincount() / len(draws)
    assert shares.tolist() == pytest.approx([1 / 3.5, 0.5 / 3.5, 1 / 3.5, 1 / 3.5], abs=0.015)
    assert (draws[1:] == draws[:-1]).float().mean() == pytest.approx(3.25 / 3.5**2, abs=0.02)  # independent


def test_the_stream_goes_on_at_the_same_place():
    undisturbed, stream = make().stream, make().stream
    for i in range(12):  # three passes
        if i:
            saved, after = stream.state_dict(), stream.batches.generator.get_state()
            stream = make().stream
            stream.load_state_dict(saved)
            assert torch.equal(stream.batches.generator.get_state(), after)
        assert all(map(torch.equal, next(stream), next(undisturbed)))


# The network


@pytest.mark.parametrize("kind", models.DOWNSAMPLINGS)
def test_shapes(kind):
    net = models.BufferNet(10, feature_size=8, ds_type=kind, nlin=1, width_aux=6)
    assert net.shapes == [(8, 32, 32), (8, 32, 32), (16, 16, 16), (16, 16, 16), (32, 8, 8), (32, 8, 8)]
    images = x = torch.randn(2, 3, 32, 32)
    for n, shape in enumerate(net.shapes):
        logits, x = net(x, n)
        assert logits.shape == (2, 10)
        assert x.shape == (2, *shape)
        convolutions = [m for m in net.auxiliary_nets[n] if isinstance(m, torch.nn.Conv2d)]
        assert [c.out_channels for c in convolutions] == [6 * 2 ** (n // 2)]
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    sum(net(images, n, upto=True)[0].sum() for n in range(6)).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert [len(net) for net in models.BufferNet(10, feature_size=8, block_size=4, bn=False).blocks] == [9, 5]


def test_published_network():
    net = models.BufferNet(10)
    assert net.shapes == [(128, 32, 32), (128, 32, 32), (256, 16, 16), (256, 16, 16), (512, 8, 8), (512, 8, 8)]
    assert [net[2].in_features for net in net.auxiliary_nets] == [512, 512, 1024, 1024, 2048, 2048]
    assert all(sum(isinstance(m, torch.nn.Linear) for m in net) == 4 for net in net.auxiliary_nets)


def test_without_batchnorm_convolutions_have_a_bias():
    net = models.BufferNet(10, feature_size=4, nlin=1, width_aux=4, bn=False)
    assert not any("BatchNorm" in type(m).__name__ for m in net.modules())
    assert all(m.bias is not None for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))


@pytest.mark.parametrize("bn", [True, False])
def test_an_auxiliary_network_without_hidden_layers(bn):
    net = models.mlp(4, 10, num_hidden=0, bn=bn)
    x, *_, linear = torch.randn(8, 4, 6, 6), *net
    pooled = x.view(8, 4, 2, 3, 2, 3).mean((3, 5))
    if bn:
        variance, mean = torch.var_mean(pooled, (0, 2, 3), correction=0, keepdim=True)
        pooled = (pooled - mean) / (variance + 1e-5).sqrt()
    expected = pooled.flatten(1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(torch.nn.Sequential(*net)(x), expected)
    assert len(net) == 3 + bn


@pytest.mark.parametrize("name", ["cifar_buffer", "cifar_async"])
def test_the_default_of_down_fits_the_depth(name):
    parse = load(FOLDER, name).parse_args
    for depth, down in [(1, []), (2, []), (3, [1]), (4, [1]), (5, [1, 3]), (9, [1, 3])]:
        assert parse(["--seed", "0", "--ncnn", str(depth)]).down == down
    with pytest.raises(SystemExit, match="2"):
        parse(["--seed", "0", "--ncnn", "4", "--down", "[1,3]"])


def test_space_to_depth_loses_nothing():
    pixels = models.layer(1, 2, "psi")[0](torch.arange(16.0).view(1, 1, 4, 4))
    assert pixels.shape == (1, 4, 2, 2)
    assert sorted(pixels.flatten().tolist()) == list(range(16))


# The algorithm


def synchronous_dgl(args, model, batches):
    """Algorithm 1 once more, plainly: nothing of cifar_buffer.py but its network."""
    optimizers = []
    context = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")
    model.train()
    for epoch in range(args.epochs):
        if epoch % args.epochdecay == 0:
            lr = args.lr / 5 ** (epoch // args.epochdecay)
            optimizers = [
                torch.optim.SGD([*b.parameters(), *a.parameters()], lr, 0.9, weight_decay=5e-4, fused=True)
                for b, a in zip(model.blocks, model.auxiliary_nets)
            ]
        for x, labels in batches:
            for n, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                with context:
                    logits, x = model(x, n)
                    loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                x = x.detach()


@pytest.mark.parametrize(
    "flags",
    [
        ["--buffer", 0],
        ["--buffer", 3, "--layer-sequence", "sequential"],
        ["--buffer", 0, "--precision", "bf16", "--max-buffer-reuse", 1],
        ["--buffer", 0, "--noise", 0.5, "--buffer-sampling", "published", "--mlp", 0],
    ],
)
def test_layers_that_take_turns_are_synchronous_dgl(flags):
    simulation, other = make(*flags, "--epochdecay", 2, size=70), make(*flags, "--epochdecay", 2, size=70)
    train(simulation)
    assert simulation.steps == [12, 12, 12]  # the incomplete batch dropped
    synchronous_dgl(other.args, other.model, other.stream.batches)
    assert equal(state(simulation.model), state(other.model))
    asynchronous = train(make("--buffer", 3, "--epochdecay", 2, size=70))
    assert not equal(state(simulation.model), state(asynchronous.model))


@pytest.mark.parametrize("max_reuse", [None, 1])
def test_random_turns_against_an_obvious_simulation(max_reuse, monkeypatch):
    """The same weights, to the bit, from lists of tensors, and the order of the turns that was recorded."""
    flags = ["--buffer", 2, "--noise", 0.6, "--layer_noise", 1, "--epochdecay", 1]
    flags += ["--max-buffer-reuse", max_reuse] if max_reuse else []
    simulation, other = make(*flags), make(*flags)
    turns, draw = [], script.Turns.__next__
    monkeypatch.setattr(script.Turns, "__next__", lambda self: turns.append(draw(self)) or turns[-1])
    train(simulation)
    model = other.model
    lists = [[] for _ in range(3)]  # of [representation, labels, uses], oldest first
    steps, optimizers, order = [0] * 3, [None] * 3, iter(turns)
    stream = (batch for _ in itertools.count() for batch in other.stream.batches)
    expected_warm_up = [0, 0, 1, 1, 2, 2]
    skipped = fed = 0
    while min(steps) < 12:
        n = next(order)
        if expected_warm_up:
            assert n == expected_warm_up.pop(0)
        if n == 2 and steps[2] == 12:
            continue
        if n == 0:
            x, labels = next(stream)
        else:
            usable = [e for e in lists[n - 1] if max_reuse is None or e[2] < max_reuse]
            if not usable:
                skipped += 1
                continue
            fewest = min(e[2] for e in usable)
            entry = [e for e in usable if e[2] == fewest][-1]
            entry[2] += 1
            x, labels = entry[:2]
        if steps[n] == 12:
            fed += 1
            with torch.no_grad():
                x = model.blocks[n].eval()(x)
        else:
            parts = model.blocks[n].train(), model.auxiliary_nets[n].train()
            if steps[n] % 4 == 0:  # a new SGD, and fresh batches
                parameters = [p for part in parts for p in part.parameters()]
                optimizers[n] = torch.optim.SGD(
                    parameters, 0.1 / 5 ** (steps[n] // 4), 0.9, weight_decay=5e-4, fused=True
                )
            logits, x = model(x, n)
            optimizers[n].zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizers[n].step()
            steps[n] += 1
            if steps[n] in (4, 8):
                expected_warm_up = [0, 0, 1, 1, 2, 2]
        lists[n] = [*lists[n], [x.detach(), labels, 0]][-2:]
    assert next(order, None) is None
    assert fed
    assert bool(skipped) == bool(max_reuse)
    assert equal(state(simulation.model), state(model))


def test_layers_that_are_done_stop_learning_and_go_on_feeding(monkeypatch):
    simulation = make("--buffer", 2, "--noise", 0.8, "--layer_noise", 2)
    train_step, feed_step, fed = script.train_step, script.feed_step, []
    end = {}

    def now(n):  # weights and BatchNorm statistics
        return [state(part) for part in simulation.modules[n]], simulation.meters[n].count

    def recorded_step(x, labels, block, *parts):
        n = [*simulation.model.blocks].index(block)
        assert not simulation.done(n)
        representation = train_step(x, labels, block, *parts)
        assert not representation.requires_grad
        end[n] = now(n)
        return representation

    def recorded_feed(simulation, n, x):
        fed.append((n, simulation.buffers[n].count))
        representation = feed_step(simulation, n, x)
        assert not representation.requires_grad
        return representation

    monkeypatch.setattr(script, "train_step", recorded_step)
    monkeypatch.setattr(script, "feed_step", recorded_feed)
    train(simulation)
    assert simulation.steps == [12, 12, 12]
    for n in range(3):
        assert all(map(equal, end[n][0], now(n)[0]))
        assert end[n][1] == now(n)[1] == 12 * BATCH
    assert {n for n, _ in fed} == {0, 1}
    for n in (0, 1):  # each step is a put
        assert simulation.buffers[n].count == 12 + sum(n == m for m, _ in fed)


def settings_of(optimizer):
    """Everything but its parameters."""
    return type(optimizer), {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


def published(lr):
    parameter = torch.nn.Parameter(torch.zeros(1))
    return settings_of(torch.optim.SGD([parameter], lr, momentum=0.9, weight_decay=5e-4, fused=True))


def test_the_published_optimizer(monkeypatch, tmp_path):
    """As `main` builds it, in each epoch of each layer, without the training between."""
    seen, flags = [], [*QUICK, "--buffer", 2, "--nepochs", 31]

    def train_epoch(simulation, epoch):
        next(simulation.stream)
        for n, optimizer in enumerate(simulation.optimizers):
            seen.append((n, epoch, settings_of(optimizer)))
            own = [id(p) for part in simulation.modules[n] for p in part.parameters()]
            assert [id(p) for group in optimizer.param_groups for p in group["params"]] == own
            simulation.steps[n] += simulation.epoch_steps
            script.end_epoch(simulation, n)

    monkeypatch.setattr("conftest.load", lambda *_: script)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(script, "evaluate", lambda *_: ([0] * 3, [0] * 3))
    assert run(SCRIPT, *flags, cwd=tmp_path)[0] == 0
    epochs = range(1, 32)
    rates = [0.1] * 15 + [0.1 / 5] * 15 + [0.1 / 25]
    assert seen == [(n, epoch, published(lr)) for epoch, lr in zip(epochs, rates) for n in range(3)]


def test_it_learns(tmp_path):
    """A floor that a broken method does not reach: chance is 10 %."""
    flags = ["--ncnn", 2, "--feature_size", 8, "--down", "[0]", "--mlp", 1, "--batch_size", 16, "--buffer", 5]
    flags += ["--data", "digits", "--nepochs", 3, "--epochdecay", 2, "--lr", 0.05, "--seed", 0, "--threads", 1]
    assert run(SCRIPT, *flags, cwd=tmp_path)[0] == 0
    assert float(re.search(r"test ([\d.]+)", log_of(tmp_path)[-1])[1]) > 65


def test_learning_rates_drop_layer_by_layer_and_momentum_starts_from_zero(monkeypatch):
    simulation = make("--buffer", 2, "--epochdecay", 2, "--nepochs", 6, "--lr", 0.5, "--noise", 0.5)
    end_epoch, drops = script.end_epoch, []

    def momenta():
        return [sum(s["momentum_buffer"].abs().sum() for s in o.state.values()) for o in simulation.optimizers]

    def checked(simulation, n):
        before = momenta()
        end_epoch(simulation, n)
        after, done = momenta(), simulation.steps[n] / 4
        assert [m for m in range(3) if after[m] != before[m]] == ([n] if done in (2, 4) else [])
        if done in (2, 4):
            drops.append((n, done, simulation.optimizers[n].param_groups[0]["lr"]))
            assert after[n] == 0
            assert simulation.turns.first == [0, 0, 1, 1, 2, 2]

    monkeypatch.setattr(script, "end_epoch", checked)
    train(simulation)
    assert sorted(drops) == [(n, e, pytest.approx(0.5 / 5 ** (e // 2))) for n in range(3) for e in (2, 4)]


def test_evaluate_equals_forward_upto_n():
    simulation = train(make("--buffer", 2))
    model, args = simulation.model, simulation.args
    images = torch.randint(256, (30, 32, 32, 3), dtype=torch.uint8)
    batches = cifar.Batches(images, torch.arange(30) % 4, 8, "cpu")
    layers, ensembles = script.evaluate(model, utils.autocast(args, torch.device("cpu")), batches)
    model.eval()
    with torch.no_grad():
        for n in range(3):
            top1 = ensemble = 0
            for x, y in batches:
                logits = [model(x, i, upto=True)[0] for i in range(n + 1)]
                weights = [2**i / (2 ** (n + 1) - 1) for i in range(n + 1)]
                top1 += (logits[n].argmax(1) == y).sum().item()
                average = sum(w * values for w, values in zip(weights, logits))
                ensemble += (average.argmax(1) == y).sum().item()
            assert layers[n] == pytest.approx(100 * top1 / 30)
            assert ensembles[n] == pytest.approx(100 * ensemble / 30)


def test_evaluate_on_quantised_inputs_is_what_the_layers_are_trained_on():
    simulation = train(make("--buffer", 2, "--quantize", "2,4"))
    model, (first, second) = simulation.model.eval(), (b.quantizer for b in simulation.buffers)
    images, labels = torch.randint(256, (30, 32, 32, 3), dtype=torch.uint8), torch.arange(30) % 4
    (x, y), *_ = batches = cifar.Batches(images, labels, 30, "cpu")
    top1, _ = script.evaluate(model, simulation.autocast, batches, [first, second])
    with torch.no_grad():
        for n, quantizer in enumerate([first, second, None]):
            logits, x = model(x, n)
            assert top1[n] == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
            x = quantizer and quantizer.decode(quantizer.encode(x))


# Compression


@pytest.mark.parametrize("codewords, dtype", [(2, torch.uint8), (256, torch.uint8), (300, torch.int16)])
@pytest.mark.parametrize("groups", [1, 4])
def test_inputs_that_are_codewords_come_back_as_they_were(groups, codewords, dtype):
    torch.manual_seed(0)
    quantizer = buffer.ProductQuantizer(16, groups, codewords)
    quantizer.CPU_CHUNK = 1000  # several chunks
    quantizer.codebook.normal_()
    indices = torch.randint(codewords, (4, 8, 8, groups)).to(dtype)
    x = quantizer.decode(indices)
    assert x.shape == (4, 16, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert quantizer.encode(x).dtype == dtype
    assert torch.equal(quantizer.encode(x), indices)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x)


def test_an_index_is_that_of_the_nearest_codeword_in_any_precision():
    torch.manual_seed(0)
    quantizer, other = (buffer.ProductQuantizer(6, 3, 100) for _ in range(2))
    batch, x = torch.randn(4, 6, 8, 8), torch.randn(2, 6, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        quantizer.update(batch)
        quantizer.update(batch)
        indices = quantizer.encode(x)
    other.update(batch)
    other.update(batch)
    assert torch.equal(quantizer.codebook, other.codebook)
    for b, i, j, g in itertools.product(range(2), range(4), range(4), range(3)):
        distances = (quantizer.codebook[g] - x[b, 2 * g : 2 * g + 2, i, j]).square().sum(1)
        assert indices[b, i, j, g] == distances.argmin()


def test_the_distortion_falls():
    torch.manual_seed(0)
    quantizer, errors = buffer.ProductQuantizer(16, 4, 16), []
    for _ in range(50):
        quantizer.update(torch.randn(8, 16, 8, 8).relu())
        errors.append(quantizer.pop_error())
    assert math.isnan(errors[0])  # there was no codebook yet
    assert errors[-1] < 0.8 * errors[1]
    x = torch.randn(8, 16, 8, 8).relu()
    error = (quantizer.decode(quantizer.encode(x)) - x).square().sum() / x.square().sum()
    assert error == pytest.approx(errors[-1], rel=0.1)
    assert math.isnan(quantizer.pop_error())  # nothing seen since


def test_a_codeword_with_less_than_a_hundredth_of_its_share_becomes_a_vector_of_the_batch():
    torch.manual_seed(0)
    quantizer, (first, x) = buffer.ProductQuantizer(8, 2, 8), torch.randn(2, 8, 8, 8, 8)

    def is_in(codeword, group, batch):
        return (quantizer.codebook[group, codeword] - quantizer.vectors(batch)[:, group]).abs().sum(1).min() < 1e-4

    quantizer.update(first)
    assert [[is_in(i, group, first) for i in range(8)] for group in range(2)] == [[False, *[True] * 7]] * 2
    fair = quantizer.counts.sum(1) / 8
    for i, share in ((3, 0.05), (4, 0.005)):  # too far from everything
        quantizer.codebook[:, i] = 1000.0
        quantizer.counts[:, i] = share * fair
        quantizer.sums[:, i] = 1000.0 * share * fair[:, None]
    quantizer.update(x)
    for group in range(2):
        assert quantizer.codebook[group, 3].tolist() == pytest.approx([1000.0] * 4)
        assert is_in(4, group, x)
        assert not is_in(4, group, first)


def test_dead_codewords_are_revived():
    torch.manual_seed(0)
    quantizer = buffer.ProductQuantizer(8, 2, 8)
    for _ in range(5):
        quantizer.update(torch.randn(8, 8, 8, 8))
    quantizer.codebook[:, 3:] += 1000.0  # too far from everything
    quantizer.sums[:, 3:] += 1000.0 * quantizer.counts[:, 3:, None]
    for _ in range(100):
        quantizer.update(torch.randn(8, 8, 8, 8))
    assert quantizer.codebook.abs().max() < 10
    assert all(len(quantizer.encode(torch.randn(8, 8, 8, 8))[..., g].unique()) == 8 for g in range(2))


def test_the_bytes_are_those_of_the_tensors():
    simulation = make("--buffer", 3, "--quantize", "2,16")
    train(simulation)
    for ring, (channels, side, _) in zip(simulation.buffers, [(4, 32, 32), (8, 16, 16)]):
        tensors = [ring.stored, ring.labels, *ring.quantizer.buffers()]
        assert ring.num_bytes() == sum(t.nelement() * t.element_size() for t in tensors)
        assert ring.stored.dtype == torch.uint8
        assert ring.stored.nbytes == 3 * BATCH * side * side * 2
        codebooks = ring.quantizer.codebook.nbytes + ring.quantizer.sums.nbytes
        assert codebooks == 2 * 4 * 16 * channels
        assert ring.uncompressed_bytes() == 3 * BATCH * (4 * channels * side * side + 8)
        assert ring.sample()[0].shape == (BATCH, channels, side, side)


# The script


def test_log(tmp_path):
    flags = ["--buffer", 2, "--noise", 0.2, "--layer_noise", 1, "--quantize", "4,8"]
    assert run(SCRIPT, *QUICK, *flags, cwd=tmp_path)[0] == 0
    lines = log_of(tmp_path)
    assert "slowdown: 1.250 of layer 1" in lines
    stored = 2 * BATCH * 4 * (32 * 32 + 16 * 16) + 2 * 8 * 2 * BATCH
    stored += sum(8 * 8 * c + 4 * 4 * 8 + 16 for c in (4, 8))  # codebook and sums, counts, errors
    plain = 2 * BATCH * 4 * (4 * 32 * 32 + 8 * 16 * 16) + 2 * 8 * 2 * BATCH
    assert (
        f"buffers: 2 of 2 batches, {stored:,} bytes, {plain / stored:.2f} times fewer than uncompressed float32"
        in lines
    )
    number = r"(\d+\.\d+)"
    for i, epoch in enumerate((1, 2, 3)):
        *published, quantised, error = lines[-15 + 5 * i :][:5]
        for n, line in enumerate(published):
            match = re.fullmatch(
                rf"n: {n}, epoch {epoch},epochtrue (\d), train {number}, test {number},ense {number}", line
            )
            assert match, line
            assert epoch <= int(match[1]) <= 3
            assert all(0 <= float(x) <= 100 for x in match.groups()[1:])
        assert re.fullmatch(rf"epoch {epoch}, test on quantised inputs: {number}, {number}, {number}", quantised)
        assert re.fullmatch(rf"epoch {epoch}, relative MSE of the quantised outputs: {number}, {number}", error)


@pytest.mark.parametrize(
    "flags",
    [
        ["--buffer", 3, "--noise", 0.5, "--layer_noise", 1, "--epochdecay", 1],
        ["--buffer", 3, "--quantize", "2,8", "--max-buffer-reuse", 2, "--buffer-sampling", "random"],
        ["--buffer", 0, "--precision", "bf16", "--ensemble", 0],
    ],
    ids=["noise", "quantize", "sequential"],
)
def test_a_run_stopped_between_log_lines_and_resumed_equals_one_that_was_not(flags, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    assert run(SCRIPT, *QUICK, *flags, cwd=whole)[0] == 0
    cifar, meter_updates = load(FOLDER, "cifar"), itertools.count(1)
    update = cifar.Meter.update

    def stopping(meter, *batch):
        if next(meter_updates) in (27, 30):  # the first steps, and those after the first resumption
            raise SystemExit("stopped")
        update(meter, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(cifar.Meter, "update", stopping)
        patch.setattr("conftest.COMMON_NAMES", ())  # so that the script gets this cifar
        for _ in range(2):
            assert run(SCRIPT, *QUICK, *flags, "--resume", "auto", cwd=stopped)[2] == "stopped\n"
    (checkpoint,) = stopped.glob("*.pt")
    assert run(SCRIPT, "--resume", checkpoint, "--threads", 1, cwd=tmp_path)[0] == 0  # --seed is the checkpoint's
    assert_same_run(whole, stopped)


def test_noise_has_no_effect_while_layers_take_turns(tmp_path):
    status, out, _ = run(SCRIPT, *QUICK, "--nepochs", 1, "--noise", 0.1, cwd=tmp_path)
    assert status == 0
    (line,) = (line for line in log_of(tmp_path)[1:] if line.startswith("slowdown: "))
    assert line == "slowdown: none; --noise has no effect while the layers take turns"
    assert line in out


def test_published_flags_without_effect(tmp_path, capsys):
    plain, flags = vars(script.parse_args(["--seed", "0"])), "-j --workers --debug --debug_parameters --decay -r"
    for flag in [*flags.split(), "--avg_size", "--prog"]:
        for value in ([], ["1"]):
            assert vars(script.parse_args([flag, *value, "--seed", "0"])) == plain
            assert capsys.readouterr() == ("", f"{flag} has no effect any more\n")


def test_mistakes(tmp_path):
    for flags, parts in [
        (["--layer_noise", 3], ["--layer_noise 3", "0 to 2"]),
        (["--noise", 1, "--buffer", 2], ["--noise", "below 1"]),
        (["--down", "[1,2]"], ["--down [1, 2]", "no layer follows layer 2"]),
        (["--down", "1,2"], ["'[1,3]'"]),
        (["--ncnn", 8, "--down", "[0,1,2,3,4,5]"], ["--down", "at most 5"]),
        (["--quantize", "3,8"], ["--quantize", "4 channels", "3 groups"]),
        (["--quantize", "2"], ["--quantize", "G,V"]),
        (["--batch_size", 65], ["65", "64 training images"]),
        (["--buffer", 10**9], ["2 buffers", "GB are free", "--buffer"]),
    ]:
        refused(run(SCRIPT, *QUICK, *flags, cwd=tmp_path), *parts)
    for resume in ([], ["--resume", "auto"]):
        refused(run(SCRIPT, "--data", "digits", *resume, cwd=tmp_path), "--seed is required")
    refused(run(SCRIPT, *QUICK, "--seed", 2**32, cwd=tmp_path), "--seed", "below 2147483648")
    assert not list(tmp_path.iterdir())


class Fork:
    """subprocess.Popen for the runs of a sweep, without an interpreter that imports torch again."""

    real = subprocess.Popen

    def __init__(self, command, stderr, **_):
        pipe, self.hold = os.pipe()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            subprocess.Popen = self.real  # the run asks git
            os.close(self.hold)
            os.dup2(pipe, 0)
            sys.stdout, sys.stderr = open(os.devnull, "w"), stderr  # noqa: SIM115
            status = 1
            try:
                sys.modules["sweep"].run_one(*command[4:])
                status = 0
            except SystemExit as stop:
                status = stop.code
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(pipe)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            os.close(self.hold)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


FLAGS = [*TINY[:-2], "--data", "digits", "--train-size", 32, "--nepochs", 1]


def sweep(*flags, cwd, **changes):
    flags = ["--jobs", 2, *flags, "--", *FLAGS]
    flags += [part for name, value in changes.items() for part in (f"--{name}", value)]
    return run(f"{FOLDER}/sweep.py", *flags, cwd=cwd)


def test_sweep_reports_a_failure_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("subprocess.Popen", Fork)
    grid = ["--buffer", 1, "--noise", 0, 0.5, "--layer_noise", 1, "--quantize", "4,4", "--save_folder", "runs"]
    grid += ["--buffer-sampling", "published"]
    names = ["buffer1_published_quantize4x4_seed0", "buffer1_published_layer1_noise0.5_quantize4x4_seed0"]
    folder, prefix = tmp_path / "runs", "buffer_experiments-cifar_buffer"
    folder.mkdir()
    damaged = folder / f"{prefix}-{names[0]}.pt"
    damaged.touch()
    status, out, err = sweep(*grid, cwd=tmp_path)
    assert status == 1
    assert f"{names[0]}: failed with status 2: cifar_buffer.py: error: " in err
    assert "damaged" in err
    assert err.endswith(f"1 of 2 runs failed: {names[0]}\n")
    (log,) = folder.glob("*.log")
    assert log.name.endswith(f"_{prefix}-{names[1]}.log")
    assert [*folder.glob("*.pt")] == [damaged]
    damaged.unlink()
    status, out, err = sweep(*grid, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert out == f"2 runs, 1 of them complete already\n{names[0]}: done\n"
    assert not [*folder.glob("*.pt")]
    damaged.touch()  # as if the sweep had been ended before it removed the checkpoint
    before = {log: log.read_text() for log in folder.glob("*.log")}
    assert sweep(*grid, cwd=tmp_path)[1] == "2 runs, 2 of them complete already\n"
    assert before == {log: log.read_text() for log in folder.glob("*.log")}
    assert not damaged.exists()
    complete = load(FOLDER, "sweep").is_complete
    wanted = [*map(str, TINY), "--buffer", "1", "--quantize", "4,4", "--data", "digits", "--train-size", "32"]
    wanted += ["--buffer-sampling", "published"]
    wanted += ["--threads", "1", "--name", names[0], "--nepochs"]
    assert complete(folder, names[0], [*wanted, "1"])
    assert not complete(folder, names[0], [*wanted, "2"])
    assert not complete(folder, names[0], [*wanted, "1", "--buffer-sampling", "priority_lifo"])
    assert not complete(folder, names[0], [*wanted, "1", "--bn-init", "uniform"])
    (log,) = folder.glob(f"*-cifar_buffer-{names[0]}.log")
    assert '"bn_init": "ones", ' in log.read_text()
    log.write_text(log.read_text().replace('"bn_init": "ones", ', ""))  # as in older logs
    assert complete(folder, names[0], [*wanted, "1"])
    assert not complete(folder, names[0], [*wanted, "1", "--bn-init", "uniform"])
    *before_last, _ = log.read_text().splitlines(keepends=True)
    for cut in ("".join(before_last), log.read_text()[:-1], ""):
        log.write_text(cut)
        assert not complete(folder, names[0], [*wanted, "1"])


def test_the_committed_sweeps_are_complete():
    """README.md's commands of sweep.py, and their logs."""
    readme, sweeps = (ROOT / FOLDER / "README.md").read_text(), load(FOLDER, "sweep")
    settings = dict(re.findall(r'^    ([A-Z]+)="(.+)"$', readme, re.M))
    commands = re.findall(r"^    python sweep.py (.*) -- \$([A-Z]+)$", readme, re.M)
    (published,) = re.findall(r"also with\n`(.+?)`", readme)
    commands += [(f"{command} {published}", setting) for command, setting in commands if setting == "DIGITS"]
    runs, logs = {}, [*(ROOT / FOLDER / "logs").glob("**/*[_-]cifar_buffer[_-]buffer*.log")]
    for command, setting in commands:
        args, common = sweeps.parse_args([*command.split(), "--", *settings[setting].split()])
        grid, folder = sweeps.grid(args, common), ROOT / FOLDER / args.save_folder
        assert [name for name, flags in grid.items() if not sweeps.is_complete(folder, name, flags)] == []
        runs |= {(setting, name): flags for name, flags in grid.items()}
    assert len(runs) == len(logs) > 0


def test_a_sweep_starts_no_more_runs_than_fit_in_memory(monkeypatch):
    """The larger run counts: two buffers of 50 batches of 128 images, float32 in 8 channels of 32x32 pixels."""
    sweeps = load(FOLDER, "sweep")
    flags = ["--jobs", 4, "--buffer", 10, 50, "--", "--no-cuda", "--feature_size", 8, "--ncnn", 3, "--down", "[1]"]
    runs = sweeps.grid(*sweeps.parse_args([str(flag) for flag in flags]))
    needed = sweeps.REST["cpu"] + 2 * 50 * 128 * (8 * 32 * 32 * 4 + 8)  # and 8 bytes for a label
    for free, jobs in [(0, 1), (3 * needed, 3), (3 * needed - 1, 2)]:
        monkeypatch.setattr(sweeps, "available_memory", lambda device, free=free: free)
        assert sweeps.jobs_that_fit(runs) == jobs
    assert sweeps.jobs_that_fit({}) == (3 * needed - 1) // sweeps.REST["cpu"]


def test_mistakes_in_a_sweep_end_it_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for flags, changes, parts in [
        (["--noise", 2], {}, ["--noise"]),
        (["--buffer-sampling", "fifo"], {}, ["--buffer-sampling", "published"]),
        (["--buffers", 2], {}, ["--buffers"]),
        (["--quantize", "3,8"], {}, ["3 groups"]),
        (["--buffer", 1], {"depth": 3}, ["--depth"]),
        (["--buffer", 1], {"name": "mine"}, ["--name"]),
        (["--buffer", 1], {"seed": 7}, ["--seed after --"]),
        (["--buffer", 1], {"buffer-sampling": "random"}, ["--buffer-sampling after --"]),
    ]:
        refused(sweep(*flags, cwd=tmp_path, **changes), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_a_sweep_that_is_ended_ends_its_runs(ending, tmp_path, monkeypatch):
    program = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(100)"
    process = start_sweep(tmp_path, monkeypatch, program)
    wait_for((tmp_path / "started").exists)  # so that the sweep knows its run, too
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, ending)
    process.join(30)
    assert process.exitcode == -signal.SIGINT
    assert (tmp_path / "stderr").read_text() == "\nInterrupted; the same command goes on from here.\n"
    wait_for(lambda: not child.is_running())


def test_nohup_keeps_a_sweep_alive(tmp_path, monkeypatch):
    process = start_sweep(tmp_path, monkeypatch, "import os, signal; os.kill(os.getppid(), signal.SIGHUP)", ignore=True)
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("copy", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_runs_end_with_a_sweep_that_is_killed_and_their_names_are_taken_until_then(copy, tmp_path, monkeypatch):
    """The run is a copy of this process, or a process of its own, as it really is."""
    if copy:
        monkeypatch.setattr("subprocess.Popen", Fork)
    process = start_sweep(tmp_path, monkeypatch, None, "--nepochs", 10**6)
    (child,) = wait_for(lambda: psutil.Process(process.pid).children())
    wait_for(lambda: [*tmp_path.glob("*.pt")])
    flags = [*FLAGS, "--buffer", 30, "--seed", 0, "--name", "buffer30_seed0", "--save_folder", tmp_path]
    refused(run(SCRIPT, *flags, cwd=tmp_path), "is alive", tmp_path)
    process.kill()
    process.join()
    try:
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        if child.is_running():
            child.kill()


@pytest.mark.parametrize("failing", ["stdout", "disk"])
def test_a_sweep_and_failing_output(failing, tmp_path, monkeypatch):
    """As with `| head -1`: it goes on. Without space for temporary files: one line."""
    if failing == "disk":
        monkeypatch.setattr("tempfile.TemporaryFile", full)
    process = start_sweep(tmp_path, monkeypatch, "pass")
    process.join(30)
    said = (tmp_path / "stderr").read_text()
    if failing == "disk":
        assert process.exitcode == 1
        assert said.count("\n") == 1
        assert "No space left on device" in said
    else:
        assert (process.exitcode, said) == (0, "")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start_sweep(cwd, monkeypatch, program, *flags, ignore=False):
    """A sweep of one run in a copy of this process; its stdout is a pipe that nobody reads. The run is a program."""
    sweeps = load(FOLDER, "sweep")
    if program:
        monkeypatch.setattr(sweeps, "RUN", program)

    def child():
        os.setpgrp()
        os.chdir(cwd)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore else signal.SIG_DFL)
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout, status = os.fdopen(writer, "w", buffering=1), 0
        sys.stderr = (cwd / "stderr").open("w", buffering=1)
        try:
            sweeps.main([str(flag) for flag in ("--jobs", 1, "--", *FLAGS, *flags)])
        except KeyboardInterrupt as error:
            sys.excepthook(KeyboardInterrupt, error, None)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
            status = 1
        finally:
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def read_by_the_notebook(folder, monkeypatch, capsys):
    """BufferCurves.ipynb's table of runs, and what it prints."""
    cells = json.loads((ROOT / FOLDER / "BufferCurves.ipynb").read_text())["cells"]
    monkeypatch.setenv("LOGS", str(folder))
    names = {}
    for i in (0, 2):
        exec("".join(cells[i]["source"]), names)
    return names["runs"], capsys.readouterr().out


def test_the_notebook_reads_the_published_format(tmp_path, monkeypatch, capsys):
    lines = [
        f"n: {n}, epoch {e},epochtrue {e}, train 61.2, test {10 * e + n}.1,ense 60.9 \n" for e in (1, 2) for n in (0, 1)
    ]
    slowed = tmp_path / "a_cifar_buffer_buffer50_layer3_noise0.5_seed7.log"
    slowed.write_text("".join(lines))
    (tmp_path / "b_cifar_buffer_buffer1_seed0.log").write_text("".join(lines).replace(",ense 60.9", ""))
    (tmp_path / "c_cifar_buffer_buffer1_seed1.log").write_text("".join(lines[:-1]))
    (tmp_path / "d_cifar_buffer_run.log").write_text("".join(lines))
    (tmp_path / "e_cifar_buffer_buffer1_seed1.log").write_text("something else\n")
    runs, printed = read_by_the_notebook(tmp_path, monkeypatch, capsys)
    figures = ["slow layer", "slowdown", "buffer", "seed", "test"]
    assert runs[figures].values.tolist() == [[3, 2.0, "50", 7, 21.1], [-1, 1.0, "1", 0, 21.1]]
    assert runs.ensemble.isna().tolist() == [False, True]
    left_out = [f"{tmp_path}/{name}_cifar_buffer" for name in "cde"]
    assert [line.split("cifar_buffer")[0] + "cifar_buffer" for line in printed.splitlines()] == [
        f"left out: {path}" for path in left_out
    ]
    for path in tmp_path.glob("[ab]_*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"c_cifar_buffer.*d_cifar_buffer.*e_cifar_buffer"):
        read_by_the_notebook(tmp_path, monkeypatch, capsys)


def test_the_notebook_reads_old_and_new_logs_as_one_setting(tmp_path, monkeypatch, capsys):
    """A committed log, and what the same command's would be today; without buffers, --noise has no effect."""
    (committed,) = (ROOT / FOLDER / "logs/digits").glob("*_buffer50_seed0.log")
    text = committed.read_text()
    flags = [
        "--data",
        "digits",
        "--feature_size",
        8,
        "--down",
        "[0,1]",
        "--nepochs",
        10,
        "--epochdecay",
        4,
        "--seed",
        0,
    ]
    for name, buffer in [
        ("new", ["--buffer", 50]),
        ("turns", ["--buffer", 0]),
        ("noise", ["--buffer", 0, "--noise", 0.5]),
    ]:
        arguments = json.dumps(vars(script.parse_args([str(flag) for flag in (*flags, *buffer)])))
        (tmp_path / f"x-cifar_buffer-{name}.log").write_text(f"arguments: {arguments}\n{text.partition(chr(10))[2]}")
    (tmp_path / committed.name).write_text(text)
    runs, printed = read_by_the_notebook(tmp_path, monkeypatch, capsys)
    assert (len(runs), runs.setting.nunique(), {*runs.slowdown}, printed) == (4, 1, {1.0}, "")


@pytest.mark.slow
@pytest.mark.parametrize("logs", ["committed", "one run"])
def test_the_notebook_runs(logs, tmp_path):
    folder = ROOT / FOLDER
    environment = {**os.environ, "PICTURE": str(tmp_path / "picture.png")}
    if logs == "one run":
        environment["LOGS"] = str(tmp_path)
        assert run(SCRIPT, *QUICK, "--nepochs", 1, cwd=tmp_path)[0] == 0
        (log,) = tmp_path.glob("*.log")
        (tmp_path / "20260101-000000_buffer_experiments-cifar_buffer-stopped.log").write_text(log.read_text()[:-1])
        (tmp_path / "published_cifar_buffer_buffer30_seed0.log").write_text(
            "n: 0, epoch 1,epochtrue 1, train 40.0, test 41.0,ense 41.0 \n"
        )
        (tmp_path / "20260101-000000_buffer_experiments-cifar_buffer-empty.log").touch()
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, folder / "BufferCurves.ipynb"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    cells = json.loads((tmp_path / "BufferCurves.ipynb").read_text())["cells"]
    printed = [output.get("text", []) for cell in cells for output in cell.get("outputs", [])]
    left_out = "".join(itertools.chain(*printed)).count("left out: ")
    assert left_out == (2 if logs == "one run" else 0)


def test_memory_is_compared_with_what_is_free(monkeypatch):
    buffers = make("--buffer", 3).buffers
    needed, step = sum(b.num_bytes() for b in buffers), 6 * 4 * BATCH * 4 * 32 * 32
    monkeypatch.setattr(models, "available_memory", lambda device: needed + step)
    make("--buffer", 3)
    monkeypatch.setattr(models, "available_memory", lambda device: needed + step - 1)
    with pytest.raises(SystemExit, match="2"):
        make("--buffer", 3)
    make("--buffer", 3, "--quantize", "1,4")  # fits


def test_available_memory(tmp_path, monkeypatch):
    """The system's, or what is left of a container's share, without the files in its cache."""
    cpu = torch.device("cpu")
    assert 0 < buffer.available_memory(cpu) <= psutil.virtual_memory().total
    monkeypatch.setattr(buffer, "Path", lambda name: tmp_path / name.removeprefix("/"))
    assert buffer.available_memory(cpu) == psutil.virtual_memory().total
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    assert buffer.available_memory(cpu) == 1024 * 1000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("memory.stat", "anon 7\ninactive_file 100\n"), ("memory.current", "300\n")):
        (group / name).write_text(text)
    for limit, free in (("max", 1024 * 1000), ("500", 500 - (300 - 100)), (str(10**9), 1024 * 1000)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert buffer.available_memory(cpu) == free
