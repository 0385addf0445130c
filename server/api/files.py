"""/v1/files: uploads for batches, and the files of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import BinaryIO

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from server.errors import ApiError, bad_request
from server.offline.answer_file import is_full
from server.offline.batch_service import BatchService
from server.offline.records import BatchObject, FileDeletion, FileList, FileObject, file_object
from server.offline.upload import Upload
from server.protocol.openapi import JsonObject, content, one_of, query, replies, text, whole
from server.state import ServerState

router = APIRouter()

MAX_FILES_PAGE = 10000
PIECE = 1 << 18  # bytes of a file that are sent at once
FORM: JsonObject = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "a request in each line"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


def batch_service(request: Request) -> BatchService:
    """Raises ApiError 404 where there is none."""
    state: ServerState = request.app.state.server
    if state.batches is None:
        raise ApiError(
            404,
            "this server keeps no files and runs no batches; to switch them on, its operator gives it a folder: "
            "peregrine serve --batch-folder FOLDER (batches.folder). Without: peregrine run-batch",
            code="batches_off",
        )
    return state.batches


def owner_of(request: Request, service: BatchService) -> str:
    return service.owner_of(str(request.state.tenant))


@router.post("/v1/files", response_model=None, responses=replies(FileObject), openapi_extra=FORM)
async def create_file(request: Request) -> Response:
    """Takes a file of requests, for a batch."""
    service = batch_service(request)
    owner = owner_of(request, service)
    with service.incoming(owner) as incoming:

        def check(num_bytes: int) -> None:
            incoming.num_bytes = num_bytes
            service.check_room(incoming)

        content_type, most = request.headers.get("content-type", ""), service.config.max_file_bytes
        upload = Upload(service.folder.new_incoming(), content_type, max_file_bytes=most, check=check)
        try:
            await upload.read(request.stream())
            seconds = upload.seconds_kept
            record = await service.add_file(
                owner, upload.path, num_bytes=upload.num_bytes, filename=upload.filename, seconds=seconds
            )
        except OSError as error:
            raise without_room(error) from error
        finally:
            await asyncio.to_thread(upload.remove)
    return json_response(file_object(record))


@router.get(
    "/v1/files",
    response_model=None,
    responses=replies(FileList),
    openapi_extra=query(after=text(), limit=whole(1, MAX_FILES_PAGE), order=one_of("asc", "desc"), purpose=text()),
)
async def list_files(request: Request) -> Response:
    """The files of the API key, the newest first."""
    service = batch_service(request)
    page = service.list_files(
        owner_of(request, service),
        purpose=request.query_params.get("purpose"),
        after=request.query_params.get("after"),
        limit=read_limit(request, default=MAX_FILES_PAGE, most=MAX_FILES_PAGE),
        newest_first=_read_order(request) == "desc",
    )
    data = [file_object(record) for record in page.records]
    return json_response(FileList(data=data, first_id=first(data), last_id=last(data), has_more=page.has_more))


@router.get("/v1/files/{file_id}", response_model=None, responses=replies(FileObject))
async def get_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    service = batch_service(request)
    return json_response(file_object(service.file(owner_of(request, service), file_id)))


@router.get("/v1/files/{file_id}/content", response_model=None, responses=content("application/jsonl"))
async def get_file_content(request: Request, file_id: str) -> Response:
    """The file itself."""
    service = batch_service(request)
    record = service.file(owner_of(request, service), file_id)
    try:
        file = await asyncio.to_thread(service.folder.data_path(record.id).open, "rb")
    except FileNotFoundError:
        raise ApiError(404, f"the content of file {record.id} is gone", code="file_not_found") from None
    headers = {
        "Content-Length": str(record.bytes),
        "Content-Disposition": f'attachment; filename="{record.id}.jsonl"',
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_pieces(file, record.bytes), media_type="application/jsonl", headers=headers)


@router.delete("/v1/files/{file_id}", response_model=None, responses=replies(FileDeletion))
async def delete_file(request: Request, file_id: str) -> Response:
    """Removes a file. One that a batch uses is refused: 409."""
    service = batch_service(request)
    await service.delete_file(owner_of(request, service), file_id)
    return json_response(FileDeletion(id=file_id))


async def _pieces(file: BinaryIO, num_bytes: int) -> AsyncIterator[bytes]:
    """Reads in threads, and closes the file, which may have been removed meanwhile."""
    with file:
        while num_bytes and (piece := await asyncio.to_thread(file.read, min(PIECE, num_bytes))):
            num_bytes -= len(piece)
            yield piece


def read_limit(request: Request, *, default: int, most: int) -> int:
    """How many items a list may have, of the query. Raises ApiError 400."""
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise bad_request(f"limit must be a whole number from 1 to {most}, not {text[:50]!r}", param="limit")
    return int(text)


def _read_order(request: Request) -> str:
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request(f"order must be asc or desc, not {order[:50]!r}", param="order")
    return order


def without_room(error: OSError) -> ApiError:
    """What a client hears of a disk that fails."""
    if is_full(error):
        return ApiError(507, "the server's disk is full; delete files, or try again later")
    return ApiError(500, "the server cannot write to its folder of batches; its log says more")


def first(data: Sequence[FileObject | BatchObject]) -> str | None:
    return data[0].id if data else None


def last(data: Sequence[FileObject | BatchObject]) -> str | None:
    return data[-1].id if data else None


def json_response(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json", headers={"Cache-Control": "no-store"})
