"""MoCo v3 linear probe: kNN and linear classifiers on frozen features (paper Sec. 4).

One process (GPU or CPU), after `python main_moco.py @recipes/digits.txt`:
    python main_lincls.py @recipes/lincls_digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_lincls.py @recipes/lincls_vit_small.txt /data/imagenet \\
        --pretrained runs/vit_small_300/checkpoint.pth
Five rates for the price of one, kNN before; then the accuracy of a saved classifier:
    python main_lincls.py /data/imagenet --pretrained CKPT --knn --lr .1 .3 1 3 10
    python main_lincls.py /data/imagenet --pretrained linear_lr3.pth --evaluate
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from moco import checkpoint, cli, data, distributed
from moco.augment import RGB, normalize
from moco.builder import features
from moco.distributed import ViewBatchNorm, at_least_fp32
from moco.evaluation import KNN, accuracy, better, in_words
from moco.keeper import Keeper
from moco.log import Log, describe, introduce
from moco.optimizer import descend, warmup_cosine
from moco.sources import labelled


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags(), cli.downstream_flags()])
    parser.set_defaults(arch=None, img_size=None, in_chans=None, epochs=90, batch_size=1024)
    add = parser.add_argument
    add("--lr", type=cli.positive_float, nargs="+", default=[0.1], metavar="LR", help="base rates, "
        "a classifier for each; used: lr · batch/256")  # fmt: skip
    add("--crop-min", type=cli.share, default=0.08, help="smallest crop, share of the area")
    add("--batchnorm", action="store_true", help="normalise features before the classifiers, as "
        "MAE does: for those of small spread")  # fmt: skip
    add("--knn", action="store_true", help="kNN accuracy, before the probe")
    add("--knn-bank", type=cli.positive, metavar="IMAGES", help="training images that kNN searches "
        "(default: all)")  # fmt: skip
    args = cli.check_downstream(parser, parser.parse_args(argv))
    if len({f"{lr:g}" for lr in args.lr}) < len(args.lr):  # as files and log.jsonl name them
        parser.error("--lr names a rate twice, in 6 digits")
    if args.knn_bank and not args.knn:
        parser.error("--knn-bank needs --knn")
    if args.epochs == 0 and not (args.knn or args.evaluate):
        parser.error("--epochs 0 trains nothing: add --knn or --evaluate")
    return args


class Classifiers(nn.Module):
    """A linear classifier for each rate, on the same features: [N, d] → [N, classes] each.

    batchnorm: features are normalised first, without affine, as MAE's probe has it (arXiv
    2111.06377, A.1); `folded` gives the linear classifier that does both.
    """

    def __init__(self, linears, batchnorm=None):
        super().__init__()
        self.linears, self.batchnorm = nn.ModuleList(linears), batchnorm

    def forward(self, h):
        if self.batchnorm:
            h = self.batchnorm(h[None])[0]
        return [linear(h) for linear in self.linears]

    @torch.no_grad()
    def folded(self):
        for linear in self.linears:
            if self.batchnorm:
                mean, var = self.batchnorm.running_mean, self.batchnorm.running_var
                linear = copy.deepcopy(linear)
                linear.weight /= (var + self.batchnorm.eps).sqrt()
                linear.bias -= linear.weight @ mean
            yield linear


def main(args):
    device, amp = distributed.set_up(args.device, args.amp, args.timeout)
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    torch.manual_seed(args.seed)
    backbone, setting = checkpoint.create_downstream(args, classifier=args.evaluate)
    dataset = labelled(cli.images(args, setting), args.data)
    backbone.requires_grad_(False).eval().to(device)  # frozen, BatchNorm's statistics as well
    size = setting["img_size"]

    if args.knn:
        knn = KNN(dataset, size, args.knn_bank, args.workers, device)
        ks = [k for k in (10, 20, 100, 200) if k <= len(knn.chosen)] or [knn.k]
        bad = data.BadImages(args.max_bad_images, len(dataset.bank))
        for k, found in zip(ks, knn(backbone, autocast, ks, bad)):
            distributed.say(f"kNN     {found:.2f} % with k {k}, bank {len(knn.chosen):,}")
    if args.evaluate:
        checkpoint.check_classes(backbone, dataset.classes, args.pretrained)
        classifiers = Classifiers([backbone.get_submodule(backbone.classifier_name)])
        bad = data.BadImages(args.max_bad_images, len(dataset.val))
        [found] = measure(backbone, classifiers, dataset, size, args.workers, autocast, bad)
        distributed.say(f"{in_words(*found, dataset.classes)} on {len(dataset.val):,} images")
        return
    if args.epochs:
        probe(args, dataset, backbone, setting, device, amp, autocast)


def probe(args, dataset, backbone, setting, device, amp, autocast):
    """Trains the classifiers, shows their table, writes each in the published layout."""
    folder = cli.output_folder(args, setting["arch"], "lincls")
    previous = checkpoint.find_previous(args, folder)
    size, training_set = setting["img_size"], dataset.bank
    batches = data.EpochBatches(len(training_set), args.batch_size, args.seed)
    crops = data.LabelledCrop(training_set, size, args.crop_min, args.seed)
    loader = data.create_loader(crops, batches, args.workers, device, persistent=True)

    classifiers = create_classifiers(args, backbone.num_features, dataset.classes).to(device)
    optimizer = create_optimizer(classifiers)
    images = len(training_set)
    bad = data.BadImages(args.max_bad_images, images, folder, resumed=bool(previous))
    log = Log(folder, args, len(batches), bad)
    parts = dict(optimizer=optimizer, batches=batches, log=log)
    # Of each rate: the last (top-1, top-5), the best top-1 and its epoch.
    results = dict(found=[(0.0, 0.0)] * len(args.lr), best=[(0.0, 0)] * len(args.lr))
    epoch, iteration, results = checkpoint.resume(previous, args, classifiers, results, **parts)
    distributed.check_agreement(device, images=len(training_set), steps=iteration)
    ddp = distributed.parallel(classifiers, device)

    about = describe(args, device, amp, **setting)
    introduce(
        folder,
        about,
        model=f"{setting['arch']}, frozen, {cli.origin(args)}",
        data=f"{args.data}: {dataset.labelled_in_words()}",
        batch=batches,
        rate=", ".join(f"{lr:g}" for lr in args.lr) + f" · {args.batch_size}/256",
    )

    def get_state():
        if len(args.lr) == 1:  # of several, one may fail
            log.check_weights(classifiers)
        extra = about | results
        return checkpoint.training_state(
            extra, keeper.epoch, keeper.iteration, classifiers, **parts
        )

    with log, Keeper(folder, args.save_minutes, get_state, epoch, iteration) as keeper:
        for done in range(epoch + 1, args.epochs + 1):
            train_one_epoch(ddp, backbone, loader, optimizer, autocast, args, log, keeper)
            found = measure(backbone, classifiers, dataset, size, args.workers, autocast, bad)
            values = {}
            for lr, (top1, top5) in zip(args.lr, found):
                name = f" lr {lr:g}" if len(args.lr) > 1 else ""
                values |= {f"acc1{name}": top1, f"acc5{name}": top5}
            log.evaluation(f"top-1 {max(found)[0]:.2f} %", **values)
            best = [better(old, (top1, done)) for old, (top1, _) in zip(results["best"], found)]
            results = dict(found=found, best=best)
            keeper.end_epoch()
            log.epoch(done)

    if distributed.rank() == 0:
        report(args, dataset, classifiers, **results)
        for lr, classifier, (top1, _) in zip(args.lr, classifiers.folded(), results["best"]):
            backbone.set_submodule(backbone.classifier_name, classifier)
            extra = about | dict(best_acc1=top1)
            state = checkpoint.training_state(extra, keeper.epoch, keeper.iteration, backbone)
            checkpoint.save(folder, state, name=f"linear_lr{lr:g}.pth")


def train_one_epoch(ddp, backbone, loader, optimizer, autocast, args, log, keeper):
    """What is left of an epoch: one forward of the backbone for all classifiers."""
    ddp.train()
    device, pixels = next(backbone.parameters()).device, loader.dataset.source.pixels
    for group, rate in zip(optimizer.param_groups, rates(args, keeper.epoch)):
        group["lr"] = rate
    settings = {f"lr {lr:g}": rate for lr, rate in zip(args.lr, rates(args, keeper.epoch))}
    loader.batch_sampler.start(keeper.epoch, keeper.iteration)
    for step, (crops, labels) in enumerate(log.timed(loader), keeper.iteration):
        losses = train_step(ddp, backbone, optimizer, autocast, crops, labels, device, pixels)
        log.step(step + 1, settings, loss=losses.nan_to_num(nan=torch.inf, posinf=torch.inf).min())
        keeper.step(step + 1)


def train_step(classifiers, backbone, optimizer, autocast, crops, labels, device, pixels=RGB):
    """crops: uint8 [N, C, H, W], labels: [N] → the loss of each classifier."""
    crops = crops.to(device, non_blocking=device.type == "cuda")
    labels = labels.to(device, non_blocking=device.type == "cuda")
    with torch.no_grad(), autocast():
        h = features(backbone, normalize(crops.float() / 255, pixels))  # [N, d]
    logits = classifiers(at_least_fp32(h))  # [N, classes] each
    losses = torch.stack([F.cross_entropy(y, labels) for y in logits])
    no_scaling = torch.amp.GradScaler(enabled=False)  # the classifiers are in fp32
    descend(losses.sum(), optimizer, no_scaling)  # no classifier has a part in another's loss
    return losses


def rates(args, epoch):
    """Of each classifier: lr · batch/256, by a cosine to 0 per epoch, as published."""
    peaks = [lr * args.batch_size / 256 for lr in args.lr]
    return [warmup_cosine(epoch, args.epochs, warmup=0, peak=peak) for peak in peaks]


def create_classifiers(args, d, classes):
    """Weights N(0, .01), biases 0; the same at each rate, so that one alone trains alike."""
    linears = [nn.Linear(d, classes) for _ in args.lr]
    for linear in linears:
        torch.manual_seed(args.seed)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    return Classifiers(linears, ViewBatchNorm(d, affine=False) if args.batchnorm else None)


def create_optimizer(classifiers):
    """SGD, a group for each classifier, whose rate is set for each epoch."""
    groups = [dict(params=linear.parameters()) for linear in classifiers.linears]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)


def measure(backbone, classifiers, dataset, size, workers, autocast, bad):
    """[(top-1, top-5)] in percent for each classifier."""
    device = next(backbone.parameters()).device
    classifiers.eval()

    def classify(images):
        with autocast():
            h = features(backbone, images)
        return classifiers(at_least_fp32(h))

    return accuracy(classify, len(classifiers.linears), dataset.val, size, workers, device, bad)


def report(args, dataset, classifiers, found, best):
    """A line for each rate, last and best; then the best rate's last accuracy."""
    for lr, classifier, last, (top1, epoch) in zip(args.lr, classifiers.linears, found, best):
        failed = "" if classifier.weight.isfinite().all() else "  (diverged)"
        print(
            f"lr {lr:<7g} last {in_words(*last, dataset.classes)}; "
            f"best {top1:.2f} % in epoch {epoch}{failed}"
        )
    lr, last = max(zip(args.lr, found), key=lambda pair: pair[1])
    print(f"linear  {in_words(*last, dataset.classes)} after {args.epochs} epochs, lr {lr:g}")


if __name__ == "__main__":
    cli.run(main, parse_args)
