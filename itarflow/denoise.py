"""Where `DenoiseScheduler` was before 0.2: repositories of that time hold a module that imports it from here.

diffusers' generic loader runs those. As importing a module puts it in the place of the function `itarflow.denoise`,
it can be called like that.
"""

import sys
from types import ModuleType
from typing import Any

from itarflow.denoisers.ode import DenoiseScheduler, denoise

__all__ = ["DenoiseScheduler"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return denoise(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
