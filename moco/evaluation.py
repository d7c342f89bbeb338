"""Accuracy on held-out images, kNN and classifiers, sharded over the ranks.

Ranks share whole batches, cut in the order of the data: each batch is computed alike whatever the
number of processes, and every image counts once.
"""

from operator import itemgetter

import torch
import torch.distributed as dist

from moco import data
from moco.augment import normalize
from moco.builder import features, unit
from moco.distributed import rank, world
from moco.keeper import check_signals
from moco.sources import Arrays

BATCH = 256  # images of one forward pass on one rank
KNN_T = 0.07  # temperature of the votes (Wu et al. 2018, arXiv 1805.01978)


def batches(source, chosen, size, workers, device, bad=None, **crop):
    """This rank's batches of the images `chosen` → positions in `chosen` [n], normalised images.

    What can't be read is in none of them and goes to `bad`, data.BadImages; without it that is an
    error.
    """
    # Starting workers takes longer than to hand over what is in memory already.
    workers = 0 if isinstance(source, Arrays) else workers
    shares = torch.arange(len(chosen)).split(BATCH)
    rounds = -(-len(shares) // world())  # of the ranks with the most
    shares = shares[rank() :: world()]
    loader = data.create_loader(
        data.CentreCrop(source, size, **crop), [chosen[s] for s in shares], workers, device
    )
    for share, (images, shown) in zip(shares, data.checked(loader, bad)):
        if len(shown):
            images = images.to(device, non_blocking=device.type == "cuda")
            yield share[shown], normalize(images.float() / 255, source.pixels)
        check_signals()
    if len(shares) < rounds:
        check_signals()
    if bad:
        bad.meet()


def everyone(x):
    """Sum of x over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


@torch.no_grad()
def accuracy(classify, heads, source, size, workers, device, bad=None, **crop):
    """Accuracy of several classifiers in one pass over labelled images → [(top-1, top-5)], in %.

    classify: normalised images [n, C, H, W] → logits [n, classes] of each of the `heads`. With
    fewer than 5 classes top-5 is 100. An image that can't be read counts as not recognised. `crop`
    goes to data.CentreCrop.
    """
    right = torch.zeros(heads, 2, dtype=torch.long, device=device)
    chosen = torch.arange(len(source))
    for share, images in batches(source, chosen, size, workers, device, bad, **crop):
        labels = source.labels[share].to(device)[:, None]
        for head, logits in enumerate(classify(images)):
            hits = logits.topk(min(5, logits.shape[1])).indices == labels
            hits &= logits.isfinite().all(1, keepdim=True)  # a classifier that diverged knows none
            right[head] += torch.stack([hits[:, 0].sum(), hits.sum()])
    return [(100 * top1 / len(source), 100 * top5 / len(source))
            for top1, top5 in everyone(right).tolist()]  # fmt: skip


def in_words(top1, top5, classes):
    """Percentages; top-5 says something from 5 classes on."""
    return f"top-1 {top1:.2f} %" + (f", top-5 {top5:.2f} %" if classes >= 5 else "")


def better(old, new):
    """The higher of two (top-1, epoch); of equal ones the old."""
    return max(old, new, key=itemgetter(0))


class KNN:
    """Weighted kNN accuracy of an encoder's features on held-out images (paper Sec. 4, Fig. 1).

    bank: at most `bank_size` training images, the same ones each time, un-augmented. k: 200 for a
    bank of 10,000 and more, 20 for a smaller one. What can't be read is left out of the bank, and
    counts as not recognised among the held-out images.
    """

    def __init__(self, dataset, size, bank_size, workers, device):
        size_of_bank = min(bank_size or len(dataset.bank), len(dataset.bank))
        self.chosen = torch.arange(size_of_bank) * len(dataset.bank) // size_of_bank
        self.k = min(200 if len(self.chosen) >= 10_000 else 20, len(self.chosen))
        self.data, self.where = dataset, (size, workers, device)
        self.labels = dataset.bank.labels[self.chosen].to(device)

    @torch.no_grad()
    def __call__(self, encoder, autocast, ks=None, bad=None):
        """encoder, a context for its forward pass → accuracy in percent for each k of ks."""
        ks = ks or [self.k]
        training = encoder.training
        encoder.eval()
        bank = torch.zeros(len(self.chosen), encoder.num_features, device=self.labels.device)
        read = torch.zeros_like(self.labels, dtype=torch.long)
        for share, images in batches(self.data.bank, self.chosen, *self.where, bad):
            with autocast():
                bank[share] = unit(features(encoder, images))
            read[share] = 1
        bank = everyone(bank)  # each row is of one rank, and 0 on the others
        labels, read = self.labels, everyone(read).bool()
        if not read.all():
            bank, labels = bank[read], labels[read]
        ks = [min(k, len(bank)) for k in ks]

        val, right = self.data.val, torch.zeros(len(ks), dtype=torch.long, device=bank.device)
        for share, images in batches(val, torch.arange(len(val)), *self.where, bad):
            with autocast():
                queries = unit(features(encoder, images))
            answers = knn(queries, bank, labels, self.data.classes, ks)  # [n, len(ks)]
            right += (answers == val.labels[share].to(bank.device)[:, None]).sum(0)
        encoder.train(training)
        return [100 * n / len(val) for n in everyone(right).tolist()]


def knn(queries, bank, labels, classes, ks, T=KNN_T):
    """Votes of the k nearest, weighted by exp(similarity/T): unit [n, d], [b, d] → [n, len(ks)]."""
    similarity, nearest = (queries @ bank.T).topk(max(ks))  # [n, k], nearest first
    weights, nearest = (similarity / T).exp(), labels[nearest]
    answers = []
    for k in ks:
        votes = queries.new_zeros(len(queries), classes)
        votes.scatter_add_(1, nearest[:, :k], weights[:, :k])
        answers.append(votes.argmax(1))
    return torch.stack(answers, 1)
