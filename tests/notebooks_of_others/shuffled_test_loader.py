"""A network and loaders of one's own, torchvision's pipeline, and a test loader that shuffles."""

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from main import find_lr, fit_model, predict, test, train
from utils import get_device, seed_everything, summarize
from visualize import (
    class_accuracy,
    class_counts,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_misclassified,
    plot_samples,
    plot_samples_by_class,
)


class Net(nn.Module):
    """A small network."""

    def __init__(self):
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.gap(self.block2(self.block1(x))).flatten(1))


SEED = 1
seed_everything(SEED)
device = get_device()
normalize = v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize])
train_data = datasets.CIFAR10("./data", train=True, download=True, transform=transform)
test_data = datasets.CIFAR10("./data", train=False, download=True, transform=transform)
train_loader = DataLoader(train_data, batch_size=64, shuffle=True)
test_loader = DataLoader(test_data, batch_size=64, shuffle=True)
classes = train_data.classes
# theirs: plot_data(train_loader, classes, 20)
plot_samples(train_loader, classes, 20)
# theirs: plot_classes(train_data, classes)
plot_samples_by_class(train_data, classes)
# theirs: count_labels(train_data)
class_counts(train_data)
model = Net().to(device)
# theirs: show_summary(model, (3, 32, 32))
summarize(model, (3, 32, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
criterion = nn.CrossEntropyLoss()
find_lr(model, device, train_loader, optimizer, criterion, num_iter=30, end_lr=5.0)
log = fit_model(model, device, train_loader, test_loader, optimizer, criterion, epochs=1)
train(model, device, train_loader, optimizer, criterion, 2)
test(model, device, test_loader)
plot_history(log)
predictions = predict(model, device, test_loader)
plot_misclassified(model, test_loader, classes, device)
plot_misclassified(predictions, classes)
# theirs: grad_cam(model, test_loader, classes, [model.block2[-1]])
plot_gradcam(model, test_loader, classes, [model.block2[-1]])
# theirs: show_confusion(predictions, classes)
plot_confusion_matrix(predictions, classes)
# theirs: print(class_wise_accuracy(model, device, test_loader, classes))
print(class_accuracy(model, device, test_loader, classes))
