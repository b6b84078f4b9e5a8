"""What `transformers.Trainer` needs to train routed adapters."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoo.moe import collect_aux_losses, routed_modules, update_selection_biases

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class RoutedTrainerMixin(Base):
    """Adds the auxiliary losses to the training loss and moves the selection biases once per optimiser step.

    `class MyTrainer(RoutedTrainerMixin, Trainer): ...`, and so with every subclass of `Trainer` that calls its
    `compute_loss`.
    """

    def __init__(self, *args: Any, bias_rate: float = 1e-3, **kwargs: Any) -> None:
        """Build the trainer.

        Args:
            args: Those of the trainer.
            bias_rate: Step by which selection biases are moved, where the model has any.
            kwargs: Those of the trainer.
        """
        super().__init__(*args, **kwargs)
        modules = [] if self.model is None else routed_modules(self.model).values()
        if any(module.biased_router is not None for module in modules):
            self.add_callback(SelectionBiases(bias_rate))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss and the auxiliary losses of this forward, which only training has."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        auxiliary = collect_aux_losses(model)
        if auxiliary.values:
            loss = loss + auxiliary.total.to(loss.device) / self.steps_not_divided_by(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def steps_not_divided_by(self, num_items_in_batch: Tensor | int | None) -> int:
        """Micro-batches of an optimiser step, unless the trainer itself divides the loss of each by their number.

        It does not where the loss is a sum over a micro-batch divided by the items of all of them.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1


class SelectionBiases(TrainerCallback):
    """Moves the selection biases before each optimiser step, by what was routed since the one before."""

    def __init__(self, rate: float = 1e-3) -> None:
        """Store the step of the sign update."""
        self.rate = rate

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases of all routers of `model` that have one."""
        update_selection_biases(kwargs["model"], self.rate)
