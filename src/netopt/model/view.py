"""What a model holds: its modules, parameters and buffers, each under every name it has, listed in one walk."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ModelView"]


class ModelView:
    """The modules, parameters and buffers of a model at one moment; of what is tied, every name is there.

    A list, not a live view: it is valid as long as nothing is added to the model or removed from it.

    Attributes:
        model: The model.
        modules: By dotted name, the model itself under ``""``, parents before their children.
        parameters: By dotted name.
        buffers: By dotted name.
        written: By identity, parameters that a forward was seen to write into; ``None`` before one was watched.

    Example:
        >>> view = ModelView(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)))
        >>> list(view.modules), list(view.parameters)
        (['', '0', '1'], ['0.weight', '0.bias'])
        >>> list(view.buffers)
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """

    __slots__ = ("_parts", "buffers", "model", "modules", "parameters", "written")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.written: dict[int, Tensor] | None = None
        self._visit("", model)
        self._parts: list[tuple[str, nn.Module]] | None = None

    @classmethod
    def of(cls, model: nn.Module | ModelView) -> ModelView:
        """What a model holds now; a list of that is handed on."""
        return model if isinstance(model, ModelView) else cls(model)

    def _visit(self, name: str, module: nn.Module) -> None:
        self.modules[name] = module
        start = f"{name}." if name else ""
        if module._parameters:
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    self.parameters[start + key] = tensor
        if module._buffers:
            for key, tensor in module._buffers.items():
                if tensor is not None:
                    self.buffers[start + key] = tensor
        if module._modules:
            for key, child in module._modules.items():
                if child is not None:
                    self._visit(start + key, child)

    @property
    def parts(self) -> list[tuple[str, nn.Module]]:
        """The modules, each once, under its first name."""
        if self._parts is None:
            first = {id(module): name for name, module in reversed(self.modules.items())}
            self._parts = [(name, module) for name, module in self.modules.items() if first[id(module)] == name]
        return self._parts

    @property
    def own_parameters(self) -> dict[str, Tensor]:
        """The parameters, each once, under its first name."""
        first = {id(parameter): name for name, parameter in reversed(self.parameters.items())}
        return {name: self.parameters[name] for name in reversed(first.values())}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and the buffers."""
        return self.parameters | self.buffers

    def mask_of(self, name: str) -> Tensor | None:
        """The mask that ``torch.nn.utils.prune`` put on the parameter of this name, if there is one."""
        return self.buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
