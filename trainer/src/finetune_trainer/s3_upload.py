"""Uploads a set of files below a prefix of S3 so that it is complete if and only if its manifest is there.

stages/publish.py calls upload(). Every file is hashed as a whole and in parts first; S3 gets the SHA-256 of each
request and refuses bytes that do not have it. Large files go up in parts, several at a time; an upload that was killed
goes on from the parts that S3 has with the right hash. At the end the prefix is listed and the checksum of every object
compared; manifest.json goes last, and only where none is there. No object of another name is deleted or written over;
parts that belong to nothing are given up.

Memory: UPLOADS parts at a time. What a checksum of several parts is: the SHA-256 of the parts' SHA-256 values, a hyphen
and their number (Amazon S3 User Guide, "Checking object integrity", composite checksums).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from finetune_trainer.contract import MANIFEST_NAME, canonical_json, digest_of
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.sources.s3_client import UPLOAD_ATTEMPTS, as_stage_error, error_code, open_client

PART_BYTES = 16 << 20
"""Of a part, where 10,000 of them are enough; a file that is not larger goes up in one request."""
MAX_PARTS = 10_000
UPLOADS = 4
"""Parts that are in memory and on their way at a time."""
CONTENT_DIGEST = "contentDigest"

_BUFFER = 1 << 20
_SENDS = 4
"""Tries of a part whose bytes arrived damaged; everything else is botocore's to try again."""
_DAMAGED = frozenset({"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LocalFile:
    """A file to upload: its name below the prefix, where it lies, its bytes, and the hash it must have (hex sha256)."""

    path: str
    source: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class HashedFile:
    """A file with the SHA-256 of each of its parts of `part_bytes`; one part for a file that goes up in one request."""

    file: LocalFile
    part_bytes: int
    parts: tuple[bytes, ...]

    @property
    def checksum(self) -> str:
        """What S3 calls the object's ChecksumSHA256."""
        if len(self.parts) == 1:
            return _encoded(self.parts[0])
        return f"{_encoded(hashlib.sha256(b''.join(self.parts)).digest())}-{len(self.parts)}"

    def read_part(self, number: int) -> bytes:
        """The bytes of part `number`, from 1."""
        with self.file.source.open("rb") as file:
            file.seek((number - 1) * self.part_bytes)
            return file.read(self.part_bytes)

    def has_part(self, part: Mapping[str, Any]) -> bool:
        """Whether a part that S3 lists is this file's: by size and SHA-256, or MD5 where a server lists no SHA-256."""
        number = part["PartNumber"]
        if not 1 <= number <= len(self.parts):
            return False
        if part.get("Size") != min(self.part_bytes, self.file.size - (number - 1) * self.part_bytes):
            return False
        if "ChecksumSHA256" in part:
            return bool(part["ChecksumSHA256"] == _encoded(self.parts[number - 1]))
        md5 = hashlib.md5(self.read_part(number), usedforsecurity=False).hexdigest()
        return str(part.get("ETag", "")).strip('"') == md5


@dataclass(frozen=True)
class Uploaded:
    """A complete prefix: its manifest, whether an earlier upload had made it, and what this one had to send."""

    manifest: Mapping[str, Any]
    reused: bool
    sent_files: int = 0
    sent_bytes: int = 0


def part_bytes_of(size: int) -> int:
    """Bytes of each part of a file of `size`: PART_BYTES, or as many whole MiB as make MAX_PARTS enough."""
    least = -(-size // MAX_PARTS)
    return PART_BYTES if least <= PART_BYTES else -(-least // _BUFFER) * _BUFFER


def hash_file(file: LocalFile) -> HashedFile:
    """Read the file once; CorruptArtifact when it is not what its manifest says."""
    part_bytes = part_bytes_of(file.size)
    whole, part, parts = hashlib.sha256(), hashlib.sha256(), []
    left, size = part_bytes, 0
    with file.source.open("rb") as source:
        while chunk := source.read(min(_BUFFER, left)):
            whole.update(chunk)
            part.update(chunk)
            size, left = size + len(chunk), left - len(chunk)
            if not left:
                parts.append(part.digest())
                part, left = hashlib.sha256(), part_bytes
    if left < part_bytes or not parts:
        parts.append(part.digest())
    if size != file.size or whole.hexdigest() != file.sha256:
        raise CorruptArtifact(
            f"{file.source} has {size} bytes and sha256 {whole.hexdigest()}, its manifest says {file.size} and "
            f"{file.sha256}: delete its artifact and run that stage again"
        )
    return HashedFile(file, part_bytes, tuple(parts))


def content_digest(files: Sequence[LocalFile]) -> str:
    """What tells two uploads apart: names and contents of the files, wherever they came from."""
    return digest_of(sorted([file.path, file.sha256] for file in files))


def upload(
    uri: str,
    content: Sequence[LocalFile],
    described_by: Sequence[LocalFile],
    facts: Mapping[str, Any],
    client: Any | None = None,
) -> Uploaded:
    """Upload `content` and the files that describe it (report and card) below `uri`, and `facts` in the manifest.

    A prefix that is complete with the same content is verified and left as it is. UserError where it holds another one,
    or objects that nobody of ours wrote; RetryableError where S3 is away or what arrived is not what was sent.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise UserError("InvalidDestination", f"{uri!r} is no place in S3: write s3://bucket/prefix")
    prefix = (match["prefix"] or "").strip("/")
    place = _Prefix(
        uri, match["bucket"], f"{prefix}/" if prefix else "", client or open_client(attempts=UPLOAD_ATTEMPTS)
    )
    digest = content_digest(content)
    there = place.read_manifest()
    if there is not None:
        return place.reuse(there, digest)
    hashed = []
    for file in (*content, *described_by):
        hashed.append(hash_file(file))
    listed = place.sizes()
    foreign = sorted(listed.keys() - {each.file.path for each in hashed})
    if foreign:
        raise UserError(
            "PrefixNotEmpty",
            f"{uri} has no {MANIFEST_NAME} and holds {len(foreign)} objects that are not of this model, such as "
            f"{foreign[0]}: remove them, or give publish.s3.uri a prefix of its own",
        )
    sent = [each for each in hashed if place.send(each, listed.get(each.file.path))]
    place.give_up_the_rest()
    place.verify({each.file.path: (each.file.size, each.checksum) for each in hashed})
    manifest = {
        **facts,
        CONTENT_DIGEST: digest,
        "files": [
            {"path": each.file.path, "size": each.file.size, "sha256": each.file.sha256, "checksum": each.checksum}
            for each in sorted(hashed, key=lambda each: each.file.path)
        ],
    }
    if not place.complete(manifest):
        winner = place.read_manifest()
        return place.reuse(winner or {}, digest)
    return Uploaded(manifest, False, len(sent), sum(each.file.size for each in sent))


@dataclass
class _Prefix:
    """The objects of one bucket whose keys begin with `start`, by the rest of their keys."""

    uri: str
    bucket: str
    start: str
    client: Any
    _unfinished: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _looked: bool = False

    def read_manifest(self) -> Mapping[str, Any] | None:
        """The manifest that is there, or None; UserError where something else has its name."""
        key = self.start + MANIFEST_NAME
        try:
            body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            if error_code(error) in ("NoSuchKey", "404"):
                return None
            self._fail(error)
        try:
            value = json.loads(body)
            files = [(entry["path"], entry["size"], entry["checksum"]) for entry in value["files"]]
            if not isinstance(value[CONTENT_DIGEST], str) or not all(isinstance(path, str) for path, _, _ in files):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                "PrefixTaken", f"{self.uri} holds a {MANIFEST_NAME} that this product did not write: use another prefix"
            ) from error
        manifest: Mapping[str, Any] = value
        return manifest

    def reuse(self, manifest: Mapping[str, Any], digest: str) -> Uploaded:
        """The complete upload that is there, verified; UserError with both digests where it is another one."""
        found = manifest.get(CONTENT_DIGEST)
        if found != digest:
            raise UserError(
                "PrefixTaken",
                f"{self.uri} is complete with content {found}, this job's is {digest}: a published model is never "
                "replaced, use another prefix or remove that one",
            )
        self.verify({entry["path"]: (entry["size"], entry["checksum"]) for entry in manifest["files"]}, alone=False)
        return Uploaded(manifest, True)

    def sizes(self) -> dict[str, int]:
        """Size by name of every object, the manifest left out."""
        found = {}
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.start)
            for page in pages:
                for item in page.get("Contents", []):
                    found[item["Key"][len(self.start) :]] = int(item["Size"])
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)
        found.pop("", None)  # the marker by which a console shows an empty folder
        found.pop(MANIFEST_NAME, None)
        return found

    def checksum(self, path: str) -> tuple[int, str | None]:
        """(size, ChecksumSHA256) of an object as S3 keeps it."""
        answer = self._call(
            lambda: self.client.head_object(Bucket=self.bucket, Key=self.start + path, ChecksumMode="ENABLED")
        )
        return int(answer["ContentLength"]), answer.get("ChecksumSHA256")

    def send(self, hashed: HashedFile, listed_size: int | None) -> bool:
        """Bring one file there; False when it was there already, to the byte."""
        file = hashed.file
        if listed_size == file.size and _is_same(self.checksum(file.path)[1], hashed.checksum):
            print(f"{file.path} is there from an earlier attempt, with the hash it should have", flush=True)
            return False
        if len(hashed.parts) == 1:
            self._send_whole(hashed)
        else:
            self._send_parts(hashed)
        print(f"{file.path}: {file.size} bytes in {len(hashed.parts)} parts", flush=True)
        return True

    def verify(self, expected: Mapping[str, tuple[int, str]], *, alone: bool = True) -> None:
        """RetryableError unless these objects are there by listing and checksum, and with `alone` nothing else is."""
        listed = {path: size for path, size in self.sizes().items() if alone or path in expected}
        sizes = {path: size for path, (size, _) in expected.items()}
        if listed != sizes:
            wrong = sorted(path for path in listed.keys() | sizes.keys() if listed.get(path) != sizes.get(path))
            raise RetryableError(
                "UploadDamaged",
                f"{self.uri}: {wrong[0]} is listed with {listed.get(wrong[0], 'no')} bytes, expected "
                f"{sizes.get(wrong[0], 'no such object')}; {len(wrong)} objects differ",
            )
        for path, (size, checksum) in expected.items():
            found = self.checksum(path)
            if found[0] != size or not _is_same(found[1], checksum):
                raise RetryableError(
                    "UploadDamaged",
                    f"{self.uri}: {path} has {found[0]} bytes and SHA-256 checksum {found[1]}, expected {size} and "
                    f"{checksum}",
                )

    def complete(self, manifest: Mapping[str, Any]) -> bool:
        """Write the manifest where none is; False when another writer was first."""
        data = canonical_json(manifest)
        try:
            self.client.put_object(
                Bucket=self.bucket,
                Key=self.start + MANIFEST_NAME,
                Body=data,
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=_encoded(hashlib.sha256(data).digest()),
                ContentType="application/json",
                IfNoneMatch="*",
            )
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            if error_code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                return False  # or our own request whose answer was lost
            self._fail(error)
        return True

    def give_up_the_rest(self) -> None:
        """Abort uploads of our names that are not gone on with: their parts would be paid for for ever."""
        for uploads in self._find_unfinished().values():
            for each in uploads:
                self._abort(each)
        self._unfinished = {}

    def _send_whole(self, hashed: HashedFile) -> None:
        self._sent(
            lambda: self.client.put_object(
                Bucket=self.bucket,
                Key=self.start + hashed.file.path,
                Body=hashed.read_part(1),
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=_encoded(hashed.parts[0]),
            )
        )

    def _send_parts(self, hashed: HashedFile) -> None:
        key = self.start + hashed.file.path
        upload_id, there = self._resumable(hashed)
        if upload_id is None:
            upload_id = self._call(
                lambda: self.client.create_multipart_upload(Bucket=self.bucket, Key=key, ChecksumAlgorithm="SHA256")
            )["UploadId"]
        else:
            print(f"{hashed.file.path}: {len(there)} of {len(hashed.parts)} parts are there already", flush=True)

        def send(number: int) -> tuple[int, str]:
            answer = self._sent(
                lambda: self.client.upload_part(
                    Bucket=self.bucket,
                    Key=key,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=hashed.read_part(number),
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=_encoded(hashed.parts[number - 1]),
                )
            )
            return number, str(answer["ETag"])

        missing = [number for number in range(1, len(hashed.parts) + 1) if number not in there]
        pool = ThreadPoolExecutor(max_workers=UPLOADS)
        try:
            there.update(pool.map(send, missing))
        finally:
            pool.shutdown(cancel_futures=True)
        parts = [
            {"PartNumber": number, "ETag": there[number], "ChecksumSHA256": _encoded(hashed.parts[number - 1])}
            for number in sorted(there)
        ]
        try:
            self.client.complete_multipart_upload(
                Bucket=self.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            # The answer to an earlier try was lost: verify() tells whether the object is what it should be.
            if error_code(error) != "NoSuchUpload" or hashed.file.path not in self.sizes():
                self._fail(error)

    def _resumable(self, hashed: HashedFile) -> tuple[str | None, dict[int, str]]:
        """(upload, ETag by part number) of the upload of this file that has most of its parts; (None, {}) for none.

        One that has a part which is not this file's was another file's, and is not gone on with.
        """
        best: tuple[dict[str, Any], dict[int, str]] | None = None
        uploads = self._find_unfinished().get(self.start + hashed.file.path, [])
        for each in uploads:
            parts = self._list_parts(each)
            good = {part["PartNumber"]: str(part["ETag"]) for part in parts if hashed.has_part(part)}
            if good and len(good) == len(parts) and (best is None or len(good) > len(best[1])):
                best = each, good
        if best is None:
            return None, {}
        uploads.remove(best[0])  # gone on with, so not given up
        return str(best[0]["UploadId"]), best[1]

    def _find_unfinished(self) -> dict[str, list[dict[str, Any]]]:
        """Uploads below the prefix that nobody completed, by key; looked for once."""
        if not self._looked:
            self._looked = True
            try:
                pages = self.client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self.bucket, Prefix=self.start
                )
                for page in pages:
                    for each in page.get("Uploads", []):
                        self._unfinished.setdefault(each["Key"], []).append(each)
            except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
                self._fail(error)
        return self._unfinished

    def _list_parts(self, each: Mapping[str, Any]) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            pages = self.client.get_paginator("list_parts").paginate(
                Bucket=self.bucket, Key=each["Key"], UploadId=each["UploadId"]
            )
            return [part for page in pages for part in page.get("Parts", [])]

        return self._call(read)

    def _abort(self, each: Mapping[str, Any]) -> None:
        try:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=each["Key"], UploadId=each["UploadId"])
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            if error_code(error) != "NoSuchUpload":
                self._fail(error)

    def _sent(self, request: Callable[[], _Result]) -> _Result:
        """The request's answer; sent again where S3 says that what arrived is not what its checksum says."""
        for _ in range(_SENDS - 1):
            try:
                return request()
            except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
                if error_code(error) not in _DAMAGED:
                    self._fail(error)
                print(f"{self.uri}: {error}: sending it again", flush=True)
        return self._call(request)

    def _call(self, request: Callable[[], _Result]) -> _Result:
        try:
            return request()
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        code = error_code(error)
        if code == "NoSuchBucket":
            raise UserError(
                "DestinationNotFound",
                f"{self.uri}: there is no bucket {self.bucket}: create it, or mend publish.s3.uri",
            ) from error
        if code in _DAMAGED:
            raise RetryableError(
                "UploadDamaged", f"{self.uri}: what arrived is not what was sent, {_SENDS} times: {error}"
            ) from error
        if code == "NoSuchUpload":
            raise RetryableError(
                "UploadDamaged", f"{self.uri}: an upload was given up by somebody else meanwhile: {error}"
            ) from error
        known = as_stage_error(
            error,
            self.uri,
            f"s3:ListBucket and s3:ListBucketMultipartUploads on {self.bucket}, and s3:GetObject, s3:PutObject, "
            f"s3:ListMultipartUploadParts and s3:AbortMultipartUpload on {self.bucket}/{self.start}*",
        )
        if known is not None:
            raise known from error
        raise error


def _is_same(found: str | None, checksum: str) -> bool:
    """Equal SHA-256 checksums; some servers leave the number of parts off."""
    return found is not None and found.split("-")[0] == checksum.split("-")[0]


def _encoded(digest: bytes) -> str:
    return base64.b64encode(digest).decode("ascii")


def files_of(folder: Path, entries: Sequence[Any], below: str = "") -> Iterator[LocalFile]:
    """The files of an artifact as its manifest has them, named `below` + their path."""
    for entry in entries:
        yield LocalFile(below + entry.path, folder / entry.path, entry.size, entry.sha256)
