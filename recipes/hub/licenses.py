"""Under which license a model may be published, and what it was made from: both as the Hub names them."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from timm.models import get_pretrained_cfg

from ...convert.errors import PublishError
from ...convert.hub import PREFIX, check_repository
from ..runs.provenance import part_of

# Identifiers that the Hub knows (huggingface.co/docs/hub/repositories-licenses); others are "other" with a name.
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
    """A license in the terms of a model card's front matter; ``name`` only where the Hub does not know it."""

    identifier: str
    name: str | None = None

    def __str__(self) -> str:
        return self.name or self.identifier


def license_of(given: str | None, report: Mapping[str, Any], config: Mapping[str, Any]) -> License:
    """The license that was given, else that of the pretrained weights which the model was made from.

    Args:
        given: What ``--license`` says.
        report: ``adder_report.json`` of the model.
        config: ``config.json`` of the model; ``pretrained_cfg`` has the license of timm's weights.

    Raises:
        PublishError: The license is unknown, or none was given and none is inherited.
    """
    if given is not None:
        return _given(given)
    inherited = part_of(config, "pretrained_cfg").get("license")
    own_weights = "imported" in report or report.get("source", "") is None  # not those that timm offers
    if own_weights or not isinstance(inherited, str) or inherited.lower() in ("", "unknown", "other"):
        raise PublishError(
            "the license is not known: the model was not made from pretrained weights that state one; "
            "give it with --license, such as --license apache-2.0"
        )
    inherited = inherited.lower()
    return License(inherited) if inherited in HUB_LICENSES else License("other", inherited)


def _given(text: str) -> License:
    name = text.strip().lower()
    if name not in HUB_LICENSES:
        near = difflib.get_close_matches(name, sorted(HUB_LICENSES), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "see huggingface.co/docs/hub/repositories-licenses"
        raise PublishError(f"--license is {text!r}, expected an identifier that the Hub knows; {hint}")
    return License(name)


def base_model_of(given: str | None, report: Mapping[str, Any]) -> str | None:
    """The Hub's name of the model that this one was made from; ``None`` where it is not on the Hub.

    Args:
        given: What ``--base-model`` says, ``user/name``.
        report: ``adder_report.json`` of the model; ``source`` says what its weights came from.

    Raises:
        PublishError: The name given is none of a repository.
    """
    if given is not None:
        check_repository(given, "--base-model")
        return given
    source = report.get("source")
    if not isinstance(source, str):
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
