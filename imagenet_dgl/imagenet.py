"""End-to-end training on ImageNet: what imagenet_dgl.py is compared with (Section 5.4, arXiv 1901.08164).

The published runs, which without a GPU train in float32:

    python imagenet.py IMAGENET_DIR -j THREADS --arch resnet152 --half --dynamic-loss-scale
    python imagenet.py IMAGENET_DIR -j THREADS --arch vgg13_bn --half --dynamic-loss-scale
    python imagenet.py IMAGENET_DIR -j THREADS --arch vgg19_bn --half --dynamic-loss-scale

Several GPUs, or CPUs, that share each batch:

    torchrun --nproc_per_node=4 imagenet.py IMAGENET_DIR --arch resnet152

As published, the schedule counts epochs from 1 and divides the learning rate by 10 at epochs 10, 20, ...: it falls for
the first time after 9 epochs. Log and --start_epoch count from 0.

Writes a log with one line per epoch, and a checkpoint to --resume from.
"""

import utils

import torch
import torch.nn.functional as F

import data
import models
import ranks
import runs
import training


def parse_args(argv=None):
    parser = training.make_parser(__file__, __doc__)
    parser.set_defaults(arch="vgg19_bn")
    parser.ignore("--ensemble")
    return training.check_flags(parser, parser.parse_args(argv))


def make_model(args, num_classes):
    try:
        return models.build_plain(args.arch, num_classes, data.image_size(args))
    except ValueError as error:
        utils.fail(error)


def train_epoch(model, optimizer, scaler, autocast, batches, meter):
    """One epoch of backpropagation through the whole network."""
    model.train()
    for images, labels in batches:
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        meter.update(loss, logits, labels)


@torch.no_grad()
def evaluate(model, autocast, batches):
    """[top-1, top-5] in %, over the images of all ranks."""
    model.eval()
    correct = torch.zeros(2, dtype=torch.float64, device=batches.device)
    count = torch.zeros((), device=batches.device)
    for images, labels in training.progress_bar(batches, "validation"):
        with autocast:
            logits = model(images)
        correct += training.hits(logits, labels)
        count += len(labels)
    return training.percent(correct, count)


@ranks.one_message
def main(argv=None):
    args = parse_args(argv)
    if args.flops:
        return training.print_costs(models.costs(make_model(args, 1000), data.image_size(args)))
    device = ranks.setup(args)
    images = data.load_data(args, device)
    model = training.to_device(make_model(args, images.num_classes), args, device)
    autocast = utils.autocast(args, device)
    if args.evaluate:
        runs.load_network(model, args, images)
        print("test top1:{:.3f} (top5:{:.3f})".format(*evaluate(model, autocast, images.test)))
        for text in runs.skipped(images):
            print(text)
        return ranks.end()
    parallel = ranks.data_parallel(model)
    meter = training.Meter(device)
    (optimizer,), (scaler,) = training.make_optimizers([model], args, device, args.start_epoch + 1)
    run = runs.Run(args, images, model=model, optimizer=optimizer, scaler=scaler)
    for epoch in run.epochs(args.epochs):
        if (epoch + 1) % args.epochdecay == 0:  # with the new learning rate, momentum and loss scale start again
            (optimizer,), (scaler,) = training.make_optimizers([model], args, device, epoch + 1)
            run.replace_parts(optimizer=optimizer, scaler=scaler)
        batches = run.watch(images.train, [meter], epoch)
        train_epoch(parallel, optimizer, scaler, autocast, batches, meter)
        ranks.average_buffers(model)
        test1, test5 = evaluate(model, autocast, images.test)
        loss, top1, top5 = meter.pop()
        run.check_finite(loss, 0, epoch)
        train, test = f"train top1:{top1:.3f}(top5:{top5:.3f})", f"test top1:{test1:.3f} (top5:{test5:.3f})"
        run.log(f"lr: {optimizer.param_groups[0]['lr']:g}, epoch {epoch}, {train}, {test}")
        run.scalars(epoch, 0, loss=loss, train_top1=top1, test_top1=test1)
        run.end_epoch(epoch, test1)
    del parallel  # torch 2.11 may hang if it outlives its process group
    ranks.end()


if __name__ == "__main__":
    main()
