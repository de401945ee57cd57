"""torch-fidelity for the tests, if it is installed; its own import of torchvision is met by empty modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

_PARTS = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


def torch_fidelity() -> Any:
    """The package, or the test is skipped.

    Only its data sets and its other networks use torchvision. The empty modules leave again, lest others ask them.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    missing = importlib.util.find_spec("torchvision") is None
    if missing and "torch_fidelity" not in sys.modules:
        modules = {name: ModuleType(name) for name in _PARTS}
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
            sys.modules[name] = module
        for data_set in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(modules["torchvision.datasets"], data_set, object)
        try:
            import torch_fidelity
        finally:
            for name in _PARTS:
                del sys.modules[name]
    import torch_fidelity

    return torch_fidelity
