"""Forward hooks that are removed again, also after an error; and those that belong to the model itself."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from timm.models import FeatureHooks
from torch import nn

PreHook = Callable[[str, tuple[Any, ...]], None]
PostHook = Callable[[str, tuple[Any, ...], Any], None]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], *, pre: PreHook | None = None, post: PostHook | None = None
) -> Iterator[None]:
    """Call functions before and after each forward pass of some modules, inside the context.

    Args:
        modules: The modules, each under the name that the functions are called with.
        pre: Called as ``pre(name, inputs)`` before the forward pass; ``inputs`` holds positional, then keyword
            arguments.
        post: Called as ``post(name, inputs, output)`` after the forward pass.
    """
    with ExitStack() as handles:
        for name, module in modules.items():
            if pre is not None:
                handles.enter_context(module.register_forward_pre_hook(_pre_hook(name, pre), with_kwargs=True))
            if post is not None:
                handles.enter_context(module.register_forward_hook(_post_hook(name, post), with_kwargs=True))
        yield


def copy_feature_hooks(model: nn.Module, twin: nn.Module) -> None:
    """Give a copy the hooks with which timm's ``FeatureHookNet`` collects what it returns.

    Args:
        model: Any model.
        twin: A copy of it without hooks, in place.
    """
    pairs = list(zip(model.modules(), twin.modules(), strict=True))
    collectors = {
        value: vars(copied)[name]
        for module, copied in pairs
        for name, value in vars(module).items()
        if isinstance(value, FeatureHooks)
    }
    for module, copied in pairs if collectors else ():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for key, hook in getattr(module, kind).items():
                owner = getattr(hook.func, "__self__", None) if isinstance(hook, partial) else None
                if owner in collectors:
                    getattr(copied, kind)[key] = partial(collectors[owner]._collect_output_hook, *hook.args)


def _pre_hook(name: str, pre: PreHook) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        pre(name, (*arguments, *keywords.values()))

    return hook


def _post_hook(name: str, post: PostHook) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        post(name, (*arguments, *keywords.values()), output)

    return hook
