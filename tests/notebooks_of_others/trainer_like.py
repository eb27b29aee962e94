"""Albumentations with the pipeline written out, helpers of a utils module, everything kept as files."""

import albumentations as A
import torch
from albumentations.pytorch import ToTensorV2
from torch import nn

from config import Config
from data import make_loaders
from main import find_lr, fit_model, one_cycle, predict, test
from models import CustomResNet
from report import save_predictions
from utils import get_device, seed_everything, summarize
from visualize import (
    class_accuracy,
    plot_augmentations,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_finder,
    plot_misclassified,
    plot_samples_by_class,
    save_figure,
)

mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
train_transforms = A.Compose(
    [
        A.PadIfNeeded(40, 40),
        A.RandomCrop(32, 32),
        A.HorizontalFlip(p=0.5),
        A.Normalize(mean, std),
        ToTensorV2(),
    ]
)
# theirs: fix_seed(1)
seed_everything(1)
device = get_device()
# theirs: train_loader, test_loader = get_loaders(train_transforms, test_transforms)
train_loader, _, test_loader = make_loaders(Config(batch_size=512), device, train_transforms)
classes = train_loader.dataset.classes
# theirs: show_augmentations(train_transforms, train_loader)
plot_augmentations(train_transforms, train_loader)
# theirs: class_samples(train_loader, classes)
plot_samples_by_class(train_loader, classes)
model = CustomResNet().to(device)
# theirs: with_summary(model)
summarize(model)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
# theirs: finder = lr_finder(model, optimizer, criterion, device, train_loader, num_iter=30, end_lr=1)
finder = find_lr(model, optimizer, criterion, device, train_loader, num_iter=30, end_lr=1)
plot_lr_finder(finder)
# theirs: scheduler = make_scheduler(optimizer, 0.01, epochs=1, steps_per_epoch=len(train_loader))
scheduler = one_cycle(optimizer, 0.01, epochs=1, steps_per_epoch=len(train_loader))
# theirs: log = Trainer(model, device, train_loader, test_loader, optimizer, scheduler, criterion).fit(1)
log = fit_model(model, device, train_loader, test_loader, optimizer, scheduler, criterion, 1)
# theirs: save_plot(plot_history(log), "curves.png")
save_figure(plot_history(log), "curves.png")
test(model, test_loader, device, criterion)
# theirs: wrong = wrong_predictions(model, test_loader, device)
wrong = predict(model, test_loader, device)
# theirs: save_plot(plot_misclassified(wrong, classes, 20), "wrong.png")
save_figure(plot_misclassified(wrong, classes, 20), "wrong.png")
# theirs: save_plot(plot_gradcam(model, wrong, classes, "layer2"), "cam.png")
save_figure(plot_gradcam(model, wrong, classes, "layer2"), "cam.png")
# theirs: to_csv(wrong, "predictions.csv")
save_predictions(wrong, "predictions.csv")
plot_confusion_matrix(model, test_loader, classes, device)
# theirs: test_class_accuracy(model, test_loader, classes, device)
class_accuracy(model, test_loader, classes, device)
# theirs: print_classification_report(model, test_loader, classes)
# no counterpart: a run's report has the table
