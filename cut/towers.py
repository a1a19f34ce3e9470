"""Towers: small auxiliary heads that help the shared part in training and are thrown away (arXiv 2008.05808)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class SmallTowers(Callback):
    """Beside each task's head, train one linear layer on the deepest features with the same label.

    Heads that are too strong let the shared part grow weak; a head that can do little itself pulls on the shared part.
    The towers have an optimiser of their own, are in no checkpoint of the model and in no count of its size.

    Args:
        weight: Of the towers' losses, beside the heads'.
        rate: Learning rate of the towers.
    """

    def __init__(self, weight: float = 0.3, rate: float = 2e-3) -> None:
        if weight < 0 or rate <= 0:
            raise ValueError(f"weight={weight}, rate={rate}; allowed: a weight of at least 0, a rate above 0")
        self.weight, self.rate = weight, rate
        self.towers: nn.ModuleDict | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] = {}
        self._features: Tensor | None = None
        self._handle: Any = None
        self._module: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The towers and their optimiser, so that a resumed training goes on as if it had not stopped."""
        if self.towers is None or self._optimizer is None:
            return {}
        return {"towers": self.towers.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the towers back from a checkpoint when fitting starts."""
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the towers."""
        if not hasattr(pl_module, "extras"):
            raise ValueError(f"{type(pl_module).__name__} has no 'extras' to add a loss to (cut.model.MultiTaskModel)")
        self._module = pl_module
        network = self._module.network
        channels = network.channels[-1]
        with torch.random.fork_rng(devices=[]):  # the training's own random numbers stay what they are
            torch.default_generator.manual_seed(0)
            towers: dict[str, nn.Module] = {
                t: nn.Linear(channels, network.outputs[t])
                if t in network.image_level
                else nn.Conv2d(channels, network.outputs[t], 1)
                for t in network.active
            }
        self.towers = nn.ModuleDict(towers).to(pl_module.device)
        self._optimizer = torch.optim.AdamW(self.towers.parameters(), lr=self.rate)
        if self._restored:
            self.towers.load_state_dict(self._restored["towers"])
            self._optimizer.load_state_dict(self._restored["optimizer"])
        self._handle = network.backbone.register_forward_hook(self._keeper())
        self._module.extras.append(self.loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Throw the towers away."""
        self._handle.remove()
        self._module.extras.remove(self.loss)
        self.towers, self._features = None, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step of the towers' own optimiser, with what the batch's backward left."""
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _keeper(self) -> Any:
        """A hook that remembers the deepest map; no method: a copy of the network would copy its owner too."""

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features = output[-1] if isinstance(output, (list, tuple)) else output

        return keep

    def loss(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The towers' weighted losses of one batch; the network's forward has just run."""
        assert self.towers is not None and self._features is not None
        network = self._module.network
        features = self._features.permute(0, 3, 1, 2) if network.nhwc else self._features
        total = torch.zeros((), device=features.device)
        for name in outputs:
            task, tower = self._module.tasks[name], self.towers[name]
            if name in network.image_level:
                out = tower(features.mean((2, 3)))
            else:
                out = F.interpolate(tower(features), batch["image"].shape[-2:], mode="bilinear", align_corners=False)
            total = total + self.weight * task.weight * task.loss(out, batch)
        return total
