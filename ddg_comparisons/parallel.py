"""DGL, DDG, features replay and backprop, each module in a process of its own (Section 5.3, arXiv 1901.08164).

Ends with the weights of cifar_dgl.py, cifar_ddg.py, cifar_features_replay.py or cifar_backprop.py: the same work is
spread over K processes, which exchange outputs and gradients by torch.distributed.

    torchrun --standalone --nproc_per_node=2 parallel.py --method ddg    # CIFAR-10, downloaded to ./data if missing
    torchrun --standalone --nproc_per_node=3 parallel.py --method fr --num_splits 3 --data digits --depth 20

Rank n has module n. In iteration t it runs F, its forward pass on batch t, then B, a backward pass and a step, on batch
t or an older one. Receives are posted ahead and sends are asynchronous, so a rank waits only for what it needs.
(Backprop's are not posted ahead: until a message arrives, NCCL's receive occupies the GPU, and cuDNN's search for
kernels waits for that. The rank would wait for a message that depends on what it is about to compute.)

    dgl       F(n,t) needs F(n-1,t).                     A step takes max F + B, or a transfer if that is longer.
    ddg, fr   B(n,t) needs B(n+1,t-1) too: the locking.  The largest mean, over neighbours n..m, of F + B and transfers,
                                                         or a transfer if that is longer.
    backprop  B(n,t) needs B(n+1,t) too.                 The sum of all F + B and transfers.

Where DDG's mean comes from: F(n,t), ..., F(m,t), B(m,t), ..., B(n,t+m-n), F(n,t+m-n+1) is a chain. It has m-n+1
iterations, F and B of all m-n+1 modules, and 2(m-n) transfers. So with modules of equal speed, DDG waits in each
iteration for (K-1)/K of a transfer there and back, and DGL for none. FR's replays need no gradient: in the chain, only
module m's counts, and the last module has none.

Writes a log and a checkpoint like the script of the method. benchmark.py measures the speed.
"""

import argparse
import os
import signal
import sys

import utils

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cifar
import cifar_ddg
import cifar_features_replay
import machines
import models
import wires
from module import SCRIPTS, Module, parts


def parse_args(argv=None):
    parser = utils.ArgumentParser(__file__, __doc__)
    cifar.add_data_flags(parser)
    cifar.add_bn_init_flag(parser)
    add = models.add_flags(parser, "number of modules (K) and of processes")
    add("--method", choices=METHODS, default="dgl", help="how the modules are trained")
    args = models.check_cut(parser, parser.parse_args(argv))
    if args.bn_init != "ones" and args.method != "dgl":
        parser.error(f"--bn-init has no effect on --method {args.method}: only auxiliary networks start as published")
    if os.environ.get("WORLD_SIZE") != str(K := args.num_splits):
        start = f"torchrun --standalone --nproc_per_node={K} parallel.py"
        parser.error(f"--num_splits {K} needs {K} processes: start with {start}")
    if args.method == "backprop" and args.precision == "fp16":
        parser.error("backprop in fp16 has one loss scaler for all modules: choose --precision bf16")
    return args


# The four methods: a pass of module m over batches, pairs of input (B, C, H, W) and labels (B,)


def train_dgl(m, batches):
    """DGL (Algorithm 1), any module."""
    for x, labels in batches:
        with m.autocast:
            representation = m.block(x)
        if m.outputs:
            m.outputs.send(representation.detach())  # update unlocking: nothing comes back
        with m.autocast:
            logits = m.auxiliary_net(representation)
            loss = F.cross_entropy(logits, labels)
        (loss * m.scale()).backward()
        m.step()
        m.meter.update(loss, logits, labels)


def train_backprop(m, batches):
    """Backprop, a module below the last."""
    for x, _ in batches:
        with m.autocast:
            output = m.block(x)
        m.outputs.send(output.detach())
        m.gradients.expect(len(x))
        output.backward(m.gradients.receive().to(output.dtype))  # after all modules above: the bubble
        m.send_back(x, m.one)
        m.step()


def train_ddg(m, batches):
    """DDG (Algorithm 1 of its paper), a module below the last."""
    graphs = m.delays.graphs[m.n]
    for x, _ in batches:
        with m.autocast:
            graphs.append(cifar_ddg.Graph(m.block, x, m.block.named_parameters()))
        m.outputs.send(graphs[-1].output.detach())
        if len(graphs) > m.late:  # not so in the first K-1-n iterations of all
            graph, scale = graphs.pop(0), m.scale()
            graph.backward(m.gradients.receive() * scale)  # found by module n+1 one iteration ago
            m.send_back(graph.x, scale)
            m.step()
        if len(graphs) == m.late:
            m.gradients.expect(len(graphs[0].x))  # module n+1 finds it in this iteration


def train_fr(m, batches):
    """Features replay (Algorithm 1 of its paper), a module below the last."""
    inputs = m.delays.inputs[m.n]
    for x, _ in batches:
        inputs.append(x)
        with torch.no_grad(), m.autocast:
            m.outputs.send(m.block(x))
        if len(inputs) > m.late:
            x, scale = inputs.pop(0), m.scale()
            with m.autocast:
                output = cifar_features_replay.replay(m.block, x)
            output.backward((m.gradients.receive() * scale).to(output.dtype))
            m.send_back(x, scale)
            m.step()
        if len(inputs) == m.late:
            m.gradients.expect(len(inputs[0]))


def train_last(m, batches):
    """The last module of backprop, DDG and FR. Its gradient is there at once."""
    for x, labels in batches:
        with m.autocast:
            logits = m.block(x)
            loss = F.cross_entropy(logits, labels)
        scale = m.scale()
        (loss * scale).backward()
        m.send_back(x, scale)
        m.step()
        m.meter.update(loss, logits, labels)


# How a module below the last trains, and the last one
METHODS = {
    "dgl": (train_dgl, train_dgl),
    "ddg": (train_ddg, train_last),
    "fr": (train_fr, train_last),
    "backprop": (train_backprop, train_last),
}


def train_epoch(method, m, batches):
    for part in m.parts:
        part.train()
    METHODS[method][m.is_last](m, batches)
    m.end_pass()


class Saved:
    """What the modules keep beside the weights, for rank 0's checkpoint."""

    states = ()

    def state_dict(self):
        return {"states": self.states}

    def load_state_dict(self, state):
        self.states = state["states"]


def make_network(args, num_classes, device):
    make = models.DGLNet if args.method == "dgl" else models.ResNet
    network = make(num_classes, args.depth, args.num_splits)
    if args.method == "dgl":
        cifar.init_batch_norm(network.auxiliary_nets, args.bn_init)
    return utils.to_device(network, args, device)


def labels_of_next_pass(batches):
    """The labels of each batch of the next pass over the training set."""
    before = batches.generator.get_state()
    labels = [batches.labels[index] for index, *_ in batches.draw()[: len(batches)]]
    batches.generator.set_state(before)
    return labels


def log_epoch(run, epoch, args, model, autocast, states):
    """Test the network with the weights of all ranks. Of their states, only what the checkpoint needs is left."""
    meters = []
    for n, state in enumerate(states):
        weights = state.pop("weights")
        for part, own in zip(parts(model, n), weights) if n else ():  # rank 0's own are there, and its graphs need them
            part.load_state_dict(own)
        meters.append(cifar.Meter("cpu"))
        meters[n].sums = state.pop("meter")
    script = SCRIPTS[args.method]
    top1 = script.evaluate(model, autocast, run.data.test)
    lines = enumerate(zip(meters, top1), start=1) if args.method == "dgl" else [(len(states), (meters[-1], top1))]
    for n, (meter, accuracy) in lines:
        cifar.log_epoch(run, n, epoch, meter, accuracy)


def main(argv=None):
    if os.environ.get("RANK", "0") == "0":  # it alone needs the data, the checkpoint and the save folder
        args = parse_args(argv)
    else:
        args = None
        if {"-h", "--help"} & {*(sys.argv if argv is None else argv)}:
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 says what there is to say
    try:
        run_rank(args)
    except RuntimeError as error:
        machines.lost(error)
        raise


def run_rank(args):
    rank, _ = machines.join("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    args = argparse.Namespace(**wires.broadcast(args and vars(args)))
    device = wires.set_up(args)
    data = cifar.load_data(args, device) if rank == 0 else None
    num_classes = wires.broadcast(data and data.num_classes)
    script = SCRIPTS[args.method]
    model = make_network(args, num_classes, device)
    module, saved = Module(args, model, device), Saved()
    run = utils.Run(args, data, model=model, modules=saved) if rank == 0 else None
    start = wires.broadcast(run and {"epoch": run.epoch, "model": model.state_dict(), "modules": saved.states})
    model.load_state_dict(start["model"])
    if start["modules"]:
        module.load_state_dict(start["modules"][rank])
    for epoch in run.epochs(args.epochs) if run else range(start["epoch"] + 1, args.epochs + 1):
        script.set_learning_rate([module.optimizer], epoch, args.drops)
        labels = wires.broadcast(run and labels_of_next_pass(data.train))
        batches = tqdm(data.train, disable=None, leave=False) if run else module.receive(labels)
        train_epoch(args.method, module, batches)
        saved.states = wires.gather(module.state_dict())
        if run:
            log_epoch(run, epoch, args, model, module.autocast, saved.states)
    machines.leave()


if __name__ == "__main__":
    main()
