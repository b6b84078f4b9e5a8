"""SMoRA and MoLA, mixtures of LoRA experts, as methods of PEFT; importing this package registers them.

```python
from peft import get_peft_model
from zoo.lora import MolaConfig, SmoraConfig
model = get_peft_model(base, SmoraConfig(r=64, top_k=8, target_modules="all-linear"))
```

Everything of PEFT works on them: `save_pretrained`, `PeftModel.from_pretrained` (after `import zoo.lora`),
`load_adapter`, `set_adapter`, `disable_adapter`, `modules_to_save`. Everything of `zoo.moe` works on them too: add
`collect_aux_losses(model).total` to the loss of each step, call `update_selection_biases(model)` before each optimiser
step (in `transformers.Trainer`, `zoo.lora.trainer.RoutedTrainerMixin` does both; in Lightning, `zoo.task.MoETask` and
`zoo.callbacks.BiasBalancing`), watch the experts by `record_usage(model)`.
"""

from peft.utils import register_peft_method

from zoo.lora.config import MolaConfig, SmoraConfig
from zoo.lora.layer import MixtureLinear
from zoo.lora.mixture import LoraMixture
from zoo.lora.model import MolaModel, SmoraModel

register_peft_method(name="smora", config_cls=SmoraConfig, model_cls=SmoraModel)
register_peft_method(name="mola", config_cls=MolaConfig, model_cls=MolaModel)

__all__ = ["LoraMixture", "MixtureLinear", "MolaConfig", "MolaModel", "SmoraConfig", "SmoraModel"]
