"""A Learner of fastai as its pages on vision, channels-last and mixed precision have it.

Crops image by image in workers, flips and normalisation on whole batches. Its mixed precision asks for
CUDA by name, so a CPU trains in fp32, in channels-last memory.
"""

import warnings

from fastai.callback import channelslast  # noqa: F401, gives Learner its to_channelslast
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.augment import CropPad, Flip, PadMode, RandomCrop
from fastai.vision.core import cifar_stats
from fastai.vision.data import ImageBlock
from torch import nn

from benchmarks.peers.job import LR, Job


class Clock(Callback):
    """Tells the job of every update."""

    def __init__(self, job: Job):
        self.job = job

    def after_batch(self) -> None:
        """One update is done."""
        if self.training:
            self.job.mark()


def make_loaders(job: Job) -> DataLoaders:
    """DataLoaders over as many images as the job needs; a Learner must have images to validate with."""
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        getters=[lambda i: job.images[i], lambda i: int(job.labels[i])],
        splitter=IndexSplitter([0]),
        item_tfms=[CropPad(40, pad_mode=PadMode.Reflection), RandomCrop(32)],
        batch_tfms=[Flip(), Normalize.from_stats(*cifar_stats)],
    )
    count = job.needed + 1
    return block.dataloaders(range(count), bs=job.batch, num_workers=job.workers, device=job.device)


def fit(job: Job) -> nn.Module:
    """Train for one pass over as many images as the job needs, and validate nothing."""
    warnings.filterwarnings("ignore")
    model = job.make_model()
    options = {"loss_func": nn.CrossEntropyLoss(), "lr": LR, "path": job.folder}
    learner = Learner(make_loaders(job), model, cbs=[Clock(job)], **options)
    mixed = job.device.type == "cuda" and job.precision != "fp32"
    job.note = f"{job.precision if mixed else 'fp32'}, channels-last"
    if mixed:
        learner.to_channelslast(amp_mode=job.precision)
    else:
        learner.to_channelslast(use_amp=False)
    learner.fit(1)
    return model
