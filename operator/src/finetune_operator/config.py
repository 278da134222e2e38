"""OperatorConfig: what the installation decides, read once at start from one YAML file. Frozen.

The file is the chart's ConfigMap (FINETUNE_CONFIG_FILE names it); the environment adds what only the pod knows, and can
override single values for an operator that is started by hand. Nothing else reads the environment. ConfigError says
everything that is wrong at once, each with its path, its value and what to set. The core gets its part as Settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune_operator.core.accelerators.instances import instance_types
from finetune_operator.core.model_shapes import model_shapes
from finetune_operator.core.settings import (
    BUILT_IN_DEFAULTS,
    FEATURES,
    NodeSettings,
    ProgressEndpoint,
    RetryTiming,
    Settings,
    StageDefaults,
)

LOG_LEVELS = ("debug", "info", "warning", "error")
PULL_POLICIES = ("IfNotPresent", "Always", "Never")
MAX_SECONDS = 86400 * 30
"""Longest time that any of the settings takes."""
MAX_LOG_LINES = 100
"""Most lines of a log that a stage's status takes; the status of a whole job has to stay a small object."""

OVERRIDES: Mapping[str, str] = {
    "FINETUNE_TRAINER_IMAGE": "trainer.image",
    "FINETUNE_NEURON_IMAGE": "trainer.neuronImage",
    "FINETUNE_WATCH_NAMESPACES": "watchNamespaces",
    "FINETUNE_LOG_LEVEL": "logLevel",
    "FINETUNE_HEALTH_PORT": "health.port",
    "FINETUNE_PROGRESS_URL": "progress.url",
    "FINETUNE_PROGRESS_PORT": "progress.port",
    "FINETUNE_TLS_SECRET": "progress.tlsSecret",
    "FINETUNE_LEASE_NAME": "leaderElection.leaseName",
    "FINETUNE_RETRY_FIRST_SECONDS": "retry.firstSeconds",
    "FINETUNE_FEATURE_GATES": "featureGates",
}
"""Variables that come before the file's value of this path, where they are set and not empty.

FINETUNE_WATCH_NAMESPACES is a list with commas, FINETUNE_FEATURE_GATES one of Name=true or Name=false.
"""

_Row = TypeVar("_Row")

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_CURRENCY = re.compile(r"[A-Z]{3}")


class ConfigError(Exception):
    """The installation is configured wrongly; the message has one line for each problem."""


@dataclass(frozen=True)
class LeaseSettings:
    """The Lease that the one active operator holds, in its own namespace, and its times in seconds.

    A holder that could not renew for `renew_seconds` stops being active; a standby takes over `lease_seconds` after the
    last renewal it saw. Both try every `retry_seconds`.
    """

    name: str
    lease_seconds: int = 10
    renew_seconds: float = 7
    retry_seconds: float = 2


@dataclass(frozen=True)
class OperatorConfig:
    """The process's own settings, and the core's; see the chart's values for the meaning of each."""

    core: Settings
    """The core's part, without the progress endpoint, whose certificate is known only once it runs."""
    namespace: str = ""
    pod_name: str = ""
    pod_ip: str = ""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces that are watched; empty for the whole cluster."""
    log_level: str = "info"
    health_port: int = 8080
    """Port of /healthz, /readyz and /metrics; 0 serves none of them."""
    metrics: bool = True
    progress_url: str = ""
    """Where stages post; empty for no endpoint."""
    progress_port: int = 8443
    tls_secret: str = ""
    lease: LeaseSettings | None = None
    """None: this process is the only one, and active from its start."""

    def settings(self, progress_ca: str | None = None) -> Settings:
        """The core's part. `progress_ca` is the endpoint's CA certificate; without it stages post no progress."""
        if not (self.progress_url and progress_ca):
            return self.core
        return replace(self.core, progress=ProgressEndpoint(url=self.progress_url, ca_certificate=progress_ca))


def read_config(environ: Mapping[str, str]) -> OperatorConfig:
    """OperatorConfig from the file that FINETUNE_CONFIG_FILE names and the environment; ConfigError with every problem.

    Without a file the defaults hold, and FINETUNE_TRAINER_IMAGE is all that has to be set.
    """
    read = _Reader(environ.get("FINETUNE_CONFIG_FILE", "").strip(), environ)
    root = read.root
    namespace, pod_name, pod_ip = (
        environ.get(name, "").strip() for name in ("FINETUNE_NAMESPACE", "FINETUNE_POD_NAME", "FINETUNE_POD_IP")
    )
    progress = root.section("progress")
    url, tls_secret = progress.text("url"), progress.name("tlsSecret")
    if url and not url.startswith("https://"):
        progress.wrong("url", url, "set an https:// URL, or nothing for no endpoint")
    if url and not (tls_secret and namespace):
        progress.wrong("url", url, "it needs progress.tlsSecret (FINETUNE_TLS_SECRET) and FINETUNE_NAMESPACE as well")
    config = OperatorConfig(
        core=_settings(root),
        namespace=namespace,
        pod_name=pod_name,
        pod_ip=pod_ip,
        watch_namespaces=root.names("watchNamespaces"),
        log_level=root.choice("logLevel", LOG_LEVELS, "info"),
        health_port=root.section("health").port("port", 8080),
        metrics=root.section("metrics").flag("enabled", True),
        progress_url=url,
        progress_port=progress.port("port", 8443),
        tls_secret=tls_secret,
        lease=_lease(root.section("leaderElection"), namespace, pod_name),
    )
    problems = read.finish()
    if problems:
        raise ConfigError("\n".join(problems))
    return config


class _Reader:
    """The file with the environment's values put over it, and what is wrong with it so far."""

    def __init__(self, path: str, environ: Mapping[str, str]) -> None:
        self.problems: list[str] = []
        self.file = path or "configuration"
        self._sources: dict[str, str] = {}
        self._sections: dict[str, _Section] = {}
        document = self._load(path) if path else {}
        for variable, dotted in OVERRIDES.items():
            value = environ.get(variable, "").strip()
            if value:
                self._sources[dotted] = variable
                _put(document, dotted, _from_text(dotted, value))
        self.root = self.section("", document)

    def _load(self, path: str) -> dict[str, Any]:
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.problems.append(f"FINETUNE_CONFIG_FILE {path} cannot be read: {error}: name a readable YAML file")
            return {}
        if document is None:
            return {}
        if not isinstance(document, dict):
            self.problems.append(f"FINETUNE_CONFIG_FILE {path} holds no object: set sections such as trainer and retry")
            return {}
        return document

    def section(self, path: str, values: Any) -> _Section:
        """The section of this path; the same one each time, so that it knows every key that was asked for."""
        if path not in self._sections:
            self._sections[path] = _Section(self, path, values)
        return self._sections[path]

    def place(self, path: str) -> str:
        """Where somebody finds the value of this path: the variable that set it, or the file."""
        source = self._sources.get(path)
        return f"{source} ({path})" if source else f"{self.file}: {path}"

    def wrong(self, path: str, value: Any, remedy: str) -> None:
        """Note a problem. `remedy` begins with a verb."""
        self.problems.append(f"{self.place(path)} is {'not set' if value is None else repr(value)}: {remedy}")

    def finish(self) -> list[str]:
        """Every problem, those of keys that nobody asked for included."""
        for section in self._sections.values():
            section.refuse_the_rest()
        return self.problems


class _Section:
    """One object of the file. Each getter gives the value or the default, and notes what is wrong with it."""

    def __init__(self, reader: _Reader, path: str, values: Any) -> None:
        self._reader = reader
        self._path = path
        self._asked: set[str] = set()
        self._values: Mapping[str, Any] = {}
        if isinstance(values, dict):
            self._values = values
        elif values is not None:
            reader.wrong(path, values, "set an object of keys and values")

    def __contains__(self, key: str) -> bool:
        """Whether the key is there and has a value."""
        return self._get(key) is not None

    def _where(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        return self._values.get(key)

    def wrong(self, key: str, value: Any, remedy: str) -> None:
        self._reader.wrong(self._where(key), value, remedy)

    def keys(self) -> list[str]:
        """The keys that are there, as text: for objects whose keys are names."""
        return [str(key) for key in self._values]

    def section(self, key: str) -> _Section:
        return self._reader.section(self._where(key), self._get(key))

    def text(self, key: str, default: str = "") -> str:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.wrong(key, value, "set a text, in quotes where YAML would read it as something else")
            return default
        return value.strip() or default

    def name(self, key: str, default: str = "") -> str:
        """The name of a Kubernetes object, or "" where none is set."""
        value = self.text(key, default)
        if value and not _NAME.fullmatch(value):
            self.wrong(key, value, "set the name of a Kubernetes object: a-z, 0-9, - and .")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names of Kubernetes objects."""
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in value):
            self.wrong(key, value, "set a list of names of Kubernetes objects: a-z, 0-9, - and .")
            return ()
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in allowed:
            self.wrong(key, value, f"set one of {', '.join(allowed)}")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.wrong(key, value, "set true or false")
            return default
        return value

    def seconds(self, key: str, default: float, *, or_zero: bool = False) -> float:
        """Seconds, more than 0 and at most MAX_SECONDS; 0 as well where that switches something off."""
        value = self._get(key)
        if value is None:
            return default
        good = _is_number(value) and (0 < value <= MAX_SECONDS or (or_zero and value == 0))
        if not good:
            off = ", or 0 for never" if or_zero else ""
            self.wrong(key, value, f"set seconds, more than 0 and at most {MAX_SECONDS}{off}")
            return default
        return float(value)

    def count(self, key: str, default: int, low: int, high: int, what: str = "a whole number") -> int:
        """A whole number from `low` to `high`."""
        value = self._get(key)
        if value is None:
            return default
        if not _is_number(value) or not low <= value <= high or value != int(value):
            self.wrong(key, value, f"set {what} from {low} to {high}")
            return default
        return int(value)

    def port(self, key: str, default: int) -> int:
        """A port, or 0 for none."""
        return self.count(key, default, 0, 65535, "a port")

    def texts(self, key: str, default: Mapping[str, str]) -> Mapping[str, str]:
        """An object of texts. YAML may have read a quantity or a label's value as a number or a boolean."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, dict) or not all(
            isinstance(text, str | bool | int | float) for text in value.values()
        ):
            self.wrong(key, value, "set an object of names and texts")
            return default
        return {str(name): str(text).lower() if isinstance(text, bool) else str(text) for name, text in value.items()}

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object with names of the installation's own as keys, as it is."""
        value = self._get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            self.wrong(key, value, "set an object by name")
            return {}
        return value

    def note(self, problem: str) -> None:
        """A problem in whole sentences, which say where it is."""
        self._reader.problems.append(f"{self._reader.file}: {problem}")

    def objects(self, key: str, default: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
        """A list of objects."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self.wrong(key, value, "set a list of objects")
            return default
        return tuple(value)

    def refuse_the_rest(self) -> None:
        """Note every key that no getter asked for."""
        for key in self._values:
            if key not in self._asked:
                known = ", ".join(sorted(self._asked)) or "nothing"
                self._reader.problems.append(
                    f"{self._reader.place(self._where(str(key)))} is not known: use {known}, or remove it"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _put(document: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value of a dotted path, over whatever is there."""
    *parents, last = dotted.split(".")
    for key in parents:
        inner = document.get(key)
        if not isinstance(inner, dict):
            inner = document[key] = {}
        document = inner
    document[last] = value


def _from_text(dotted: str, text: str) -> Any:
    """What a variable's text stands for at this path; the text itself where it stands for nothing, to be refused."""
    if dotted == "watchNamespaces":
        return [name.strip() for name in text.split(",") if name.strip()]
    if dotted == "featureGates":
        pairs = (part.partition("=") for part in text.split(",") if part.strip())
        return {name.strip(): {"true": True, "false": False}.get(value.strip(), value) for name, _, value in pairs}
    if dotted.endswith(("port", "Seconds")):
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _settings(root: _Section) -> Settings:
    """The core's part of the file."""
    trainer = root.section("trainer")
    image = trainer.text("image")
    if not image:
        trainer.wrong("image", None, "set the image that stages run (or FINETUNE_TRAINER_IMAGE)")
    logs = root.section("logs")
    lines = logs.count("tailLines", 20, 1, MAX_LOG_LINES)
    currency = root.text("currency", "USD")
    if not _CURRENCY.fullmatch(currency):
        root.wrong("currency", currency, "set the three letters of an ISO 4217 code, such as USD")
    return Settings(
        trainer_image=image,
        neuron_image=trainer.text("neuronImage") or None,
        image_pull_policy=trainer.choice("pullPolicy", PULL_POLICIES, "IfNotPresent"),
        image_pull_secrets=trainer.names("pullSecrets"),
        priority_class=root.name("stagePriorityClassName") or None,
        stages=_stages(root.section("stages")),
        retry=_retry(root.section("retry")),
        features=_features(root.section("featureGates")),
        nodes=_nodes(root.section("nodes")),
        hang_seconds=root.section("hang").seconds("seconds", 1800, or_zero=True),
        log_tail_lines=lines if logs.flag("enabled", True) else 0,
        queue_enabled=root.section("queue").flag("enabled", True),
        instance_types=_table(root, "instanceTypes", instance_types),
        model_shapes=_table(root, "models", model_shapes),
        currency=currency,
    )


def _table(root: _Section, key: str, read: Callable[[Mapping[str, Any]], Mapping[str, _Row]]) -> Mapping[str, _Row]:
    """A table of the core with the file's entries over it. `read` makes it; its ValueError says what is wrong."""
    try:
        return read(root.mapping(key))
    except ValueError as error:
        root.note(str(error))
        return read({})


def _features(section: _Section) -> Mapping[str, bool]:
    return {name: section.flag(name, default) for name, default in FEATURES.items()}


def _retry(section: _Section) -> RetryTiming:
    built_in = RetryTiming()
    timing = RetryTiming(
        counted_first=section.seconds("firstSeconds", built_in.counted_first),
        counted_longest=section.seconds("longestSeconds", built_in.counted_longest),
        uncounted_first=section.seconds("infrastructureFirstSeconds", built_in.uncounted_first),
        uncounted_longest=section.seconds("infrastructureLongestSeconds", built_in.uncounted_longest),
    )
    if timing.counted_longest < timing.counted_first:
        section.wrong("longestSeconds", timing.counted_longest, f"set firstSeconds ({timing.counted_first}) or more")
    if timing.uncounted_longest < timing.uncounted_first:
        least = f"set infrastructureFirstSeconds ({timing.uncounted_first}) or more"
        section.wrong("infrastructureLongestSeconds", timing.uncounted_longest, least)
    return timing


def _nodes(section: _Section) -> NodeSettings:
    built_in = NodeSettings()
    return NodeSettings(
        watch=section.flag("watch", built_in.watch),
        avoid_seconds=section.seconds("avoidSeconds", built_in.avoid_seconds),
        faults_to_avoid=section.count("faultsToAvoid", built_in.faults_to_avoid, 1, 100),
        drain_seconds=section.seconds("drainSeconds", built_in.drain_seconds),
    )


def _lease(section: _Section, namespace: str, pod_name: str) -> LeaseSettings | None:
    """None where leader election is off. The times must leave a holder room to give up before a standby takes over."""
    lease = LeaseSettings(
        name=section.name("leaseName", "finetune-operator"),
        lease_seconds=section.count("leaseSeconds", LeaseSettings.lease_seconds, 2, 3600, "whole seconds"),
        renew_seconds=section.seconds("renewSeconds", LeaseSettings.renew_seconds),
        retry_seconds=section.seconds("retrySeconds", LeaseSettings.retry_seconds),
    )
    if not section.flag("enabled", "leaseName" in section):
        return None
    if not (namespace and pod_name):
        section.wrong("enabled", True, "set FINETUNE_NAMESPACE and FINETUNE_POD_NAME as well, or false")
    if not lease.retry_seconds < lease.renew_seconds < lease.lease_seconds:
        remedy = (
            f"set more than retrySeconds ({lease.retry_seconds:g}) and less than leaseSeconds ({lease.lease_seconds:g})"
        )
        section.wrong("renewSeconds", lease.renew_seconds, remedy)
    return lease


def _stages(section: _Section) -> Mapping[str, StageDefaults]:
    """StageDefaults of each stage that the file names; the built-in ones fill what an entry leaves out."""
    return {
        stage: _stage(section.section(stage), built_in)
        for stage, built_in in BUILT_IN_DEFAULTS.items()
        if stage in section
    }


def _stage(section: _Section, built_in: StageDefaults) -> StageDefaults:
    requests, limits = built_in.requests, built_in.limits
    resources = section.section("resources")
    if "resources" in section:
        requests, limits = resources.texts("requests", {}), resources.texts("limits", {})
    return StageDefaults(
        requests=requests,
        limits=limits,
        node_selector=section.texts("nodeSelector", built_in.node_selector),
        tolerations=section.objects("tolerations", built_in.tolerations),
        env=_env(section),
        image=section.text("image") or None,
        termination_grace_seconds=section.count(
            "terminationGracePeriodSeconds", built_in.termination_grace_seconds, 0, MAX_SECONDS, "whole seconds"
        ),
    )


def _env(section: _Section) -> Mapping[str, str]:
    """Variables by name from the list that Kubernetes has."""
    env = {}
    for entry in section.objects("env", ()):
        if set(entry) != {"name", "value"} or not isinstance(entry["name"], str) or not entry["name"]:
            section.wrong("env", entry, "set a name and a value, and nothing else, for each")
        else:
            env[entry["name"]] = str(entry["value"])
    return env
