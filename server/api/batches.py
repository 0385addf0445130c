"""/v1/batches: a file of requests that is answered within a day, when nothing else is to do."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.api.admit_request import check_known
from server.api.files import batch_service, first, json_response, last, owner_of, read_limit, without_room
from server.offline.records import BatchList, BatchObject, batch_object
from server.protocol.batch_fields import BatchBody
from server.protocol.body import read_body
from server.protocol.openapi import query, replies, request_body, text, whole
from server.state import ServerState

router = APIRouter()

PAGE, MAX_PAGE = 20, 100


@router.post("/v1/batches", response_model=None, responses=replies(BatchObject), openapi_extra=request_body(BatchBody))
async def create_batch(request: Request) -> Response:
    """Begins a batch over a file that was uploaded."""
    service = batch_service(request)
    state: ServerState = request.app.state.server
    body = await read_body(request, BatchBody)
    headers = check_known(body, strict=state.config.server.strict or bool(body.strict))
    expiry = body.output_expires_after
    try:
        record = await service.create(
            owner_of(request, service),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            metadata=body.metadata,
            output_seconds=expiry.seconds if expiry is not None else None,
        )
    except OSError as error:
        raise without_room(error) from error
    response = json_response(batch_object(record))
    response.headers.update(headers)
    return response


@router.get(
    "/v1/batches",
    response_model=None,
    responses=replies(BatchList),
    openapi_extra=query(after=text(), limit=whole(1, MAX_PAGE)),
)
async def list_batches(request: Request) -> Response:
    """The batches of the API key, the newest first."""
    service = batch_service(request)
    page = service.list_batches(
        owner_of(request, service),
        after=request.query_params.get("after"),
        limit=read_limit(request, default=PAGE, most=MAX_PAGE),
    )
    data = [batch_object(record) for record in page.records]
    return json_response(BatchList(data=data, first_id=first(data), last_id=last(data), has_more=page.has_more))


@router.get("/v1/batches/{batch_id}", response_model=None, responses=replies(BatchObject))
async def get_batch(request: Request, batch_id: str) -> Response:
    """How far a batch is, and where its answers are."""
    service = batch_service(request)
    return json_response(batch_object(service.batch(owner_of(request, service), batch_id)))


@router.post("/v1/batches/{batch_id}/cancel", response_model=None, responses=replies(BatchObject))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Ends a batch early. What it has answered stays."""
    service = batch_service(request)
    try:
        record = await service.cancel(owner_of(request, service), batch_id)
    except OSError as error:
        raise without_room(error) from error
    return json_response(batch_object(record))
