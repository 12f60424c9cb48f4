"""License and base model of a published model, as the Hub names them."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from timm.models import get_pretrained_cfg

from ...convert.checkpoint.report import Report
from ...convert.errors import PublishError
from ...convert.hub import PREFIX, check_repository
from ..runs.provenance import part_of

# Identifiers in huggingface.co/docs/hub/repositories-licenses when this was written; the Hub may know more by now.
_KNOWN = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0
ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_KNOWN.split())


class License(NamedTuple):
    """License in the terms of a model card's front matter; ``name`` is set for a license that the Hub does not know."""

    identifier: str
    name: str | None = None

    def __str__(self) -> str:
        return self.name or self.identifier


def license_of(
    given: str | None, report: Report, config: Mapping[str, Any], announce: Callable[[str], None] = print
) -> License:
    """Return the license that was given, or else that of the pretrained weights which the model was made from.

    Args:
        given: Value of ``--license``.
        report: Report of the model.
        config: ``config.json`` of the model; its ``pretrained_cfg`` has the license of timm's weights.
        announce: Called with a warning about an identifier that is not in the built-in list.

    Raises:
        PublishError: No license was given and none is inherited, or the given one is empty.
    """
    if given is not None:
        return _given(given.strip().lower(), announce)
    inherited = part_of(config, "pretrained_cfg").get("license")
    own_weights = bool(report.imported) or report.source is None  # not the ones that timm offers
    if own_weights or not isinstance(inherited, str) or inherited.lower() in ("", "unknown", "other"):
        raise PublishError(
            "the license is unknown: the model was not made from pretrained weights that state one; "
            "give it with --license, such as --license apache-2.0"
        )
    inherited = inherited.lower()
    return License(inherited) if inherited in HUB_LICENSES else License("other", inherited)


def _given(name: str, announce: Callable[[str], None]) -> License:
    if not name:
        raise PublishError("--license is empty, expected an identifier such as apache-2.0")
    if name not in HUB_LICENSES:
        near = difflib.get_close_matches(name, sorted(HUB_LICENSES), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "see huggingface.co/docs/hub/repositories-licenses"
        announce(f"warning: --license {name!r} is not a license identifier that adderkit knows; used as given; {hint}")
    return License(name)


def base_model_of(given: str | None, report: Report) -> str | None:
    """Return the Hub repository of the model that this one was made from; ``None`` for one that is not on the Hub.

    Args:
        given: Value of ``--base-model``, ``user/name``.
        report: Report of the model; its ``source`` is the origin of the weights.

    Raises:
        PublishError: The given name is not a valid repository name.
    """
    if given is not None:
        check_repository(given, "--base-model")
        return given
    source = report.source
    if not source:
        return None
    if source.startswith(PREFIX):
        name = source.removeprefix(PREFIX).partition("@")[0]
        try:
            check_repository(name, "source")
        except PublishError:
            return None
        return name
    known = get_pretrained_cfg(source, allow_unregistered=True) if "/" not in source else None
    identifier = known.hf_hub_id if known is not None else None
    return identifier if isinstance(identifier, str) and identifier else None
