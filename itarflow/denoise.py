"""Where `DenoiseScheduler` was before 0.2: repositories of that time hold a module that imports it from here.

diffusers' generic loader runs those. As importing a module puts it in the place of the function `itarflow.denoise`,
it can be called like that.
"""

import sys
from types import ModuleType

from itarflow.denoisers.ode import DenoiseScheduler, denoise

__all__ = ["DenoiseScheduler"]


class _Callable(ModuleType):
    __call__ = staticmethod(denoise)


sys.modules[__name__].__class__ = _Callable
