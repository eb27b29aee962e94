"""Images, labels and predictions collected in three lists, as NumPy pictures and plain numbers."""

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from config import Config
from data import make_loaders
from main import find_lr, fit_model, test
from models import CustomResNet
from transforms import denormalize
from utils import get_device
from visualize import (
    class_accuracy,
    plot_class_accuracy,
    plot_confusion_matrix,
    plot_gradcam,
    plot_lr_finder,
    plot_misclassified,
    plot_samples,
)

device = get_device("cpu")
# theirs: trainloader, testloader = load_cifar10(batch_size=512)
trainloader, _, testloader = make_loaders(Config(batch_size=512), device)
classes = trainloader.dataset.classes
images, labels = next(iter(trainloader))
picture = denormalize(images[0])
plot_samples(images, labels, classes)
plt.show()
model = CustomResNet()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
# theirs: result = lr_range_test(model, trainloader, optimizer, F.cross_entropy, device, num_iter=30, end_lr=1.0)
result = find_lr(model, trainloader, optimizer, F.cross_entropy, device, num_iter=30, end_lr=1.0)
# theirs: plot_lr_range(result)
plot_lr_finder(result)
# theirs: fit(model, trainloader, testloader, optimizer, F.cross_entropy, device, 1)
fit_model(model, trainloader, testloader, optimizer, F.cross_entropy, device, 1)
# theirs: validate(model, testloader, F.cross_entropy, device)
test(model, testloader, F.cross_entropy, device)

pictures, truths, answers = [], [], []
for inputs, targets in testloader:
    outputs = model(inputs).argmax(1)
    pictures += list(denormalize(inputs))
    truths += targets.tolist()
    answers += outputs.tolist()
plot_misclassified(pictures, truths, answers, classes)
plt.show()
# theirs: confusion(truths, answers, classes)
plot_confusion_matrix(truths, answers, classes)
# theirs: per_class(truths, answers, classes)
class_accuracy(truths, answers, classes)
# theirs: bar_per_class(truths, answers, classes)
plot_class_accuracy(truths, answers, classes)
# theirs: show_cam(model, pictures, truths, answers, classes, "layer2")
plot_gradcam(model, pictures, truths, answers, classes, "layer2")
