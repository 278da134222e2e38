"""Kubernetes timestamps (RFC 3339, whole seconds, UTC) to aware datetimes and back. Reads no clock."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

UTC = timezone.utc


def parse_time(text: str | None) -> datetime | None:
    """The datetime of a timestamp, with or without fractions of a second; None for None or an empty string."""
    if not text:
        return None
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def format_time(moment: datetime | None) -> str | None:
    """The timestamp that Kubernetes writes for that moment; None for None."""
    return None if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_until(moment: datetime, now: datetime) -> float:
    """Seconds from now to moment, never negative."""
    return max(0.0, (moment - now) / timedelta(seconds=1))
