"""Lightning tasks of customization: training a global expert, and customising it for users."""

from typing import Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tasks.customization.model import LeNet
from zoo.task import MoETask, StepOutput


class GlobalExpertTask(MoETask):
    """Train a LeNet on generic handwriting; afterwards it is never changed again."""

    monitor = "val_accuracy"

    def __init__(
        self,
        variant: Literal["lenet5", "lenet-large"] = "lenet5",
        num_classes: int = 47,
        lr: float = 4e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.25,
    ) -> None:
        """Build network, loss and metrics.

        Args:
            variant: Of `LeNet`.
            num_classes: Width of its output.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.
        """
        self.variant = variant
        self.num_classes = num_classes
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Set the network."""
        self.model = LeNet(self.variant, self.num_classes)

    def configure_losses(self) -> None:
        """Cross-entropy."""
        self.criterion = nn.CrossEntropyLoss()

    def configure_metrics(self) -> MetricCollection:
        """Share of right answers among the merged classes; higher is better."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})

    def step(self, batch: tuple[Tensor, Tensor]) -> StepOutput:
        """Classify a batch of images `(N, 1, 28, 28)`."""
        images, labels = batch
        logits = self(images)
        return StepOutput(self.criterion(logits, labels), logits, labels)
