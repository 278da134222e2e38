"""OperatorConfig: what the environment and the chart's files decide, read once at start. Frozen.

Nothing else reads the environment. ConfigError says everything that is wrong at once. The core gets its part as
Settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.core.settings import (
    BUILT_IN_DEFAULTS,
    ProgressEndpoint,
    RetryTiming,
    Settings,
    StageDefaults,
)

LOG_LEVELS = ("debug", "info", "warning", "error")
PULL_POLICIES = ("IfNotPresent", "Always", "Never")
_STAGE_KEYS = frozenset({"resources", "nodeSelector", "tolerations", "env", "image", "terminationGracePeriodSeconds"})


class ConfigError(Exception):
    """The installation is configured wrongly; the message has one line for each problem."""


@dataclass(frozen=True)
class OperatorConfig:
    """The operator's own settings; see the chart's values for the meaning of each."""

    trainer_image: str
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    priority_class: str | None = None
    namespace: str = ""
    pod_name: str = ""
    watch_namespaces: tuple[str, ...] = ()
    log_level: str = "info"
    progress_url: str = ""
    progress_port: int = 8443
    tls_secret: str = ""
    health_port: int = 8080
    retry: RetryTiming = field(default_factory=RetryTiming)
    stages: Mapping[str, StageDefaults] = field(default_factory=dict)

    def settings(self, progress_ca: str | None = None) -> Settings:
        """The core's part. `progress_ca` is the endpoint's CA certificate; without it stages post no progress."""
        endpoint = None
        if self.progress_url and progress_ca:
            endpoint = ProgressEndpoint(url=self.progress_url, ca_certificate=progress_ca)
        return Settings(
            trainer_image=self.trainer_image,
            image_pull_policy=self.image_pull_policy,
            image_pull_secrets=self.image_pull_secrets,
            priority_class=self.priority_class,
            stages=self.stages,
            retry=self.retry,
            progress=endpoint,
        )


def read_config(environ: Mapping[str, str]) -> OperatorConfig:
    """OperatorConfig from environment variables and the stages file they name; ConfigError with every problem."""
    problems: list[str] = []

    def text(name: str, default: str = "") -> str:
        return environ.get(name, default).strip()

    def choice(name: str, allowed: tuple[str, ...]) -> str:
        value = text(name) or allowed[1 if name == "FINETUNE_LOG_LEVEL" else 0]
        if value not in allowed:
            problems.append(f"{name} is {value!r}: set one of {', '.join(allowed)}")
        return value

    def port(name: str, default: int) -> int:
        value = text(name) or str(default)
        if not value.isdigit() or int(value) > 65535:
            problems.append(f"{name} is {value!r}: set a port number, or 0 for none")
            return default
        return int(value)

    image = text("FINETUNE_TRAINER_IMAGE")
    if not image:
        problems.append("FINETUNE_TRAINER_IMAGE is not set: it is the image that stages run")
    progress_url, tls_secret, namespace = (
        text("FINETUNE_PROGRESS_URL"),
        text("FINETUNE_TLS_SECRET"),
        text("FINETUNE_NAMESPACE"),
    )
    if progress_url and not progress_url.startswith("https://"):
        problems.append(f"FINETUNE_PROGRESS_URL is {progress_url!r}: set an https:// URL, or nothing for no endpoint")
    if progress_url and not (tls_secret and namespace):
        problems.append("FINETUNE_PROGRESS_URL is set: it needs FINETUNE_TLS_SECRET and FINETUNE_NAMESPACE")
    config = OperatorConfig(
        trainer_image=image,
        image_pull_policy=choice("FINETUNE_TRAINER_IMAGE_PULL_POLICY", PULL_POLICIES),
        image_pull_secrets=_names(text("FINETUNE_IMAGE_PULL_SECRETS")),
        priority_class=text("FINETUNE_PRIORITY_CLASS") or None,
        namespace=namespace,
        pod_name=text("FINETUNE_POD_NAME"),
        watch_namespaces=_names(text("FINETUNE_WATCH_NAMESPACES")),
        log_level=choice("FINETUNE_LOG_LEVEL", LOG_LEVELS),
        progress_url=progress_url,
        progress_port=port("FINETUNE_PROGRESS_PORT", 8443),
        tls_secret=tls_secret,
        health_port=port("FINETUNE_HEALTH_PORT", 8080),
        retry=_retry(text("FINETUNE_RETRY_FIRST_SECONDS"), problems),
        stages=_stages(text("FINETUNE_STAGES_FILE"), problems),
    )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _retry(value: str, problems: list[str]) -> RetryTiming:
    if not value:
        return RetryTiming()
    try:
        first = float(value)
    except ValueError:
        first = -1
    if not 0 < first <= 3600:
        problems.append(f"FINETUNE_RETRY_FIRST_SECONDS is {value!r}: set seconds, more than 0 and at most 3600")
        return RetryTiming()
    return RetryTiming(counted_first=first)


def _stages(path: str, problems: list[str]) -> Mapping[str, StageDefaults]:
    """StageDefaults by stage from the chart's file (YAML, so JSON too)."""
    if not path:
        return {}
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        problems.append(f"FINETUNE_STAGES_FILE {path} cannot be read: {error}")
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"FINETUNE_STAGES_FILE {path} must hold an object by stage")
        return {}
    stages = {}
    for stage, entry in value.items():
        where = f"{path}: {stage}"
        if stage not in BUILT_IN_DEFAULTS:
            problems.append(f"{where}: no such stage; there are {', '.join(BUILT_IN_DEFAULTS)}")
        elif not isinstance(entry, Mapping) or set(entry) - _STAGE_KEYS:
            problems.append(f"{where}: must be an object of {', '.join(sorted(_STAGE_KEYS))}, is {entry!r}")
        else:
            stages[stage] = _defaults(stage, entry, where, problems)
    return stages


def _defaults(stage: str, entry: Mapping[str, Any], where: str, problems: list[str]) -> StageDefaults:
    built_in = BUILT_IN_DEFAULTS[stage]

    def get(key: str, kind: type, default: Any) -> Any:
        value = entry.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            problems.append(f"{where}.{key}: must be a {kind.__name__}, is {value!r}")
            return default
        return value

    resources = get("resources", dict, None)
    requests, limits = built_in.requests, built_in.limits
    if resources is not None:
        requests, limits = (_texts(resources.get(key) or {}) for key in ("requests", "limits"))
    return StageDefaults(
        requests=requests,
        limits=limits,
        node_selector=_texts(get("nodeSelector", dict, built_in.node_selector)),
        tolerations=tuple(get("tolerations", list, built_in.tolerations)),
        env={str(each["name"]): str(each.get("value", "")) for each in get("env", list, [])},
        image=str(get("image", str, "")) or None,
        termination_grace_seconds=get("terminationGracePeriodSeconds", int, built_in.termination_grace_seconds),
    )


def _texts(pairs: Mapping[Any, Any]) -> dict[str, str]:
    """YAML may have read a quantity or a label's value as a number."""
    return {str(name): str(value).lower() if isinstance(value, bool) else str(value) for name, value in pairs.items()}
