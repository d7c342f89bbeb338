"""MoCo v3 linear probe: kNN and linear classifiers on frozen features (paper Sec. 5).

One process (GPU or CPU), after `python main_moco.py @recipes/digits.txt`:
    python main_lincls.py @recipes/lincls_digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_lincls.py @recipes/lincls_vit_small.txt /data/imagenet \\
        --pretrained runs/vit_small_300/checkpoint.pth
kNN, then five learning rates in one pass; then the accuracy of a saved classifier:
    python main_lincls.py /data/imagenet --pretrained CKPT --knn --lr .1 .3 1 3 10
    python main_lincls.py /data/imagenet --pretrained runs/RUN_lincls/linear_lr3.pth --evaluate
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from engine import cli, evaluation, launch, weights
from engine.datasets import relabel, require_labels
from engine.errors import UserError
from engine.evaluation import KNN, AccuracyRecord, format_accuracy
from engine.loader import EpochBatchSampler, LabelledCrops, UnreadableImages, create_loader
from engine.run import Run
from moco import optimizer_step, scaled_lr, warmup_cosine_lr
from moco.augmentation import normalize
from moco.batchnorm import ViewBatchNorm, at_least_fp32
from moco.distributed import all_gather


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags(), cli.downstream_flags()])
    parser.set_defaults(arch=None, img_size=None, in_chans=None, epochs=90, batch_size=1024)
    add = parser.add_argument
    lr = "base learning rates, scaled by batch/256; a classifier for each"
    add("--lr", type=cli.positive_float, nargs="+", default=[0.1], metavar="LR", help=lr)
    add("--crop-min", type=cli.fraction, default=0.08, help="smallest crop, fraction of the area")
    add("--batchnorm", action="store_true", help="normalize the features first, as MAE does")
    add("--knn", action="store_true", help="kNN accuracy, before the probe")
    bank = "training images that kNN searches (default: all)"
    add("--knn-bank", type=cli.positive_int, metavar="IMAGES", help=bank)
    args = cli.check_downstream(parser, parser.parse_args(argv))
    if len({f"{lr:g}" for lr in args.lr}) < len(args.lr):  # as files and log.jsonl name them
        parser.error("--lr names a rate twice, in 6 digits")
    if args.knn_bank and not args.knn:
        parser.error("--knn-bank needs --knn")
    if args.epochs == 0 and not (args.knn or args.evaluate):
        parser.error("--epochs 0 trains nothing: add --knn or --evaluate")
    if args.epochs == 0 and (args.resume or args.output_dir):
        parser.error("--epochs 0 has no run: drop --resume and --output-dir")
    return args


class LinearClassifiers(nn.Module):
    """A linear classifier for each learning rate, on the same features: [N, d] → [N, classes] each.

    batchnorm: features are normalized first, without affine, as in MAE's probe (arXiv 2111.06377,
    A.1).
    """

    def __init__(self, linears, batchnorm=None):
        super().__init__()
        self.linears, self.batchnorm = nn.ModuleList(linears), batchnorm

    def forward(self, h):
        if self.batchnorm is not None:
            h = self.batchnorm(h)
        return [linear(h) for linear in self.linears]

    @torch.no_grad()
    def export(self):
        """Copies of the classifiers, the BatchNorm folded into weight and bias."""
        linears = copy.deepcopy(list(self.linears))
        if self.batchnorm is not None:
            mean, var = self.batchnorm.running_mean, self.batchnorm.running_var
            for linear in linears:
                linear.weight /= (var + self.batchnorm.eps).sqrt()
                linear.bias -= linear.weight @ mean
        return linears


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    torch.manual_seed(args.seed)
    if args.evaluate:
        backbone, config, class_names = weights.create_classifier(args)
        classifier = weights.detach_classifier(backbone).to(env.device)
    else:
        backbone, config = weights.create_pretrained_backbone(args)
    splits = cli.load_splits_from_args(args, config.pixel_format)
    if args.evaluate and args.knn and splits.train_labelled is None:
        raise UserError(f"{args.data} has no labelled images to train on, which --knn searches")
    require_labels(splits, args.data, train=not args.evaluate or args.knn)
    backbone.requires_grad_(False).eval().to(env.device)  # frozen, BatchNorm's statistics as well

    if args.knn:
        print_knn(args, splits, backbone, config, env)
    if args.evaluate:
        evaluate_saved(args, splits, backbone, classifier, class_names, config, env)
    elif args.epochs > 0:
        train(args, splits, backbone, config, env)


def print_knn(args, splits, backbone, config, env):
    knn = KNN(splits, config.img_size, args.knn_bank, args.workers, env)
    k_values = [k for k in (10, 20, 100, 200) if k <= len(knn.bank_indices)] or [knn.k]
    unreadable = UnreadableImages(args.max_bad_images, len(splits.train_labelled))
    for k, accuracy in zip(k_values, knn(backbone, unreadable, k_values)):
        launch.print_rank0(f"kNN     {accuracy:.2f} % with k {k}, bank {knn.num_read:,}")


def evaluate_saved(args, splits, backbone, classifier, class_names, config, env):
    """Prints the accuracy of the classifier in --pretrained; class_names: of its outputs."""
    splits, message = relabel(splits, class_names, args.pretrained)
    if message:
        launch.print_rank0(message)
    weights.check_num_classes(classifier, splits.num_classes, args.pretrained)
    unreadable = UnreadableImages(args.max_bad_images, len(splits.val))
    classifiers = LinearClassifiers([classifier])
    [(acc1, acc5)] = evaluate(args, splits, backbone, classifiers, config, env, unreadable)
    text = format_accuracy(acc1, acc5, splits.num_classes)
    launch.print_rank0(f"{text} on {len(splits.val):,} images")


def train(args, splits, backbone, config, env):
    """Trains the classifiers, prints their table, writes each in the published layout."""
    run = Run(args, env, cli.downstream_folder(args, config.arch, "lincls"))
    crops = LabelledCrops(splits.train_labelled, config.img_size, args.crop_min, args.seed)
    sampler = EpochBatchSampler(len(crops), args.batch_size, args.seed)
    loader = create_loader(crops, sampler, args.workers, env.device, persistent=True)

    classifiers = create_classifiers(args, backbone.num_features, splits.num_classes)
    classifiers.to(env.device)
    optimizer, results = create_sgd(classifiers), AccuracyRecord(len(args.lr))
    run.restore(
        loader,
        config,
        splits,
        frozen=backbone,
        allow_divergence=len(args.lr) > 1,
        model=classifiers,
        optimizer=optimizer,
        results=results,
    )
    ddp_classifiers = env.wrap_ddp(classifiers)
    run.print_config(
        model=f"{config.arch}, frozen, {cli.weights_origin(args)}",
        data=f"{args.data}: {splits.labelled_str()}",
        batch=sampler,
        lr=", ".join(f"{lr:g}" for lr in args.lr) + f" · {args.batch_size}/256",
    )

    with run:
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(ddp_classifiers, backbone, loader, optimizer, run)
            accuracies = evaluate(args, splits, backbone, classifiers, config, env, run.unreadable)
            results.update(accuracies, epoch)
            log_accuracies(run, accuracies)
            run.end_epoch()

    print_results(args, splits, classifiers, results, run)
    for lr, linear, (acc1, _) in zip(args.lr, classifiers.export(), results.best):
        backbone.set_submodule(backbone.classifier_name, linear)
        run.save_model(f"linear_lr{lr:g}.pth", backbone, best_acc1=acc1)


def train_one_epoch(ddp_classifiers, backbone, loader, optimizer, run):
    """The steps that are left of an epoch: one forward pass of the backbone for all classifiers."""
    args, env, pixel_format = run.args, run.env, loader.dataset.dataset.pixel_format
    lrs = epoch_lrs(args, run.epoch)
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
    logged_lrs = {f"lr/{base_lr:g}": lr for base_lr, lr in zip(args.lr, lrs)}
    ddp_classifiers.train()
    for crops, labels in run.batches(loader):  # uint8 [N, C, H, W], [N]
        crops, labels = env.to_device(crops, labels)
        images = normalize(crops.float() / 255, pixel_format.mean, pixel_format.std)
        with torch.no_grad(), env.autocast():
            h = backbone(images)  # [N, d]
        losses = classifier_losses(ddp_classifiers, h, labels)
        # The classifiers share no parameters: the sum trains each of them on its own loss.
        optimizer_step(losses.sum(), optimizer)
        # The log has the lowest loss of the sweep, over the batch of all ranks; a diverged
        # classifier never has it.
        losses = all_gather(losses.detach()).mean(0)
        best_loss = losses.nan_to_num(nan=torch.inf, posinf=torch.inf).min()
        run.end_step(loss=best_loss, **logged_lrs)


def classifier_losses(classifiers, h, labels):
    """Features [N, d], labels [N] → the loss of each classifier, in fp32."""
    logits = classifiers(at_least_fp32(h))  # [N, num_classes] each
    return torch.stack([F.cross_entropy(y, labels) for y in logits])


def epoch_lrs(args, epoch):
    """Each classifier's lr in an epoch: scaled, then a cosine to 0, updated once per epoch."""
    peaks = [scaled_lr(lr, args.batch_size) for lr in args.lr]
    return [warmup_cosine_lr(epoch, args.epochs, warmup=0, peak_lr=peak) for peak in peaks]


def create_classifiers(args, d, num_classes):
    """Weights from N(0, std 0.01), biases 0.

    The seed is the same for every lr: training a single one gives the bits that a sweep gives.
    """
    linears = [nn.Linear(d, num_classes) for _ in args.lr]
    for linear in linears:
        torch.manual_seed(args.seed)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    batchnorm = ViewBatchNorm(d, affine=False) if args.batchnorm else None
    return LinearClassifiers(linears, batchnorm)


def create_sgd(classifiers):
    """SGD with a parameter group for each classifier, whose lr is set in each epoch."""
    groups = [dict(params=linear.parameters()) for linear in classifiers.linears]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)


def evaluate(args, splits, backbone, classifiers, config, env, unreadable):
    """[(acc1, acc5)] of each classifier on the validation images, in percent."""
    classifiers.eval()

    def classify(images):
        with env.autocast():
            h = backbone(images)
        return classifiers(at_least_fp32(h))

    num_classifiers = len(classifiers.linears)
    return evaluation.accuracy(
        classify, num_classifiers, splits.val, config, args.workers, env, unreadable
    )


def log_accuracies(run, accuracies):
    values = {}
    for lr, (acc1, acc5) in zip(run.args.lr, accuracies):
        suffix = f"/lr{lr:g}" if len(run.args.lr) > 1 else ""
        values |= {f"acc1{suffix}": acc1, f"acc5{suffix}": acc5}
    run.log_eval(f"top-1 {max(accuracies)[0]:.2f} %", **values)


def print_results(args, splits, classifiers, results, run):
    """A line for each learning rate, last and best accuracy; then the headline: the best last."""
    rows = zip(args.lr, classifiers.linears, results.last, results.best)
    for lr, linear, last, (best_acc1, epoch) in rows:
        diverged = "" if linear.weight.isfinite().all() else "  (diverged)"
        run.print(
            f"lr {lr:<7g} last {format_accuracy(*last, splits.num_classes)}; "
            f"best {best_acc1:.2f} % in epoch {epoch}{diverged}"
        )
    (acc1, acc5), lr = max(zip(results.last, args.lr), key=lambda pair: pair[0])
    text = format_accuracy(acc1, acc5, splits.num_classes)
    run.print(f"linear  {text} after {args.epochs} epochs, lr {lr:g}")


if __name__ == "__main__":
    cli.run_script(main, parse_args)
