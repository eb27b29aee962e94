"""This package: `train`, with what it chooses by itself."""

from torch import nn

from benchmarks.peers.job import LR, Job
from config import Config
from data import make_loader
from sources.cifar10 import CLASSES
from sources.split import Split
from training.loops import train
from training.optim import make_optimizer
from transforms import train_transform
from utils import name_of, pick_precision


def fit(job: Job) -> nn.Module:
    """Train for some batches of the first epoch; the job's clock stands in for a scheduler."""
    split = Split(job.images, job.labels, CLASSES)
    config = Config(batch_size=job.batch, max_train_batches=job.updates)
    loader = make_loader(split, train_transform(), job.device, config, shuffle=True)
    dtype = pick_precision(job.precision, job.device)
    job.note = f"{name_of(dtype)}, channels-last"
    model = job.make_model().to(job.device)
    optimizer = make_optimizer("adam", model, LR)
    train(model, job.device, loader, optimizer, job, precision=job.precision)
    return model
